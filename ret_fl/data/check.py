"""What a dataset holds, and what is wrong with it: counts, sizes, unreadable images, exact and near duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ret_fl.config import DataConfig
from ret_fl.data.clusters import find_clusters, near_threshold
from ret_fl.data.images import Captions, ImageSet
from ret_fl.data.near import NEAR_BITS, require_imagehash
from ret_fl.data.sources import DataSplits, load_images, load_splits
from ret_fl.data.store import SampleStore

Groups = list[NDArray[np.int64]]
"""Rows that belong together, each group ascending, groups by their first row."""


@dataclass(frozen=True)
class Told:
    """Captions of a dataset: how many, how many of its images have more than one, how many texts are distinct."""

    captions: int
    several: int
    distinct: int

    @classmethod
    def of(cls, captions: Captions) -> Told:
        texts = [text for own in captions for text in own]
        return cls(len(texts), sum(len(own) > 1 for own in captions), len(set(texts)))


@dataclass(frozen=True)
class DataCheck:
    """A dataset, looked at.

    counts: images by split ('train', 'held-out', 'reference'); classes: the same a class, int64 [classes] each.
    image_shape: (C, H, W) that training sees. originals: how many came in which mode and size.
    exact, near: groups of equal, and of distinct but alike images, rows of the whole set; near is None where none
    were looked for. crossing: groups of `near` with images on both sides of training and the rest.
    dropped: images that must not train and equal one that does; they are on neither side. looked: how near-duplicates
    were looked for, in words.
    fingerprint: of the training set, by which server and clients agree on it. untold: the same of images alone, where
    it is not known whether a run reads their captions; else ''.
    told: the captions that were read, or None. missing: why there should be some, where there are none; else ''.
    """

    counts: Mapping[str, int]
    classes: Mapping[str, NDArray[np.int64]]
    image_shape: tuple[int, int, int]
    originals: Mapping[str, int]
    unreadable: Sequence[str]
    exact: Groups
    near: Groups | None
    looked: str
    crossing: int
    dropped: int
    fingerprint: str
    untold: str
    told: Told | None
    missing: str
    names: Sequence[str] = field(repr=False)

    def name(self, row: int) -> str:
        return self.names[row] if self.names else f"image {row}"

    def problems(self) -> list[str]:
        """What a user should know before training, one line each."""
        found = [self.missing] if self.missing else []
        if self.unreadable:
            found.append(f"unreadable and left out: {len(self.unreadable):,}")
        if self.exact:
            found.append(
                f"exact duplicates: {sum(map(len, self.exact)):,} images that show {len(self.exact):,} different ones"
            )
        if self.dropped:
            found.append(f"{self.dropped:,} held-out images equal a training image, and are left out")
        if self.near:
            across = f", {self.crossing:,} of them across training and held-out images" if self.crossing else ""
            found.append(
                f"near-duplicates by {self.looked}: {sum(map(len, self.near)):,} in {len(self.near):,} groups{across}"
            )
        return found


def check_data(config: DataConfig, near: int | None = NEAR_BITS, text: bool | None = False) -> DataCheck:
    """Read a dataset as a run would, and look at all of it.

    Args:
        config: without names of captions (`ret_fl.diffusion.text_to_image.data_read`) where a run would read none.
        near: bits in which perceptual hashes of near-duplicates differ at most, unless data.near-duplicates says how
            they are found; None does not look for them.
        text: whether the run would train text-to-image, and needs captions; None: it is not known.

    Raises:
        ConfigError: it cannot be read or split, or near-duplicates are asked for and imagehash is not installed.
    """
    by = _how_near(config, near)
    if by and by.near_duplicates == "phash":
        require_imagehash()  # before minutes of reading
    found, splits = load_images(config), load_splits(config)
    everything = SampleStore(found.images, found.labels, found.num_classes)
    whole = everything.content_hashes
    stores = {"train": splits.train, "held-out": splits.held_out, "reference": splits.reference}
    present = {name: store for name, store in stores.items() if store is not None}
    alike = near_duplicates(find_clusters(everything, by), whole) if by else None
    trained = np.isin(whole, splits.train.content_hashes)
    return DataCheck(
        counts={name: len(store) for name, store in present.items()},
        classes={name: _class_counts(store) for name, store in present.items() if found.labels is not None},
        image_shape=splits.train.image_shape,
        originals=_originals(found),
        unreadable=splits.unreadable,
        exact=groups_of_equal(whole),
        near=alike,
        looked=_in_words(by),
        crossing=sum(0 < trained[rows].sum() < len(rows) for rows in alike or []),
        dropped=_dropped(found, splits, whole),
        fingerprint=splits.train.fingerprint,
        untold=splits.train.without_captions().fingerprint if text is None and found.captions else "",
        told=Told.of(found.captions) if found.captions else None,
        missing=_missing(text) if found.captions is None else "",
        names=found.names,
    )


def _missing(text: bool | None) -> str:
    """What to say of data without captions."""
    remedy = "put captions.json into the image folder (data.captions), or name the column of data.source=hf in "
    remedy += "data.caption-column"
    if text is None:
        return f"no captions: a run needs them if model.init-from, which is no folder here, draws from text: {remedy}"
    return f"no captions, and a run needs them, as model.init-from draws from text: {remedy}" if text else ""


def _how_near(config: DataConfig, bits: int | None) -> DataConfig | None:
    """Settings by which near-duplicates are looked for; None: not at all."""
    if bits is None:
        return None
    if config.near_duplicates != "off":
        return config
    # below 1 is for hashes that are equal: 0 would be the default
    return config.model_copy(update={"near_duplicates": "phash", "near_threshold": bits or 0.5})


def _in_words(by: DataConfig | None) -> str:
    if by is None:
        return ""
    if by.near_duplicates == "phash":
        return f"perceptual hash, at most {int(near_threshold(by))} bits apart"
    return f"cosine of {by.near_features or 'pixels'} above {near_threshold(by):g}"


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


def near_duplicates(cluster: NDArray[np.int64], contents: NDArray[np.uint64]) -> Groups:
    """Groups of images of one cluster (int64 [N]) that are not all exact copies (contents: uint64 [N])."""
    return [rows for rows in groups_of_equal(cluster) if len(np.unique(contents[rows])) > 1]
