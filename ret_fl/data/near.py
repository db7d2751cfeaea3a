"""Near-duplicates: images that are alike by perceptual hash or by the cosine of their features, and what they join.

Exact single linkage: all pairs are compared, as matrix products of blocks, and clusters are the connected components
of the pairs that are alike. So a chain of images, each like the next, is one cluster.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ret_fl.config import ConfigError

HASH_BITS = 64
NEAR_BITS = 4
"""Bits of 64 in which the perceptual hashes of near-duplicates differ at most."""
NEAR_COSINE = 0.98
"""Least cosine of near-duplicates' features (docs/duplicates.md has what this finds on the built-in data)."""
SIDE = 16
"""Larger images are brought to this many pixels a side before their pixels are compared."""
BLOCK, COLUMNS = 1024, 8192
"""Images compared at a time: so many with so many."""


def perceptual_hashes(images: np.ndarray) -> NDArray[np.bool_]:
    """pHash (the lowest 8x8 frequencies of the grey image against their median) of uint8 [N, C, H, W]: [N, 64].

    Raises `ConfigError` if imagehash is not installed.
    """
    imagehash = require_imagehash()
    planes = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    hashes = [imagehash.phash(Image.fromarray(np.ascontiguousarray(plane))).hash.ravel() for plane in planes]
    return np.array(hashes, dtype=bool).reshape(len(images), HASH_BITS)


def require_imagehash() -> ModuleType:
    """The library of perceptual hashes. Raises `ConfigError` if it is not installed."""
    try:
        import imagehash
    except ImportError:
        raise ConfigError(
            "near-duplicates by perceptual hash need imagehash: pip install 'ret-fl[check]', set "
            "data.near-duplicates=cosine, or leave them out (data check: --no-near)"
        ) from None
    return imagehash


def pixel_features(images: Tensor) -> Tensor:
    """Pixels of uint8 [n, C, H, W], at most 16x16 of them (means over areas), less each image's mean: float32 [n, F].

    Their cosine is the correlation of two images: what brightness and contrast change does not count.
    """
    _, _, height, width = images.shape
    side = min(SIDE, height), min(SIDE, width)
    small = torch.nn.functional.adaptive_avg_pool2d(images.to(torch.float32) / 255, side).flatten(1)
    return small - small.mean(1, keepdim=True)


def joined_by_hash(bits: NDArray[np.bool_], most: float) -> NDArray[np.int64]:
    """For each hash (bool [n, 64]) the first row of its cluster: int64 [n]; joined if at most `most` bits differ."""
    _, first, inverse = np.unique(np.packbits(bits, axis=1), axis=0, return_index=True, return_inverse=True)
    signs = torch.from_numpy(bits[first]).float() * 2 - 1
    own = _components(signs, HASH_BITS - 2 * most)[inverse.ravel()]  # the product is 64 less twice the bits that differ
    return first_of_each(own)


def joined_by_cosine(features: Tensor, least: float) -> NDArray[np.int64]:
    """For each row of float32 [n, F] the first row of its cluster: int64 [n]; joined at this cosine or more.

    A row without length (an even image) has cosine 0 with every other.
    """
    return first_of_each(_components(torch.nn.functional.normalize(features, dim=1), least))


def _components(rows: Tensor, least: float) -> NDArray[np.int64]:
    """A number of its connected component for each row, joined where the inner product is at least `least`."""
    component = np.arange(len(rows))
    for start in range(0, len(rows), BLOCK):
        for column in range(start, len(rows), COLUMNS):
            product = rows[start : start + BLOCK] @ rows[column : column + COLUMNS].T
            left, right = (product >= least).nonzero().numpy().T
            different = component[left + start] != component[right + column]
            if not different.any():
                continue
            # joined tile by tile: where most images are alike, all pairs at once would not fit in memory
            left, right = left[different] + start, right[different] + column
            nodes = np.concatenate([left, np.arange(len(rows))]), np.concatenate([right, component])
            graph = coo_array((np.ones(len(nodes[0]), bool), nodes), shape=(len(rows), len(rows)))
            component = first_of_each(connected_components(graph, directed=False)[1])
    return component


def first_of_each(labels: NDArray) -> NDArray[np.int64]:
    """The first row with the same label, for each row of [n]: int64."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)
