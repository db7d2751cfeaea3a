"""One sample as bytes, the same on the wire, in the cache and under the hash: ID, class, pixels."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ret_fl.data.images import Kind
from ret_fl.data.store import SampleStore
from ret_fl.samples.limits import MAX_CLASSES, MAX_RECORD

Records = NDArray[np.void]
Hashes = NDArray[np.uint8]
"""[n, 16]: the first 128 bits of the SHA-256 of each record."""

HASH_BYTES = 16
NO_CLASS = -1
_CHUNK = 4096


class DescriptionError(ValueError):
    """A description of a dataset that cannot be true."""


@dataclass(frozen=True)
class Description:
    """What a dataset is, without its samples. image_shape is (C, H, W); num_classes is 0 for images without classes."""

    fingerprint: str
    samples: int
    image_shape: tuple[int, int, int]
    num_classes: int
    kind: Kind

    def __post_init__(self) -> None:
        """Raises `DescriptionError`: descriptions come from peers and from files."""
        channels, height, width = self.image_shape
        if not re.fullmatch(r"[0-9a-f]{64}", self.fingerprint):
            raise DescriptionError("the fingerprint is not 64 hex digits")
        if not (channels in (1, 3) and height > 0 and width > 0 and 0 < self.samples < 2**32):
            raise DescriptionError(f"{self.samples} samples of {channels}x{height}x{width} are impossible")
        if channels * height * width > MAX_RECORD:
            raise DescriptionError(f"images of {channels}x{height}x{width} exceed {MAX_RECORD >> 20} MiB each")
        if not 0 <= self.num_classes <= MAX_CLASSES or self.kind not in get_args(Kind):
            raise DescriptionError(f"{self.num_classes} classes or kind {self.kind!r} are impossible")

    @classmethod
    def of(cls, store: SampleStore, kind: Kind) -> Description:
        return cls(store.fingerprint, len(store), store.image_shape, store.num_classes, kind)

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises `DescriptionError`."""
        try:
            stored = json.loads(text)
            return cls(**stored | {"image_shape": tuple(stored["image_shape"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DescriptionError(f"this describes no dataset: {error}") from None

    @property
    def record(self) -> np.dtype[np.void]:
        """One sample: int64 ID, int64 class (-1: none), uint8 pixels [C, H, W]; little-endian, without gaps."""
        return np.dtype([("id", "<i8"), ("label", "<i8"), ("pixels", "u1", self.image_shape)])


def make_records(
    store: SampleStore, ids: NDArray[np.int64], record: np.dtype[np.void], out: Records | None = None
) -> Records:
    """Records [n] of the samples `ids`, in that order; `record` is the store's `Description.record`.

    out: records of at least that number, whose memory is used.
    """
    records = np.empty(len(ids), record) if out is None else out[: len(ids)]
    records["id"] = ids
    records["label"] = NO_CLASS if store.labels is None else store.labels.numpy()[ids]
    store.pixels(ids, out=torch.from_numpy(records["pixels"]))
    return records


def hash_records(records: Records) -> Hashes:
    """The hash of each record; `records` must lie in one piece in memory."""
    data, size = records.view(np.uint8).data, records.dtype.itemsize
    digests = [hashlib.sha256(data[i : i + size]).digest()[:HASH_BYTES] for i in range(0, len(data), size)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, HASH_BYTES)


def hash_samples(store: SampleStore, description: Description) -> Hashes:
    """The hash of every sample of a store, in the order of their IDs; it reads all of the data once."""

    def chunks() -> Iterator[Hashes]:
        for start in range(0, len(store), _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, len(store)))
            yield hash_records(make_records(store, ids, description.record))

    return np.concatenate(list(chunks()))
