"""Drawn images on disk, a file a batch: drawing stops and goes on, and only what is missing is drawn."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit.pipelines import Draw, parts_of, pipeline_of
from ret_fl.diffusion.ensemble import ENSEMBLE_FILE, is_ensemble, read_ensemble
from ret_fl.diffusion.sampling import FOLD_FILE
from ret_fl.diffusion.text_to_image import BASE_FILE, LORA_FILE
from ret_fl.files import sync, write_atomically

logger = logging.getLogger(__name__)

# What reading a damaged .npz raises, by where the damage is.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)


def draw_missing(
    draw: Draw, samples: int, batch_size: int, shelf: Path | None, on_progress: Callable[[int, int], None] | None
) -> Tensor:
    """Images 0..samples-1: from the shelf where it has them, else drawn and put there, a file a batch."""
    starts = sorted(int(file.stem) for file in shelf.glob("*.npz") if file.stem.isdigit()) if shelf else []
    batches: list[Tensor] = []
    done = 0
    while done < samples:
        images = _load_batch(shelf, done) if shelf else None
        if images is None:
            following = next((start for start in starts if start > done), samples)
            images = draw(done, min(batch_size, samples - done, following - done))
            if shelf:
                _save_batch(shelf, done, images)
        batches.append(images)
        done += len(images)
        if on_progress:
            on_progress(min(done, samples), samples)
    return torch.cat(batches)[:samples]


def open_shelf(cache: Path, folder: Path, key: dict[str, Any]) -> Path:
    """The folder inside `cache` of what `key` and the model's content describe; key.json in it says what they are."""
    described = json.dumps({"model": _content_digest(folder), **key}, indent=2, sort_keys=True)
    shelf = cache / hashlib.sha256(described.encode()).hexdigest()[:32]
    shelf.mkdir(parents=True, exist_ok=True)
    write_atomically(shelf / "key.json", described + "\n")
    return shelf


def _content_digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of the files that make up a pipeline, or the pipelines of an ensemble."""
    digest = hashlib.sha256()
    if is_ensemble(folder):
        digest.update((folder / ENSEMBLE_FILE).read_bytes())
        for member in read_ensemble(folder).members:
            digest.update(f"{member.name}\0{_content_digest(member)}\n".encode())
        return digest.hexdigest()
    whole = pipeline_of(folder)
    inside = [file for part in parts_of(whole) if part != "safety_checker" for file in (whole / part).rglob("*")]
    _add_files(digest, whole, [whole / "model_index.json", whole / FOLD_FILE, *inside])
    if whole != folder:  # adapters, beside the pipeline they belong to
        _add_files(digest, folder, [folder / LORA_FILE, folder / BASE_FILE])
    return digest.hexdigest()


def _add_files(digest: Any, folder: Path, files: Sequence[Path]) -> None:
    """Names inside the folder and contents, of those files that are there."""
    for file in sorted(files):
        if file.is_file():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())


def _batch_file(shelf: Path, first: int) -> Path:
    return shelf / f"{first:08d}.npz"


def _save_batch(shelf: Path, first: int, images: Tensor) -> None:
    path = _batch_file(shelf, first)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, images=images.numpy())
    sync(temporary)
    temporary.replace(path)


def _load_batch(shelf: Path, first: int) -> Tensor | None:
    """The batch that starts with image `first`, or None if it is not there or damaged (npz keeps a checksum)."""
    path = _batch_file(shelf, first)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as held:
            return torch.from_numpy(held["images"])
    except DAMAGED as error:
        logger.warning("%s is damaged (%s): its images are drawn again", path, error)
        return None
