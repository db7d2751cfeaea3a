"""From settings to data: read a source, split it into train, held-out and reference, and plant canaries.

The three sets share no image content, so that a copy of a training image is never mistaken for a fresh one: all exact
duplicates of an image stay on one side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ret_fl.config import ConfigError, DataConfig, RunConfig
from ret_fl.data.builtin import load_builtin
from ret_fl.data.cifar import load_cifar
from ret_fl.data.clusters import Clusters, find_clusters
from ret_fl.data.folder import load_folder
from ret_fl.data.hf import load_hf
from ret_fl.data.images import ImageSet, Kind
from ret_fl.data.mirror import is_url, mirrored
from ret_fl.data.partition import interleave, partition
from ret_fl.data.store import SampleStore
from ret_fl.devices import resolve_device


@dataclass(frozen=True)
class DataSplits:
    """The data of a run.

    train: what is dealt to the shards; the extra copies of canaries come last.
    held_out: kept from training, to measure quality against; may be empty.
    reference: distinct images, as many as distinct training images, to calibrate the copy rate; None if turned off.
    canaries: int64 [n, repeats], row i holds the IDs in `train` of every copy of canary i, the original first.
    kind: what augmentation may do to the images.
    unreadable: names of the images that were skipped.
    """

    train: SampleStore
    held_out: SampleStore
    reference: SampleStore | None
    canaries: np.ndarray
    kind: Kind
    unreadable: tuple[str, ...]

    def describe(self) -> str:
        """The sizes in one line, for people."""
        train, (channels, height, width) = self.train, self.train.image_shape
        distinct = len(np.unique(train.content_hashes))
        parts = [f"{len(train):,} training images of {channels}x{height}x{width}"]
        canaries, repeats = self.canaries.shape
        if distinct < len(train):
            parts[0] += f" ({distinct:,} distinct" + (f", {canaries} of them {repeats} times)" if canaries else ")")
        elif canaries and repeats > 1:
            parts[0] += f" ({canaries} of them {repeats} times, with noise)"
        parts += [f"{len(self.held_out):,} held out"]
        if self.reference is not None:
            parts += [f"{len(self.reference):,} for reference"]
        if self.unreadable:
            parts += [f"{len(self.unreadable):,} unreadable and skipped"]
        return ", ".join(parts)


@lru_cache(maxsize=4)
def load_splits(config: DataConfig) -> DataSplits:
    """The data `config` describes; the same config gives the same data, loaded once a process.

    Raises:
        ConfigError: the source cannot be read, or has too few images for what is asked.
    """
    found = load_images(config)
    store = SampleStore(found.images, found.labels, found.num_classes, found.captions)
    rng = np.random.default_rng(config.seed)
    contents = _Contents(store, found)
    train, reference, held_out = _divide(contents, found.outside, config, rng)
    rows = contents.rows(train)
    if found.outside is not None:
        rows = rows[~found.outside[rows]]  # a test image that equals a training one is on neither side
    canary_rows, canaries = _canaries(contents, train, rows, config, rng)
    train_rows = np.concatenate([rows, canary_rows])
    jittered = config.canary_jitter and len(canary_rows)
    return DataSplits(
        train=_jittered(store, train_rows, len(rows), config, rng) if jittered else store.subset(train_rows),
        held_out=store.subset(contents.rows(held_out)),
        reference=store.subset(contents.first[reference]) if config.reference else None,
        canaries=canaries,
        kind=found.kind,
        unreadable=found.unreadable,
    )


def deal(config: RunConfig, data: DataSplits) -> np.ndarray:
    """The first shard of each training sample, int32 [N], as `partition`. Raises `ConfigError` if they do not fit."""
    train = data.train
    labels = None if train.labels is None else train.labels.numpy()
    drops = config.data.duplicates == "drop"
    needed = drops or config.partition.clusters != "any"
    clusters = find_clusters(train, config.data, resolve_device(config.device)) if needed else None
    owner = partition(len(train), labels, train.num_classes, config.shards, config.partition, config.seed, clusters)
    if drops and clusters is not None:
        _require_visits(owner, clusters, config.shards)
    return owner


def _require_visits(owner: np.ndarray, clusters: Clusters, shards: int) -> None:
    """Refuse a shard whose samples are all dropped: its proxy would have nothing to train on."""
    kept = owner[clusters == np.arange(len(clusters))]
    idle = np.flatnonzero(np.bincount(kept, minlength=shards) == 0)
    if len(idle):
        raise ConfigError(
            f"data.duplicates=drop leaves shards {idle.tolist()} of {shards} nothing to train on: lower shards, set "
            "data.duplicates=weight, or change how the samples are dealt (partition.scheme)"
        )


def load_images(config: DataConfig) -> ImageSet:
    """All images of the source, undivided. Raises `ConfigError` if it cannot be read."""
    config = _on_this_machine(config)
    if config.source == "cifar":
        return load_cifar(config)
    if config.source == "image-folder":
        return load_folder(config)
    if config.source == "hf":
        return load_hf(config)
    return load_builtin(config)


def _on_this_machine(config: DataConfig) -> DataConfig:
    """The same settings, URLs replaced by what mirrors them here."""
    if is_url(config.path):
        config = mirrored(config)
    if is_url(config.held_out_path):
        copy = mirrored(config.model_copy(update={"path": config.held_out_path}))
        config = config.model_copy(update={"held_out_path": copy.path})
    return config


class _Contents:
    """The distinct images of a store: content k is first seen in row first[k] and has label labels[k]."""

    def __init__(self, store: SampleStore, found: ImageSet) -> None:
        _, self.first, inverse = np.unique(store.content_hashes, return_index=True, return_inverse=True)
        by_content = np.argsort(inverse, kind="stable")
        self.copies = np.bincount(inverse)
        self._copies_of = np.split(by_content, np.cumsum(self.copies)[:-1])
        self.labels = None if found.labels is None else found.labels[self.first]

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, contents: np.ndarray) -> np.ndarray:
        """The rows of all copies of the given contents, copies side by side."""
        return np.concatenate([self._copies_of[k] for k in contents] or [np.empty(0, np.int64)])


def _divide(
    contents: _Contents, outside: np.ndarray | None, config: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contents for train, reference and held-out. What neither train nor reference takes is held out."""
    everything = np.arange(len(contents))
    if outside is None:
        inside = order = _spread(everything, contents.labels, rng)[config.skip :]
    else:
        inside = _spread(everything[~outside[contents.first]], contents.labels, rng)[config.skip :]
        order = _spread(everything[outside[contents.first]], contents.labels, rng)
    room = len(order) - round(config.held_out * len(contents))
    if outside is None:
        count = room // 2 if config.reference else room
    else:
        count = min(len(inside), room) if config.reference else len(inside)
    count = min(count, config.limit) if config.limit else count
    if count < 1:
        raise ConfigError(
            f"no image is left to train on: {len(contents)} distinct images, data.skip={config.skip}, "
            f"data.held-out={config.held_out}, data.reference={str(config.reference).lower()}. Lower data.skip or "
            "data.held-out, turn data.reference off, or add images"
        )
    rest = order[count:] if outside is None else order
    references = count if config.reference else 0
    return inside[:count], rest[:references], rest[references:]


def _spread(contents: np.ndarray, labels: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """A random order in which every stretch holds the classes in proportion, so that cutting it stratifies."""
    if labels is None:
        return rng.permutation(contents)
    classes = rng.permutation(np.unique(labels[contents]))
    members = [rng.permutation(contents[labels[contents] == c]) for c in classes]
    turn = interleave(np.array([len(m) for m in members], dtype=np.int64))
    order = np.empty(len(contents), np.int64)
    for c, ids in enumerate(members):
        order[turn == c] = ids
    return order


def _canaries(
    contents: _Contents, train: np.ndarray, rows: np.ndarray, config: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the extra copies to append to the training `rows`, and all IDs of each canary, int64 [n, repeats]."""
    single = train[contents.copies[train] == 1]  # an image with copies of its own would stand more often than asked
    if config.canaries > len(single):
        raise ConfigError(
            f"data.canaries={config.canaries} exceeds the {len(single)} training images that have no duplicate: "
            "lower data.canaries or raise data.limit"
        )
    chosen = contents.first[rng.choice(single, config.canaries, replace=False)]
    originals = np.array([np.flatnonzero(rows == row)[0] for row in chosen], dtype=np.int64)
    extra = config.canary_repeats - 1
    appended = len(rows) + np.arange(config.canaries * extra, dtype=np.int64).reshape(config.canaries, extra)
    return np.repeat(chosen, extra), np.concatenate([originals[:, None], appended], axis=1)


def _jittered(
    store: SampleStore, rows: np.ndarray, originals: int, config: DataConfig, rng: np.random.Generator
) -> SampleStore:
    """The samples of `rows`; those after the first `originals` with noise of data.canary-jitter, each with its own."""
    pixels = store.pixels(rows)
    repeats = pixels[originals:].numpy()
    noisy = np.rint(repeats + rng.normal(0, config.canary_jitter, repeats.shape)).clip(0, 255).astype(np.uint8)
    pixels[originals:] = torch.from_numpy(noisy)
    labels = None if store.labels is None else store.labels[torch.from_numpy(rows)]
    captions = None if store.captions is None else tuple(store.captions[row] for row in rows.tolist())
    return SampleStore(pixels, labels, store.num_classes, captions)
