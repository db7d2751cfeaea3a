"""Text-to-image training in small: captioned images on disk, a tiny Stable Diffusion folder, and settings for both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import TINY
from PIL import Image
from tiny_pipelines import text_pipeline

from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore

CAPTIONS = ("a red one", "b green", "c blue thing", "d grey", "e a dot", "f two of them")


def captioned_folder(folder: Path, count: int = 12, side: int = 20, captions: object = None) -> Path:
    """`count` PNG files in two sub-folders, and captions.json: two captions each, unless others are given."""
    told = {}
    for i in range(count):
        name = f"{i % 2}/{i:02}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        told[name] = [CAPTIONS[i % 6], f"{CAPTIONS[i % 6]} {chr(97 + i)}"]
    (folder / "captions.json").write_text(json.dumps(told if captions is None else captions))
    return folder


def text_settings(place: Path, scheduler: object = None) -> dict[str, Scalar]:
    """Settings of a run in `place`, where a model, images and a cache are made."""
    if not (place / "model").exists():
        text_pipeline(place / "model", scheduler)
        captioned_folder(place / "images")
    return TINY | {
        "data.source": "image-folder",
        "data.path": str(place / "images"),
        "data.image-size": 16,
        "data.limit": 0,
        "data.held-out": 0.2,
        "data.reference": False,
        "data.cache-dir": str(place / "cache"),
        "model.init-from": str(place / "model"),
        "diffusion.timesteps": 100,
        "agc.t-max": 100,
        "batch-size": 4,
        "optimizer.lr": 1e-3,
        "state-dir": str(place / "proxies"),
    }


def text_config(place: Path, **changes: Scalar) -> RunConfig:
    return RunConfig.from_flat(text_settings(place) | changes)


def training_set(config: RunConfig) -> SampleStore:
    return load_splits(config.data).train
