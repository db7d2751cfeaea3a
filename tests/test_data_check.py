"""`ret-fl data check` tells what a dataset holds, and finds what is planted in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from captioned import text_settings
from cifars import archive, pixels, write_cifar10
from conftest import ret_fl
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import small_pipeline

from ret_fl.config import ConfigError, DataConfig, RunConfig, Scalar
from ret_fl.data.check import check_data, near_duplicates
from ret_fl.data.near import joined_by_hash, perceptual_hashes
from ret_fl.data.sources import load_splits
from ret_fl.diffusion.text_to_image import data_read, require_captions


def photo(seed: int) -> np.ndarray:
    """uint8 [32, 32, 3] with large shapes."""
    return pixels(1, 1000 + seed).reshape(3, 32, 32).transpose(1, 2, 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures of two classes, none like another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i)).save(path)
    return tmp_path / "images"


def config(folder: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"source": "image-folder", "path": str(folder), "held_out": 0.25} | more)


def test_a_clean_dataset_has_nothing_to_report(folder: Path) -> None:
    result = ret_fl("data", "check", folder, "--set", "data.held-out=0.25", "--set", "data.reference=false")
    assert result.exit_code == 0, result.output
    assert "24 of RGB 32x32" in result.output and "nothing to report" in result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["class", "train", "held-out"] in lines and ["all", "18", "6"] in lines
    assert ["0", "9", "3"] in lines and ["1", "9", "3"] in lines
    assert load_splits(config(folder, reference=False)).train.fingerprint in result.output


def test_equal_alike_and_unreadable_images_are_found_and_named(folder: Path) -> None:
    (folder / "b" / "copy.png").write_bytes((folder / "a" / "02.png").read_bytes())
    brighter = np.clip(photo(5) * 1.05 + 6, 0, 255).astype(np.uint8)
    Image.fromarray(brighter).save(folder / "a" / "jpeg.jpg", quality=80)
    (folder / "a" / "text.png").write_text("no picture")
    result = ret_fl("data", "check", folder)
    assert result.exit_code == 3
    for line in (
        "unreadable and left out: 1",
        "exact duplicates: 2 images that show 1 different ones",
        "near-duplicates by perceptual hash, at most 4 bits apart: 2 in 1 groups",
        "unreadable: a/text.png",
        "equal: a/02.png, b/copy.png",
        "alike: a/jpeg.jpg, b/05.png",
    ):
        assert line in result.output
    assert "near-duplicates by" not in ret_fl("data", "check", folder, "--no-near").output
    by_pixels = ["data", "check", folder, "--set", "data.near-duplicates=cosine", "--set"]
    loose = ret_fl(*by_pixels, "data.near-threshold=.9").output
    assert ": 2 in 1 groups" in loose and "alike: a/jpeg.jpg, b/05.png" in loose
    assert "near-duplicates" not in ret_fl(*by_pixels, "data.near-threshold=.9999").output


def test_modes_and_sizes_are_counted_as_they_came(folder: Path) -> None:
    Image.fromarray(photo(99)[:, :, 0]).resize((40, 30)).save(folder / "a" / "grey.png")
    found = check_data(config(folder, image_size=16))
    assert found.originals == {"RGB 32x32": 24, "L 40x30": 1} and found.image_shape == (3, 16, 16)
    refused = ret_fl("data", "check", folder)
    assert refused.exit_code == 1 and "differ in size (32x32, 40x30): set data.image-size" in refused.output


def test_held_out_images_that_train_too_are_told(folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    Image.fromarray(photo(3)).save(others / "leak.png")
    Image.fromarray(np.clip(photo(4).astype(int) + 4, 0, 255).astype(np.uint8)).save(others / "alike.png")
    Image.fromarray(photo(200)).save(others / "new.png")
    found = check_data(config(folder, held_out_path=str(others), held_out=0, reference=False))
    assert dict(found.counts) == {"train": 24, "held-out": 2} and found.dropped == 1 and found.crossing == 1
    assert any("1 held-out images equal a training image" in problem for problem in found.problems())
    assert any("1 of them across training and held-out" in problem for problem in found.problems())


def test_every_form_of_data_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cifar = write_cifar10(tmp_path)
    for path in (cifar, archive(cifar)):
        result = ret_fl("data", "check", path, "--set", "data.held-out=0", "--set", "data.reference=false")
        assert result.exit_code == 0 and ["all", "40", "10"] in [line.split() for line in result.output.splitlines()]
    preset = ["--preset", "simulations/presets/cifar10.toml", "--set", f"data.path={cifar}"]
    assert ["all", "40", "10"] in [line.split() for line in ret_fl("data", "check", *preset).output.splitlines()]
    builtin = ret_fl("data", "check", "faces", "--no-near")
    assert builtin.exit_code == 0 and "100 of L 24x24" in builtin.output
    missing = ret_fl("data", "check", tmp_path / "nowhere")
    assert missing.exit_code == 1 and "there is no such file or folder" in missing.output


def test_without_imagehash_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    result = ret_fl("data", "check", folder)
    assert result.exit_code == 1 and "pip install 'ret-fl[check]'" in result.output and "--no-near" in result.output
    assert ret_fl("data", "check", folder, "--no-near").exit_code == 0


@given(st.lists(st.integers(0, 2**6 - 1), min_size=1, max_size=40), st.integers(0, 3))
def test_near_duplicates_are_those_of_a_double_loop(words: list[int], most: int) -> None:
    # few bits, so that hashes collide: the other 58 of each are 0
    bits = np.zeros((len(words), 64), bool)
    bits[:, :6] = [[word >> i & 1 for i in range(6)] for word in words]
    contents = np.arange(len(words), dtype=np.uint64) // 2  # pairs of neighbours are exact copies
    group = list(range(len(words)))
    for i in range(len(words)):
        for j in range(i):
            if (bits[i] != bits[j]).sum() <= most:
                group = [group[j] if g == group[i] else g for g in group]
    expected = {frozenset(i for i, g in enumerate(group) if g == name) for name in group}
    expected = {rows for rows in expected if len({i // 2 for i in rows}) > 1}
    assert {frozenset(rows.tolist()) for rows in near_duplicates(joined_by_hash(bits, most), contents)} == expected


def test_near_duplicates_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ret_fl.data.near.BLOCK", 16)
    bits = np.random.default_rng(0).random((100, 64)) < 0.5
    bits[90], bits[50] = bits[2], bits[2]
    bits[50, :4] ^= True
    (found,) = near_duplicates(joined_by_hash(bits, 4), np.arange(100, dtype=np.uint64))
    assert found.tolist() == [2, 50, 90]


def test_hashes_are_those_of_the_library() -> None:
    imagehash = pytest.importorskip("imagehash")
    images = np.stack([photo(i).transpose(2, 0, 1) for i in range(3)])
    for found, image in zip(perceptual_hashes(images), images, strict=True):
        assert np.array_equal(found, imagehash.phash(Image.fromarray(image.transpose(1, 2, 0))).hash.ravel())


# --- captions ---------------------------------------------------------------------------------------------------------


def fingerprint_of(flat: dict[str, Scalar]) -> str:
    """As a run finds it."""
    return load_splits(data_read(RunConfig.from_flat(flat))).train.fingerprint


def changes(flat: dict[str, Scalar]) -> list[str]:
    return [part for key, value in flat.items() for part in ("--set", f"{key}={value}")]


def test_captions_are_read_as_the_run_would_read_them(tmp_path: Path) -> None:
    settings = text_settings(tmp_path)
    text = {key: settings[key] for key in settings if key.startswith(("data.", "model.", "diffusion.", "agc."))}
    pixel = {key: value for key, value in text.items() if key.startswith("data.")}
    away = text | {"model.init-from": "stable-diffusion-2-1"}
    assert fingerprint_of(text) != fingerprint_of(pixel)
    counted = "24 captions, 18 distinct; 12 images have several"
    outputs = {}
    for name, flat in (("text", text), ("pixel", pixel), ("away", away)):
        result = ret_fl("data", "check", *changes(flat))
        assert result.exit_code == 0, result.output
        outputs[name] = " ".join(result.output.split())
    assert fingerprint_of(text) in outputs["text"] and fingerprint_of(pixel) not in outputs["text"]
    assert fingerprint_of(pixel) in outputs["pixel"] and fingerprint_of(text) not in outputs["pixel"]
    assert f"fingerprint {fingerprint_of(text)} " in outputs["away"]
    assert f"fingerprint {fingerprint_of(pixel)} without captions" in outputs["away"]
    assert [counted in output for output in outputs.values()] == [True, False, True]

    told = json.loads((tmp_path / "images" / "captions.json").read_text())
    told.pop("0/00.png")
    (tmp_path / "images" / "captions.json").write_text(json.dumps(told))
    assert ret_fl("data", "check", *changes(pixel)).exit_code == 0
    lacking = ret_fl("data", "check", *changes(text))
    assert lacking.exit_code == 1 and "gives 0/00.png no caption" in lacking.output


def test_captions_that_a_run_needs_and_lacks_are_told(tmp_path: Path) -> None:
    flat = text_settings(tmp_path)
    (tmp_path / "images" / "captions.json").unlink()
    text = {key: flat[key] for key in flat if key.startswith(("data.", "model.", "diffusion.", "agc."))}
    pixels = tmp_path / "pixels"
    small_pipeline(pixels, channels=3, side=16)
    preset = ["--preset", "simulations/presets/laion-10k-sd21.toml", "--set", f"data.path={tmp_path / 'images'}"]
    small = ["--set", "data.image-size=16"]
    for command, told in (
        (changes(text), "no captions, and a run needs them"),
        (preset + small, "a run needs them if model.init-from, which is no folder here, draws from text"),
        (changes(text | {"model.init-from": str(pixels)}), None),
    ):
        result = ret_fl("data", "check", *command)
        output = " ".join(result.output.split())
        assert result.exit_code == (3 if told else 0), result.output
        assert told in output and "put captions.json into the image folder" in output if told else (
            "captions" not in output
        )  # fmt: skip
    with pytest.raises(ConfigError, match="the data has no captions"):  # as the check said
        require_captions(RunConfig.from_flat(text), load_splits(RunConfig.from_flat(text).data).train)
