"""Features that tell copies from images that are merely alike, without any network: whitened principal components.

Nearby pixels of any image agree, so raw pixels make all images similar. Components of real images that were not trained
on, each scaled to variance 1, leave what an image has of its own: two digits drawn by different hands are then far
apart, an image and its copy are not.
"""

from __future__ import annotations

import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from ret_fl.audit.classifier import unit_images
from ret_fl.audit.distances import Images, one_thread_operations

VARIANCE = 0.99
"""Share of the variance that the components hold; what is left is noise, which whitening would blow up."""
FEWEST = 100
MOST = 4000
"""Images that components are made of."""
SIDE = 32
"""Larger images are made smaller: components of more pixels cost minutes."""
BATCH = 256
"""Images held as floats at a time: they may be large."""


class WhitenedPixels:
    """Whitened principal components of real images [M, C, H, W], float in [0, 1] or uint8.

    Raises `ValueError` for fewer than `FEWEST`, or images that are all the same.
    """

    name = "whitened pixels"

    def __init__(self, images: Images) -> None:
        values = torch.as_tensor(images)
        if len(values) < FEWEST:
            raise ValueError(f"whitening needs {FEWEST} images at least, got {len(values)}")
        rows = _rows(values)
        if not rows.std(0).any():
            raise ValueError("whitening needs images that differ")
        with one_thread_operations():
            self._components = PCA(VARIANCE, whiten=True, svd_solver="full").fit(rows.numpy())

    def features(self, images: Images) -> Tensor:
        """float32 [N, F], on the CPU, of images [N, C, H, W] as above."""
        parts = torch.as_tensor(images).split(BATCH)
        return torch.cat([torch.from_numpy(self._components.transform(_rows(p).numpy())).float() for p in parts])


def _rows(images: Tensor) -> Tensor:
    """float32 [N, C * h * w] in [0, 1], sides at most `SIDE`."""
    return torch.cat([_small_rows(part) for part in images.split(BATCH)])


def _small_rows(images: Tensor) -> Tensor:
    unit = unit_images(images).cpu()
    if max(unit.shape[2:]) > SIDE:
        scale = SIDE / max(unit.shape[2:])
        unit = F.interpolate(unit, [max(1, round(scale * s)) for s in unit.shape[2:]], mode="bilinear", antialias=True)
    return unit.flatten(1)
