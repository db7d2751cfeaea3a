"""Every source yields disjoint, reproducible splits, and bad images or settings are named."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import assert_disjoint, contents, load, picture, raw
from PIL import Image

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data import decode
from ret_fl.data.glyphs import CLASSES, block_group
from ret_fl.data.sources import DataSplits, load_splits

OFFLINE = ["digits", "mnist", "glyphs", "patches", "faces"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 PNGs of 12x12 in two classes."""
    for i in range(20):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "images"


def from_folder(folder: Path, **settings: object) -> DataSplits:
    cache = str(folder.parent / "cache")
    return load(**({"source": "image-folder", "path": str(folder), "cache_dir": cache} | settings))


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", OFFLINE)
def test_train_held_out_and_reference_share_no_image(source: str) -> None:
    splits = load_splits(DataConfig(source=source))
    assert splits.reference is not None
    assert_disjoint(splits)
    train, held_out, reference = contents(splits)
    assert len(train) == len(reference) == len(splits.reference) > 0
    share = len(held_out) / len(train | held_out | reference)
    assert share == pytest.approx(0.2, abs=0.02) or source == "patches"
    for store in (splits.train, splits.held_out, splits.reference):
        assert store.image_shape == splits.train.image_shape and store.num_classes == splits.train.num_classes
        assert len(set(np.unique(store.unit().numpy()))) > 10  # pictures, not blanks


@pytest.mark.parametrize("source", OFFLINE)
def test_the_same_config_gives_the_same_data_and_another_seed_another_split(source: str) -> None:
    first, again, other = load(source=source, limit=20), load(source=source, limit=20), load(source=source, seed=1)
    assert first.train.fingerprint == again.train.fingerprint
    assert first.held_out.fingerprint == again.held_out.fingerprint
    assert first.reference and again.reference and first.reference.fingerprint == again.reference.fingerprint
    assert first.train.fingerprint != other.train.fingerprint


def test_a_limit_caps_train_and_reference_and_frees_the_rest_to_held_out() -> None:
    splits = load(source="digits", limit=200, held_out=0.2, reference=True)
    assert splits.reference is not None
    assert (len(splits.train), len(splits.reference), len(splits.held_out)) == (200, 200, 1397)
    for store in (splits.train, splits.reference):
        assert store.labels is not None
        assert np.bincount(store.labels.numpy(), minlength=10).min() >= 18  # stratified
    without = load(source="digits", limit=200, reference=False)
    assert without.reference is None and (len(without.train), len(without.held_out)) == (200, 1597)


@pytest.mark.parametrize("source", ["digits", "patches"])
def test_what_is_skipped_is_what_a_limit_took(source: str) -> None:
    """So that a model pretrained on the one is fine-tuned on none of it, nor measured against it."""
    before, after = load(source=source, limit=150, reference=False), load(source=source, limit=100, skip=150)
    assert after.reference is not None and len(after.train) == 100
    for store in (after.train, after.reference, after.held_out):
        shared = np.intersect1d(before.train.content_hashes, store.content_hashes)
        assert len(shared) == 0
    with pytest.raises(ConfigError, match=r"data.skip=9999"):
        load(source=source, skip=9999)


def test_everything_can_train() -> None:
    splits = load(source="digits", held_out=0, reference=False)
    assert len(splits.train) == 1797 and len(splits.held_out) == 0
    assert splits.held_out.unit().shape == (0, 1, 8, 8)


def test_patches_of_one_photograph_are_on_one_side() -> None:
    # The china photograph trains: none of its textured patches may be found outside of train.
    from sklearn.datasets import load_sample_image

    china = torch.from_numpy(load_sample_image("china.jpg")[: 26 * 16, : 40 * 16].copy()).permute(2, 0, 1)
    patches = china.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    known = {patch.numpy().tobytes() for patch in patches}

    splits = load(source="patches")
    assert splits.reference is not None

    def found(pixels: torch.Tensor) -> int:
        return sum(p.tobytes() in known for p in (pixels * 255).round().to(torch.uint8).numpy())

    assert found(splits.train.unit()) > 100
    assert found(splits.held_out.unit()) == found(splits.reference.unit()) == 0
    alone = load(source="patches", reference=False)
    assert len(alone.train) > len(splits.train) and found(alone.held_out.unit()) == 0


def test_exact_duplicates_stay_on_one_side(folder: Path) -> None:
    for i in range(10):
        (folder / "class0" / f"copy{i}.png").write_bytes((folder / f"class{i % 2}" / f"{i:02}.png").read_bytes())
    for seed in range(5):
        splits = from_folder(folder, seed=seed)
        assert_disjoint(splits)
        assert splits.reference is not None and len(splits.reference) == len(contents(splits)[0]) == 8


def test_canaries_stand_as_often_as_asked_and_their_ids_are_listed() -> None:
    splits = load(source="digits", limit=200, canaries=5, canary_repeats=10)
    assert len(splits.train) == 245 and splits.canaries.shape == (5, 10) and splits.canaries.dtype == np.int64
    hashes = splits.train.content_hashes
    for row in splits.canaries:
        assert np.array_equal(np.flatnonzero(hashes == hashes[row[0]]), np.sort(row))
    assert len(set(hashes[:200].tolist())) == 200  # the extra copies come last
    assert_disjoint(splits)
    plain = load(source="digits", limit=200)
    assert np.array_equal(plain.train.content_hashes, hashes[:200])
    assert plain.canaries.shape == (0, 10)


def test_more_canaries_than_training_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.canaries=21 exceeds the 20 training images"):
        load(source="digits", limit=20, canaries=21)


def test_too_few_images_are_refused(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(ConfigError, match=r"turn data\.reference off"):
        from_folder(folder)
    assert len(from_folder(folder, reference=False).train) == 1


# --- built-in sources ----------------------------------------------------------------------------------------------


def test_clients_of_one_process_load_once() -> None:
    assert load_splits(DataConfig()) is load_splits(DataConfig())


@pytest.mark.parametrize("source", OFFLINE)
def test_size_and_colour_are_as_set(source: str) -> None:
    splits = load(source=source, image_size=12, channels="rgb", limit=10)
    assert splits.train.image_shape == (3, 12, 12)
    assert load(source=source, channels="grey", limit=10).train.image_shape[0] == 1


def test_digits_span_black_to_white() -> None:
    pixels = load(source="digits").train.unit()
    assert pixels.min() == 0 and pixels.max() == 1


def test_glyphs_are_distinct_shapes_with_classes() -> None:
    splits = load(source="glyphs", held_out=0, reference=False)
    assert 5500 < len(splits.train) < 6300 and len(contents(splits)[0]) == len(splits.train)
    assert splits.train.labels is not None
    assert set(splits.train.labels.tolist()) == set(range(len(CLASSES)))
    assert [block_group(ord(c)) for c in "AΩЖא→"] == ["latin", "greek", "cyrillic", "hebrew", "arrows"]


# --- image-folder --------------------------------------------------------------------------------------------------


def test_sub_folders_are_classes_and_pixels_are_kept(folder: Path) -> None:
    splits = from_folder(folder, reference=False, held_out=0)
    assert splits.train.num_classes == 2 and splits.train.labels is not None
    assert splits.train.image_shape == (3, 12, 12) and splits.kind == "photo"
    stored = {(int(label), image.numpy().tobytes()) for label, image in zip(*raw(splits), strict=True)}
    assert stored == {(i % 2, np.asarray(picture(i)).transpose(2, 0, 1).tobytes()) for i in range(20)}


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i, suffix in enumerate(["png", "jpg", "JPEG", "webp", "bmp"]):
        picture(i, mode="L").save(tmp_path / "flat" / f"{i}.{suffix}")
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    splits = from_folder(tmp_path / "flat", held_out=0, reference=False, channels="grey")
    assert len(splits.train) == 5 and splits.train.num_classes == 0 and splits.train.labels is None
    assert splits.train.image_shape == (1, 12, 12)


@pytest.mark.parametrize(("second", "channels"), [("L", 1), ("RGB", 3)])
def test_colour_is_kept_unless_all_images_are_grey(tmp_path: Path, second: str, channels: int) -> None:
    (tmp_path / "flat").mkdir()
    picture(0, mode="L").save(tmp_path / "flat" / "0.png")
    picture(1, mode=second).save(tmp_path / "flat" / "1.png")
    assert from_folder(tmp_path / "flat", held_out=0, reference=False).train.image_shape[0] == channels


def test_sixteen_bit_grey_keeps_its_levels(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "flat" / "deep.png")
    splits = from_folder(tmp_path / "flat", held_out=0, reference=False)
    assert np.array_equal((splits.train.unit()[0, 0] * 255).round().numpy().astype(int), levels >> 8)


def test_images_are_resized_and_cropped_at_the_centre(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "flat" / "wide.png")
    picture(1, (30, 40)).save(tmp_path / "flat" / "tall.png")
    splits = from_folder(tmp_path / "flat", held_out=0, reference=False, image_size=10)
    assert splits.train.image_shape == (3, 10, 10)
    middle = splits.train.unit()[:, :, :, 1:-1]
    assert any(image.min() > 0.95 for image in middle)  # the black sides of the wide picture are cut off


def test_a_picture_lying_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (20, 10)).save(tmp_path / "flat" / "side.png", exif=exif)
    splits = from_folder(tmp_path / "flat", held_out=0, reference=False)
    assert splits.train.image_shape == (3, 20, 10)
    upright = np.asarray(picture(0, (20, 10)).rotate(-90, expand=True)).transpose(2, 0, 1)
    assert np.array_equal((splits.train.unit()[0] * 255).round().numpy().astype(int), upright)


def test_images_of_the_held_out_path_never_train(folder: Path, tmp_path: Path) -> None:
    for i in range(12):
        path = tmp_path / "others" / "class1" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(100 + i).save(path)
    others = {np.asarray(picture(100 + i)).transpose(2, 0, 1).tobytes() for i in range(12)}
    splits = from_folder(folder, held_out_path=str(tmp_path / "others"), held_out=0, reference=False)
    assert (len(splits.train), len(splits.held_out), splits.train.num_classes) == (20, 12, 2)
    assert {x.numpy().tobytes() for x in splits.held_out.pixels()} == others
    assert splits.held_out.labels is not None and set(splits.held_out.labels.tolist()) == {1}
    with_reference = from_folder(folder, held_out_path=str(tmp_path / "others"), held_out=0.1, reference=True)
    assert with_reference.reference is not None
    assert (len(with_reference.train), len(with_reference.reference), len(with_reference.held_out)) == (9, 9, 3)
    assert_disjoint(with_reference)
    with pytest.raises(ConfigError, match=r"data\.held-out-path: .*nowhere is not a folder"):
        from_folder(folder, held_out_path=str(tmp_path / "nowhere"))


def spoil(folder: Path) -> list[str]:
    picture(50, (200, 200)).save(folder / "whole.jpg")
    (folder / "class0" / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:3000])
    (folder / "whole.jpg").unlink()
    (folder / "class1" / "text.png").write_text("this is no picture")
    (folder / "class1" / "empty.png").touch()
    return ["class0/truncated.jpg", "class1/empty.png", "class1/text.png"]


def test_a_corrupt_image_is_named_and_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = spoil(folder)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            splits = from_folder(folder, image_size=12, held_out=0, reference=False)
        assert sorted(splits.unreadable) == named and len(splits.train) == 20
        assert "skipped 3 unreadable images" in caplog.text and "class0/truncated.jpg" in caplog.text
    assert splits.train.labels is not None and splits.train.labels.sum() == 10
    assert splits.train.unit().flatten(1).std(1).min() > 0.1  # no row of the array was left empty


def test_a_corrupt_image_stops_the_run_when_refused(folder: Path) -> None:
    named = spoil(folder)
    for left in named:
        with pytest.raises(ConfigError, match=r"cannot read class.*data\.on-corrupt=skip"):
            from_folder(folder, image_size=12, on_corrupt="refuse")
        (folder / left).unlink()
    assert len(from_folder(folder, on_corrupt="refuse", held_out=0, reference=False).train) == 20
    assert not list((folder.parent / "cache").glob("*.tmp*"))


def test_a_folder_that_cannot_be_used_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"no PNG, JPEG, WebP or BMP images"):
        from_folder(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"data\.path: .*missing is not a folder"):
        from_folder(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"needs a folder of images in data\.path"):
        load(source="image-folder")
    (tmp_path / "nothing" / "broken.png").write_text("broken")
    with pytest.raises(ConfigError, match=r"none of its 1 images can be read"):
        from_folder(tmp_path / "nothing")
    picture(0, (13, 12)).save(folder / "class0" / "odd.png")
    with pytest.raises(ConfigError, match=r"differ in size \(12x12, 13x12\): set data\.image-size"):
        from_folder(folder)


def test_the_cache_is_read_again_until_a_file_changes(folder: Path) -> None:
    first = from_folder(folder)
    cache = folder.parent / "cache"
    (entry,) = cache.glob("*.npy")
    stamp = entry.stat().st_mtime_ns
    assert from_folder(folder).train.fingerprint == first.train.fingerprint
    assert list(cache.glob("*.npy")) == [entry] and entry.stat().st_mtime_ns == stamp

    changed = folder / "class0" / "00.png"
    picture(99).save(changed)
    os.utime(changed, ns=(stamp, stamp))
    second = from_folder(folder)
    assert set.union(*contents(second)) != set.union(*contents(first))
    assert len(list(cache.glob("*.npy"))) == 2
    from_folder(folder, image_size=8)
    assert len(list(cache.glob("*.npy"))) == 3
    assert {p.suffix for p in cache.iterdir()} == {".npy", ".json"}


def test_the_cache_is_below_xdg_cache_home_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "xdg"))
    assert decode.cache_dir(DataConfig()) == folder.parent / "xdg" / "ret-fl" / "data"
    from_folder(folder, cache_dir="")
    assert list((folder.parent / "xdg" / "ret-fl" / "data").glob("*.npy"))


def test_a_cache_that_cannot_be_made_names_the_setting(folder: Path) -> None:
    (folder.parent / "file").touch()
    with pytest.raises(ConfigError, match=r"set data\.cache-dir"):
        from_folder(folder, cache_dir=str(folder.parent / "file" / "cache"))
