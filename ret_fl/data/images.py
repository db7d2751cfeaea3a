"""ImageSet, what every source yields, and the resizing and recolouring the built-in sources share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

Captions = tuple[tuple[str, ...], ...]
"""The captions of each image, one at least."""
Kind = Literal["glyph", "photo"]
"""What augmentation may do to the images: shapes on a ground, or pictures of the world."""


@dataclass(frozen=True)
class ImageSet:
    """All images of a source before they are split.

    images: uint8 [N, C, H, W], possibly memory-mapped.
    labels: int64 [N] in [0, num_classes), or None (then num_classes is 0).
    unreadable: names of images that were skipped.
    outside: bool [N], True where an image may be held out or serve as reference but must not train; None: any may.
    names: what to call each image; empty: its row.
    originals: how many images came in which mode and size ("RGB 512x384"), where they were brought to one.
    captions: of each image, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    num_classes: int
    kind: Kind
    unreadable: tuple[str, ...] = ()
    outside: np.ndarray | None = None
    names: Sequence[str] = ()
    originals: Mapping[str, int] = field(default_factory=dict)
    captions: Captions | None = None


def resize(images: np.ndarray, side: int) -> np.ndarray:
    """Square uint8 [N, C, H, W] -> [N, C, side, side]: the mean over the area when shrinking, bicubic when growing."""
    n, c, height, _ = images.shape
    if side == height:
        return images
    method = Image.Resampling.BOX if side < height else Image.Resampling.BICUBIC
    planes = images.reshape(n * c, *images.shape[2:])
    resized = [np.asarray(Image.fromarray(plane).resize((side, side), method)) for plane in planes]
    return np.stack(resized).reshape(n, c, side, side)


def recolour(images: np.ndarray, channels: Literal["auto", "grey", "rgb"]) -> np.ndarray:
    """uint8 [N, 1 or 3, H, W] -> one channel for 'grey' (ITU-R 601 luma), three for 'rgb', unchanged for 'auto'."""
    if channels == "grey" and images.shape[1] == 3:
        luma = np.tensordot(images, np.array([0.299, 0.587, 0.114]), axes=(1, 0))
        return np.rint(luma).astype(np.uint8)[:, None]
    if channels == "rgb" and images.shape[1] == 1:
        return images.repeat(3, axis=1)
    return images
