"""Data behind a URL is the same data, copied once, whatever happens there and whatever it is called."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.mirror import is_url, mirrored
from ret_fl.data.sources import load_splits

load = load_splits.__wrapped__


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 PNGs of 12x12 in two classes, and a text file."""
    for i in range(20):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def bucket() -> Iterator[str]:
    """The root of an object store in memory."""
    yield "memory://bucket"
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def upload(folder: Path, url: str) -> None:
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def config(tmp_path: Path, path: object, cache: str, source: str = "image-folder") -> DataConfig:
    return DataConfig(source=source, path=str(path), cache_dir=str(tmp_path / cache))


def fingerprint(settings: DataConfig) -> str:
    return load(settings).train.fingerprint


def parquet(folder: Path, path: Path) -> Path:
    files = sorted(folder.rglob("*.png"))
    rows = {"image": [str(f) for f in files], "label": [int(f.parent.name[-1]) for f in files]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path, batch_size=7)
    return path


def test_an_image_folder_is_the_same_behind_any_url(tmp_path: Path, folder: Path, bucket: str) -> None:
    upload(folder, f"{bucket}/photos")
    expected = fingerprint(config(tmp_path, folder, "a"))
    assert fingerprint(config(tmp_path, f"{bucket}/photos", "b")) == expected
    assert fingerprint(config(tmp_path, f"{bucket}/photos/", "c")) == expected
    assert fingerprint(config(tmp_path, folder.as_uri(), "d")) == expected


@pytest.mark.parametrize("form", ["{}/data.parquet", "{}/*.parquet", "{}"])
def test_parquet_is_the_same_behind_a_url(tmp_path: Path, folder: Path, bucket: str, form: str) -> None:
    (tmp_path / "table").mkdir()
    parquet(folder, tmp_path / "table" / "data.parquet")
    upload(tmp_path / "table", f"{bucket}/table")
    expected = fingerprint(config(tmp_path, form.format(tmp_path / "table"), "a", "hf"))
    assert fingerprint(config(tmp_path, form.format(f"{bucket}/table"), "b", "hf")) == expected


def test_the_cache_follows_what_changes_there_and_copies_nothing_else(
    tmp_path: Path, folder: Path, bucket: str
) -> None:
    fs = fsspec.filesystem("memory")
    upload(folder, f"{bucket}/photos")
    settings = config(tmp_path, f"{bucket}/photos", "cache")
    first = fingerprint(settings)
    local = Path(mirrored(settings).path)
    stamps = {path: path.stat().st_mtime_ns for path in local.rglob("*.png")}
    assert len(stamps) == 20
    fs.pipe_file(f"{bucket}/photos/class0/00.png", (folder / "class1" / "01.png").read_bytes())
    fs.rm(f"{bucket}/photos/class0/02.png")
    assert fingerprint(settings) != first
    after = {path: path.stat().st_mtime_ns for path in local.rglob("*.png")}
    assert len(after) == 19
    assert {path.name for path in after if after[path] != stamps[path]} == {"00.png"}
    shutil.rmtree(local)
    assert len(list(Path(mirrored(settings).path).rglob("*.png"))) == 19


@pytest.mark.parametrize("name", ["../../escaped.png", "a/../../escaped.png", "a\\b.png", "a//b.png", "./a.png"])
def test_no_name_there_can_leave_the_cache(
    tmp_path: Path, bucket: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/photos/good.png", b"x")
    monkeypatch.setattr(type(fs), "find", lambda *_, **__: {f"/bucket/photos/{name}": {"size": 1, "type": "file"}})
    with pytest.raises(ConfigError, match="is no name for a file"):
        mirrored(config(tmp_path, f"{bucket}/photos", "cache"))
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/nothing", "no files at memory://bucket/nothing"),
        ("memory://bucket/*/a.parquet", "only the last part may be a pattern"),
        ("nosuch://bucket/a", r"cannot read nosuch://bucket/a: ValueError"),
        ("ftp://user:secret@127.0.0.1:9/photos", "cannot read ftp://127.0.0.1:9/photos"),
    ],
)
def test_what_cannot_be_read_is_named_and_credentials_are_not(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        mirrored(config(tmp_path, url, "cache"))
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None


def test_paths_and_hub_names_are_no_urls() -> None:
    assert is_url("s3://bucket/x") and is_url("simplecache::s3://bucket/x") and is_url("file:///data")
    assert not any(map(is_url, ["/data/x", "data/x", "owner/name", "C:\\data", "", "~/x", "a*.parquet"]))
