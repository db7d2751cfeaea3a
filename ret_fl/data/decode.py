"""Decode a collection of encoded images once, into a memory-mapped array kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.images import Captions, ImageSet
from ret_fl.files import user_cache

logger = logging.getLogger(__name__)

_GREY_MODES = {"1", "L", "LA", "I;16", "I;16L", "I;16B", "I"}
_DEEP_MODES = {"I;16", "I;16L", "I;16B", "I"}  # how Pillow opens 16-bit grey; its convert("L") would clip
# What Pillow raises on damaged files, from a wrong magic number to a header that announces a gigapixel.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Encoded:
    """Images not yet decoded: `open(i)` gives the i-th (and raises if it cannot), `name(i)` what to call it.

    outside: bool [count], which of them must not train; None: all may.
    captions: those of each image, or None.
    """

    count: int
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    labels: np.ndarray | None
    num_classes: int
    outside: np.ndarray | None = None
    captions: Captions | None = None


def cache_dir(config: DataConfig) -> Path:
    """data.cache-dir, or ret-fl/data in the user's cache (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else user_cache("data")


def describe_files(files: list[Path], root: Path) -> list[tuple[str, int, int]]:
    """Relative path, size and time of change of each file: a cache key that costs no reading."""
    stats = [(file, file.stat()) for file in files]
    return [(file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def decode_cached(contents: object, find: Callable[[], Encoded], config: DataConfig) -> ImageSet:
    """The decoded images of `find()`, from the cache if it has them for these `contents` and settings.

    Args:
        contents: describes the encoded images (JSON-able); a change of it makes the cached array stale.
        find: called only when the images must be decoded.
        config: size, channels, what to do with unreadable images, and where the cache is.

    Raises:
        ConfigError: no readable images, sizes differ while data.image-size is 0, an image is unreadable and
            data.on-corrupt is 'refuse', or the cache cannot be written.
    """
    settings = (config.image_size, config.channels, config.on_corrupt)
    key = hashlib.sha256(json.dumps([3, contents, settings]).encode()).hexdigest()[:32]
    folder = cache_dir(config)
    images_path, notes_path = folder / f"{key}.npy", folder / f"{key}.json"
    if not (notes_path.exists() and images_path.exists()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the cache {folder}: {error}; set data.cache-dir") from error
        _write_entry(find(), config, images_path, notes_path)
    notes = json.loads(notes_path.read_text(encoding="utf-8"))
    unreadable = tuple(notes["unreadable"])
    if unreadable:
        shown = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        logger.warning("skipped %d unreadable images: %s (data.on-corrupt=refuse stops)", len(unreadable), shown)
    labels = None if notes["labels"] is None else np.array(notes["labels"], dtype=np.int64)
    captions = None if notes["captions"] is None else tuple(tuple(own) for own in notes["captions"])
    return ImageSet(
        np.load(images_path, mmap_mode="c"),
        labels,
        notes["num_classes"],
        "photo",
        unreadable,
        outside=None if notes["outside"] is None else np.array(notes["outside"], dtype=bool),
        names=notes["names"],
        originals=notes["originals"],
        captions=captions,
    )


def _write_entry(encoded: Encoded, config: DataConfig, images_path: Path, notes_path: Path) -> None:
    """Decode everything into `images_path`, then write `notes_path`; each appears complete or not at all."""
    scratch = images_path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        kept, unreadable, originals = _decode(encoded, config, scratch)
        scratch.replace(images_path)
        notes = {
            "unreadable": unreadable,
            "labels": None if encoded.labels is None else encoded.labels[kept].tolist(),
            "num_classes": encoded.num_classes,
            "outside": None if encoded.outside is None else encoded.outside[kept].tolist(),
            "names": [encoded.name(i) for i in kept],
            "originals": originals,
            "captions": None if encoded.captions is None else [encoded.captions[i] for i in kept],
        }
        scratch.write_text(json.dumps(notes), encoding="utf-8")
        scratch.replace(notes_path)
    finally:
        scratch.unlink(missing_ok=True)


def _decode(encoded: Encoded, config: DataConfig, path: Path) -> tuple[list[int], list[str], dict[str, int]]:
    """Write uint8 [n, C, H, W] to `path` in .npy format.

    Which images it holds, the names of the others, and how many had which mode and size.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        headers = list(pool.map(lambda i: _header(encoded, i), range(encoded.count)))
        readable = [i for i, header in enumerate(headers) if not isinstance(header, Exception)]
        modes = {header[0] for header in headers if not isinstance(header, Exception)}
        sizes = {header[1] for header in headers if not isinstance(header, Exception)}
        failed: dict[int, Exception] = {i: h for i, h in enumerate(headers) if isinstance(h, Exception)}
        _check(encoded, config, readable, sizes, failed)
        grey = config.channels == "grey" or (config.channels == "auto" and modes <= _GREY_MODES)
        width, height = (config.image_size, config.image_size) if config.image_size else next(iter(sizes))
        shape = (len(readable), 1 if grey else 3, height, width)
        images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        kept: list[int] = []
        for i, pixels in zip(readable, pool.map(lambda i: _pixels(encoded, i, config, grey), readable), strict=True):
            if isinstance(pixels, Exception):
                failed[i] = pixels
                _check(encoded, config, readable, sizes, failed)
            else:
                images[len(kept)] = pixels
                kept.append(i)
    images.flush()
    if not kept:
        raise ConfigError(f"data.path: none of its {encoded.count} images can be read ({encoded.name(0)}, ...)")
    if len(kept) < len(images):
        _shorten(images, len(kept), path)
    came = [header for header in map(headers.__getitem__, kept) if not isinstance(header, Exception)]
    originals = Counter(f"{mode} {width}x{height}" for mode, (width, height) in came)
    return kept, [encoded.name(i) for i in sorted(failed)], dict(originals.most_common())


def _shorten(images: np.ndarray, count: int, path: Path) -> None:
    """Rewrite `path` with the first `count` images; the file is made beside it, since `images` maps `path`."""
    shorter = path.with_suffix(".short.npy")
    try:
        np.save(shorter, images[:count])
        shorter.replace(path)
    finally:
        shorter.unlink(missing_ok=True)


def _check(
    encoded: Encoded,
    config: DataConfig,
    readable: list[int],
    sizes: set[tuple[int, int]],
    failed: dict[int, Exception],
) -> None:
    if failed and config.on_corrupt == "refuse":
        i, error = next(iter(failed.items()))
        raise ConfigError(f"cannot read {encoded.name(i)}: {error}; data.on-corrupt=skip would leave it out") from error
    if not readable:
        raise ConfigError(f"data.path: none of its {encoded.count} images can be read ({encoded.name(0)}, ...)")
    if not config.image_size and len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:4])
        raise ConfigError(f"the images differ in size ({shown}): set data.image-size to bring them to one size")


def _header(encoded: Encoded, i: int) -> tuple[str, tuple[int, int]] | Exception:
    """Colour mode and upright (width, height), without decoding pixels; or what made that impossible."""
    try:
        with encoded.open(i) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
            return image.mode, ((height, width) if turned else (width, height))
    except _UNREADABLE as error:
        return error


def _pixels(encoded: Encoded, i: int, config: DataConfig, grey: bool) -> np.ndarray | Exception:
    """uint8 [C, H, W], upright, at data.image-size; or what made that impossible."""
    try:
        with encoded.open(i) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode in _DEEP_MODES:
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("L" if grey else "RGB")
    except _UNREADABLE as error:
        return error
    if config.image_size:
        # Shorter side to image-size and centre crop, in one resampling.
        image = ImageOps.fit(image, (config.image_size, config.image_size), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)
