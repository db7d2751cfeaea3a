"""Pictures in files, and data sets read from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ret_fl.config import DataConfig
from ret_fl.data.sources import DataSplits, load_splits

load_again = load_splits.__wrapped__  # as a second process would: past the lru_cache


def load(**settings: object) -> DataSplits:
    return load_again(DataConfig(**settings))


def contents(splits: DataSplits) -> list[set[int]]:
    stores = [splits.train, splits.held_out] + ([splits.reference] if splits.reference else [])
    return [set(store.content_hashes.tolist()) for store in stores]


def assert_disjoint(splits: DataSplits) -> None:
    sets = contents(splits)
    assert len(set.union(*sets)) == sum(map(len, sets))


def picture(seed: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def grey_pictures(folder: Path) -> Path:
    """24 grey PNGs of 8x8 in 2 classes."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def one_pixel_changed(pictures: Path, copy: Path) -> Path:
    """A copy of `grey_pictures` with one pixel changed."""
    shutil.copytree(pictures, copy)
    changed = copy / "class1" / "13.png"
    pixels = np.array(Image.open(changed))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    return copy


def raw(splits: DataSplits) -> tuple[torch.Tensor, torch.Tensor]:
    assert splits.train.labels is not None
    return splits.train.labels, (splits.train.unit() * 255).round().to(torch.uint8)
