"""What a dataset holds, and what is wrong with it: counts, sizes, unreadable images, exact and near duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.images import ImageSet
from ret_fl.data.sources import DataSplits, load_images, load_splits
from ret_fl.data.store import SampleStore

HASH_BITS = 64
NEAR = 4
"""Bits of 64 in which the perceptual hashes of near-duplicates differ at most."""
BLOCK = 1024
"""Hashes compared with all others at a time."""

Groups = list[NDArray[np.int64]]
"""Rows that belong together, each group ascending, groups by their first row."""


@dataclass(frozen=True)
class DataCheck:
    """A dataset, looked at.

    counts: images by split ('train', 'held-out', 'reference'); classes: the same a class, int64 [classes] each.
    image_shape: (C, H, W) that training sees. originals: how many came in which mode and size.
    exact, near: groups of equal, and of distinct but alike images, rows of the whole set; near is None where no
    perceptual hash was asked for. crossing: groups of `near` with images on both sides of training and the rest.
    dropped: images that must not train and equal one that does; they are on neither side.
    fingerprint: of the training set, by which server and clients agree on it.
    """

    counts: Mapping[str, int]
    classes: Mapping[str, NDArray[np.int64]]
    image_shape: tuple[int, int, int]
    originals: Mapping[str, int]
    unreadable: Sequence[str]
    exact: Groups
    near: Groups | None
    crossing: int
    dropped: int
    fingerprint: str
    names: Sequence[str] = field(repr=False)

    def name(self, row: int) -> str:
        return self.names[row] if self.names else f"image {row}"

    def problems(self) -> list[str]:
        """What a user should know before training, one line each."""
        found = []
        if self.unreadable:
            found.append(f"{len(self.unreadable):,} unreadable images, left out")
        if self.exact:
            found.append(
                f"{sum(map(len, self.exact)):,} images are exact duplicates, {len(self.exact):,} distinct ones"
            )
        if self.dropped:
            found.append(f"{self.dropped:,} held-out images equal a training image, and are left out")
        if self.near:
            across = f", {self.crossing:,} of them across training and held-out images" if self.crossing else ""
            found.append(f"{sum(map(len, self.near)):,} near-duplicates in {len(self.near):,} groups{across}")
        return found


def check_data(config: DataConfig, near: int | None = NEAR) -> DataCheck:
    """Read a dataset as a run would, and look at all of it.

    Args:
        near: bits in which perceptual hashes of near-duplicates differ at most; None does not look for them.

    Raises:
        ConfigError: it cannot be read or split, or near-duplicates are asked for and imagehash is not installed.
    """
    if near is not None:
        _imagehash()  # before minutes of reading
    found, splits = load_images(config), load_splits(config)
    whole = SampleStore(found.images, found.labels, found.num_classes).content_hashes
    stores = {"train": splits.train, "held-out": splits.held_out, "reference": splits.reference}
    present = {name: store for name, store in stores.items() if store is not None}
    alike = None if near is None else near_duplicates(perceptual_hashes(found.images), whole, near)
    trained = np.isin(whole, splits.train.content_hashes)
    return DataCheck(
        counts={name: len(store) for name, store in present.items()},
        classes={name: _class_counts(store) for name, store in present.items() if found.labels is not None},
        image_shape=splits.train.image_shape,
        originals=_originals(found),
        unreadable=splits.unreadable,
        exact=groups_of_equal(whole),
        near=alike,
        crossing=sum(0 < trained[rows].sum() < len(rows) for rows in alike or []),
        dropped=_dropped(found, splits, whole),
        fingerprint=splits.train.fingerprint,
        names=found.names,
    )


def _class_counts(store: SampleStore) -> NDArray[np.int64]:
    assert store.labels is not None
    return np.bincount(store.labels.numpy(), minlength=store.num_classes)


def _originals(found: ImageSet) -> Mapping[str, int]:
    if found.originals:
        return found.originals
    count, channels, height, width = found.images.shape
    return {f"{'L' if channels == 1 else 'RGB'} {width}x{height}": count}


def _dropped(found: ImageSet, splits: DataSplits, whole: NDArray[np.uint64]) -> int:
    if found.outside is None:
        return 0
    return int(np.isin(whole[found.outside], splits.train.content_hashes).sum())


def groups_of_equal(values: NDArray) -> Groups:
    """Rows of equal values, where there are two or more."""
    order = np.argsort(values, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
    return sorted((rows for rows in parts if len(rows) > 1), key=lambda rows: rows[0])


def perceptual_hashes(images: np.ndarray) -> NDArray[np.bool_]:
    """pHash (the lowest 8x8 frequencies of the grey image against their median) of uint8 [N, C, H, W]: [N, 64].

    Raises `ConfigError` if imagehash is not installed.
    """
    imagehash = _imagehash()
    planes = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    hashes = [imagehash.phash(Image.fromarray(np.ascontiguousarray(plane))).hash.ravel() for plane in planes]
    return np.array(hashes, dtype=bool).reshape(len(images), HASH_BITS)


def _imagehash() -> ModuleType:
    try:
        import imagehash
    except ImportError:
        raise ConfigError(
            "near-duplicates need imagehash: pip install 'ret-fl[check]', or leave them out with --no-near"
        ) from None
    return imagehash


def near_duplicates(bits: NDArray[np.bool_], contents: NDArray[np.uint64], most: int) -> Groups:
    """Groups of images whose hashes (bool [N, 64]) differ in at most `most` bits, directly or by way of others.

    contents: uint64 [N], equal for exact copies; a group has two different ones at least. Exact: all pairs are
    compared, as one matrix product a block of distinct hashes.
    """
    _, first, inverse = np.unique(np.packbits(bits, axis=1), axis=0, return_index=True, return_inverse=True)
    signs = torch.from_numpy(bits[first]).float() * 2 - 1
    component = np.arange(len(signs))
    for start in range(0, len(signs), BLOCK):
        agreement = signs[start : start + BLOCK] @ signs[start:].T  # 64 less twice the bits that differ
        left, right = (agreement >= HASH_BITS - 2 * most).nonzero().numpy().T + start
        # joined block by block: where most images are alike, all pairs at once would not fit in memory
        nodes = np.concatenate([left, np.arange(len(signs))]), np.concatenate([right, component])
        graph = coo_array((np.ones(len(nodes[0]), bool), nodes), shape=(len(signs), len(signs)))
        component = _first_of_each(connected_components(graph, directed=False)[1])
    own = component[inverse.ravel()]
    return [rows for rows in groups_of_equal(own) if len(np.unique(contents[rows])) > 1]


def _first_of_each(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """The first row of each row's component: int64, an edge from every row to one of its own."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]
