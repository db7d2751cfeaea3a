"""SampleStore: a dataset whose images are fetched by sample ID.

An ID is the row of an image in one fixed order. Server and clients agree on that order by comparing `fingerprint`,
so that a round's order can name samples by number alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ret_fl.data.images import Captions

_CHUNK = 4096
"""Rows hashed at a time, so that a memory-mapped dataset is never read into memory at once."""


class Samples(Protocol):
    """What training asks of a dataset, wherever it is."""

    def fetch(self, ids: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """As `SampleStore.fetch`."""


class SampleStore:
    """Images uint8 [N, C, H, W] and, optionally, their classes int64 [N].

    Args:
        images: uint8 [N, C, H, W], or grey [N, H, W]. A torch tensor or a numpy array; a `np.memmap` stays on disk
            (open it with mode "c": torch wants writable memory, and copy-on-write never touches the file).
        labels: int64 [N] in [0, num_classes), or None for images without classes.
        num_classes: how many classes there are; 0 if and only if there are no labels.
        captions: those of each image, for text-to-image, or None.

    Raises:
        TypeError: images are not uint8 or labels are not integers.
        ValueError: shapes or label values do not fit together.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | None = None,
        num_classes: int = 0,
        captions: Captions | None = None,
    ) -> None:
        self._images = _checked_images(images)
        if captions is not None and len(captions) != len(self._images):
            raise ValueError(f"{len(captions)} captions for {len(self._images)} images")
        self._captions = captions
        self._labels = _checked_labels(labels, len(self._images), num_classes)
        self._rows: Tensor | None = None  # row of each sample in _images; None: all rows, in order
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._images) if self._rows is None else len(self._rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, c, h, w = self._images.shape
        return c, h, w

    @property
    def labels(self) -> Tensor | None:
        """int64 [N] on the CPU, or None."""
        if self._labels is None or self._rows is None:
            return self._labels
        return self._labels[self._rows]

    @cached_property
    def captions(self) -> Captions | None:
        """Of each sample, one at least; or None."""
        if self._captions is None or self._rows is None:
            return self._captions
        return tuple(self._captions[row] for row in self._rows.tolist())

    def fetch(self, ids: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """The samples named by `ids` (int64 [B], on the CPU): images float32 [B, C, H, W] in [-1, 1], labels int64 [B].

        Only uint8 crosses to the device; labels are None when the store has none.

        Raises:
            IndexError: an ID is negative or not below the number of samples; the message lists such IDs.
        """
        device = torch.device(device)
        rows = self._resolve(ids)
        images = _move(self._images.index_select(0, rows), device).to(torch.float32).div_(127.5).sub_(1.0)
        if self._labels is None:
            return images, None
        return images, _move(self._labels.index_select(0, rows), device)

    def pixels(self, ids: Tensor | np.ndarray | None = None, out: Tensor | None = None) -> Tensor:
        """Images uint8 [n, C, H, W] on the CPU; all of them without `ids`. They are written to `out`, if given."""
        rows = self._resolve(torch.arange(len(self)) if ids is None else ids)
        return torch.index_select(self._images, 0, rows, out=out)

    def unit(self, ids: Tensor | np.ndarray | None = None) -> Tensor:
        """Images float32 [n, C, H, W] in [0, 1] on the CPU, as the audits take them; all of them without `ids`."""
        return self.pixels(ids).to(torch.float32).div_(255.0)

    def subset(self, ids: Tensor | np.ndarray) -> SampleStore:
        """A store of the named samples, in that order, repeats allowed. It shares the memory of this one."""
        rows = self._resolve(ids)
        part = SampleStore(self._images[:0], None if self._labels is None else self._labels[:0], self.num_classes)
        part._images, part._labels, part._captions, part._rows = self._images, self._labels, self._captions, rows
        return part

    def without_captions(self) -> SampleStore:
        """The same samples, of which nothing is told. It shares the memory of this one."""
        part = self.subset(torch.arange(len(self)))
        part._captions = None
        return part

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape, number of classes, labels, captions and every image, in order."""
        digest = hashlib.sha256(repr((len(self), *self.image_shape, self.num_classes)).encode())
        if (labels := self.labels) is not None:
            digest.update(labels.numpy().astype("<i8").tobytes())
        if self.captions is not None:
            digest.update(json.dumps(self.captions).encode())
        for chunk in self._chunks():
            digest.update(chunk.tobytes())
        return digest.hexdigest()

    @cached_property
    def content_hashes(self) -> np.ndarray:
        """uint64 [N]: a 64-bit hash of each image's pixels; exact duplicates, and only they, share one."""
        hashes = [hashlib.blake2b(image.data, digest_size=8).digest() for chunk in self._chunks() for image in chunk]
        return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)

    def _chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _CHUNK):
            stop = min(start + _CHUNK, len(self))
            chunk = self._images[start:stop] if self._rows is None else self._images[self._rows[start:stop]]
            yield np.ascontiguousarray(chunk.numpy())

    def _resolve(self, ids: Tensor | np.ndarray) -> Tensor:
        """IDs of this store -> rows of `_images`. The IDs are on the CPU, so checking them waits for no GPU."""
        ids = torch.as_tensor(ids).to(torch.int64)
        if len(ids):
            lowest, highest = torch.aminmax(ids)
            if lowest < 0 or highest >= len(self):
                bad = ids[(ids < 0) | (ids >= len(self))].unique().tolist()
                shown = ", ".join(map(str, bad[:10])) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
                raise IndexError(f"unknown sample IDs {shown}: this store holds 0 to {len(self) - 1}")
        return ids if self._rows is None else self._rows[ids]


def _move(batch: Tensor, device: torch.device) -> Tensor:
    """To `device`; from pinned memory to a CUDA device, so that the copy overlaps with computing."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def _checked_images(images: Tensor | np.ndarray) -> Tensor:
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(images if images.flags.writeable else images.copy())
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 (got {images.dtype}): scale them to 0..255 first")
    assert isinstance(images, Tensor)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W] or grey [N, H, W] (got shape {tuple(images.shape)})")
    return images


def _checked_labels(labels: Tensor | np.ndarray | None, count: int, num_classes: int) -> Tensor | None:
    if labels is None:
        if num_classes:
            raise ValueError(f"num_classes is {num_classes} but there are no labels")
        return None
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers (got {labels.dtype})")
    if labels.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one an image (got {tuple(labels.shape)})")
    labels = labels.to(torch.int64)
    if num_classes < 1 or (count and (labels.min() < 0 or labels.max() >= num_classes)):
        raise ValueError(f"labels must lie in 0..num_classes-1 (num_classes is {num_classes})")
    return labels
