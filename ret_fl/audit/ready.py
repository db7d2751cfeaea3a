"""Images that are ready: a folder of pictures or a .npy file, in the size and colours asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ret_fl.audit.inputs import evenly_spread
from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.folder import load_folder

Channels = Literal["auto", "grey", "rgb"]
NPY_MAGIC = b"\x93NUMPY"
CHUNK_VALUES = 2**22
"""Pixel values converted at a time."""
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in ret_fl.data.images


def read_images(
    path: Path,
    image_size: int = 0,
    channels: Channels = "auto",
) -> Tensor:
    """Images of a folder (PNG, JPEG, WebP, BMP; below it too, in the order of their paths) or of a .npy file.

    A .npy holds uint8, or float in [0, 1]: [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, or grey [N, H, W].

    Returns:
        float32 [N, C, H, W] in [0, 1].

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no images, sizes that differ while image_size is 0, a file that cannot be read, another shape or
            dtype, NaN, or values outside [0, 1]; the message names the file.
    """
    return read_some(path, None, image_size, channels)[0]


def read_some(path: Path, most: int | None, image_size: int = 0, channels: Channels = "auto") -> tuple[Tensor, int]:
    """At most `most` of the images, evenly spread, and how many there are; as `read_images` in all else."""
    with _stored_images(path, image_size, channels) as stored:
        count = len(stored)
        chosen = stored if most is None else stored[evenly_spread(count, most).numpy()]
        _require_unit(chosen, path)
        return fitted(_unit(chosen), image_size, channels), count


def read_bytes(path: Path, image_size: int = 0, channels: Channels = "auto") -> Tensor:
    """All images as uint8 [N, C, H, W], floats rounded; the rest as `read_images`. Few at a time are held as floats."""
    with _stored_images(path, image_size, channels) as stored:
        _require_unit(stored, path)
        images, done = torch.empty(0, dtype=torch.uint8), 0
        for chunk in _chunks(stored):
            part = fitted(_unit(chunk), image_size, channels).mul_(255).round_()
            images = images if done else torch.empty(len(stored), *part.shape[1:], dtype=torch.uint8)
            images[done : done + len(part)] = part
            done += len(part)
        return images


def fitted(images: Tensor, side: int, channels: Channels) -> Tensor:
    """Images float32 [N, C, H, W] in [0, 1], in that size (0: their own) and those colours."""
    return _recoloured(_resized(images, side), channels)


def _resized(images: Tensor, side: int) -> Tensor:
    """Shorter side to `side` and centre crop, in one Lanczos resampling; `side` 0 changes nothing."""
    if not side or images.shape[2:] == (side, side):
        return images
    planes = (Image.fromarray(plane) for plane in images.flatten(0, 1).numpy())
    resized = [np.asarray(ImageOps.fit(plane, (side, side), method=Image.Resampling.LANCZOS)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).view(*images.shape[:2], side, side).clamp_(0, 1)


def _recoloured(images: Tensor, channels: Channels) -> Tensor:
    if channels == "grey" and images.shape[1] == 3:
        return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA))[:, None].clamp_(0, 1)
    if channels == "rgb" and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1).contiguous()
    return images


@contextmanager
def _stored_images(path: Path, image_size: int, channels: Channels) -> Iterator[np.ndarray]:
    """The images as they are stored, [N, C, H, W] or grey [N, H, W], memory-mapped."""
    if path.is_dir():
        with TemporaryDirectory() as scratch:
            yield _decoded(path, image_size, channels, Path(scratch))
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images or a .npy file")
    else:
        yield _array(path)


def _decoded(folder: Path, image_size: int, channels: Channels, cache: Path) -> np.ndarray:
    config = DataConfig(
        source="image-folder",
        path=str(folder),
        image_size=image_size,
        channels=channels,
        on_corrupt="refuse",
        captions="",
        cache_dir=str(cache),
    )
    try:
        return load_folder(config).images
    except ConfigError as error:
        raise ValueError(as_options(error, folder)) from error


def as_options(error: ConfigError, path: str | Path) -> str:
    """What is wrong with the images at `path`, without the settings that an audit does not have."""
    told, _, _ = str(error).removeprefix("data.path: ").partition("; data.on-corrupt")
    told = told.replace("data.image-size", "--image-size")
    return told if str(path) in told else f"{path}: {told}"


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path} is neither a folder nor a .npy file")
    with path.open("rb") as file:
        start = file.read(len(NPY_MAGIC))
    if start != NPY_MAGIC:
        raise ValueError(f"{path} {'is no .npy file' if start else 'is empty'}: write images there by numpy.save")
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {error}") from error
    if stored.size == 0:
        raise ValueError(f"{path} is empty: it holds an array {stored.shape}")
    if stored.ndim not in (3, 4):
        raise ValueError(f"{path} must hold images [N, C, H, W], [N, H, W, C] or [N, H, W], not {stored.shape}")
    if stored.dtype != np.uint8 and stored.dtype.kind != "f":
        raise ValueError(f"{path} holds {stored.dtype}: save it as uint8, or as float in [0, 1]")
    if stored.ndim == 3:
        return stored[:, None]
    if stored.shape[1] in (1, 3):
        return stored
    if stored.shape[3] in (1, 3):
        return stored.transpose(0, 3, 1, 2)
    raise ValueError(f"{path} must hold images of 1 or 3 channels, not {stored.shape}")


def _chunks(stored: np.ndarray) -> Iterator[np.ndarray]:
    """Some images at a time, whatever their size."""
    size = max(1, CHUNK_VALUES * len(stored) // stored.size)
    return (stored[start : start + size] for start in range(0, len(stored), size))


def _require_unit(stored: np.ndarray, path: Path) -> None:
    """Raises `ValueError` on NaN and on floats outside [0, 1]."""
    if stored.dtype == np.uint8:
        return
    bad = sum(int((~((part >= 0) & (part <= 1))).any(axis=(1, 2, 3)).sum()) for part in _chunks(stored))
    if bad:
        raise ValueError(f"{path}: {bad} of {len(stored)} images hold NaN or values outside [0, 1]: scale or drop them")


def _unit(stored: np.ndarray) -> Tensor:
    """uint8 or float [N, C, H, W] -> float32 in [0, 1], in memory."""
    images = torch.from_numpy(stored.astype(np.float32, order="C"))
    return images.div_(255) if stored.dtype == np.uint8 else images
