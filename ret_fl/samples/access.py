"""Where a node gets the samples of its orders: from its own data, or from a sample service through a cache."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ret_fl.config import ConfigError, DataConfig, ServiceConfig
from ret_fl.data.decode import cache_dir
from ret_fl.data.sources import load_splits
from ret_fl.data.store import Samples, SampleStore
from ret_fl.protocol import TrainOrder
from ret_fl.samples.cache import SEGMENT_BYTES, Segment, SegmentCache
from ret_fl.samples.client import SampleClient
from ret_fl.samples.grants import Grant
from ret_fl.samples.records import Description, Hashes

logger = logging.getLogger(__name__)


class SampleAccess(Protocol):
    """What a client asks of the place its samples are in."""

    def describe(self, order: TrainOrder | None = None) -> Description:
        """The dataset there; or what an order says of it, where it says so."""

    def samples(self, order: TrainOrder) -> Samples:
        """The samples that an order names, ready to be trained on."""


class LocalAccess:
    """The node has the dataset itself. Raises `ConfigError` as `load_splits`."""

    def __init__(self, data: DataConfig) -> None:
        self._splits = load_splits(data)

    def describe(self, order: TrainOrder | None = None) -> Description:
        return Description.of(self._splits.train, self._splits.kind)

    def samples(self, order: TrainOrder) -> Samples:
        return self._splits.train


class ServedAccess:
    """The node has no data: what an order names is fetched from a service, unless the cache has it."""

    def __init__(self, service: ServiceConfig, data: DataConfig) -> None:
        self._cache = SegmentCache(cache_dir(data) / "samples", service.cache_mb * 1_000_000)
        self._client = SampleClient(service)

    def describe(self, order: TrainOrder | None = None) -> Description:
        """With an order nothing is asked of the service: the server's word counts, not the service's.

        Raises:
            ConfigError: the server signs no orders.
            SampleServiceError: the service is away.
        """
        if order is None:
            return self._client.describe()
        if not order.signature:
            raise ConfigError(
                "the order is not signed, so no sample service will serve it: set service.signing-key on the server"
            )
        return Description.from_json(order.description)

    def samples(self, order: TrainOrder) -> Samples:
        """Fetch what the cache lacks.

        Raises:
            ConfigError: the server signs no orders, or the cache cannot hold this one.
            SampleServiceError: the service is away, refuses, or sends other samples than the server has.
        """
        known = self.describe(order)
        ids, first = np.unique(order.ids, return_index=True)
        hashes = order.hashes[first]
        record_bytes = known.record.itemsize
        held = self._cache.find(known, ids, hashes)
        missing = len(ids) - sum(len(segment.ids) for segment in held)
        segments = self._cache.make_room(held, missing, record_bytes)
        lacks = ~np.isin(ids, np.concatenate([segment.ids for segment in segments] or [ids[:0]]))
        if lacks.any():
            segments += self._fetch(known, order, ids[lacks], hashes[lacks])
            self._cache.make_room(segments, 0, record_bytes)  # another process may have filled the room meanwhile
        return ServedSamples(known, segments)

    def _fetch(self, known: Description, order: TrainOrder, ids: NDArray[np.int64], hashes: Hashes) -> list[Segment]:
        """Fetch samples into new segments; what has come stays in the cache even if the rest never does.

        A thread writes what is fetched, and is at most a segment behind.
        """
        grant = Grant.of(order).to_bytes()
        segments: list[Future[Segment]] = []
        appended: deque[Future[None]] = deque()
        writer, size = None, 0
        with ThreadPoolExecutor(1, thread_name_prefix="sample-cache") as disk:
            try:
                for records in self._client.fetch(known, grant, order.signature, ids, hashes):
                    writer = writer or self._cache.begin(known)
                    appended.append(disk.submit(writer.append, records))
                    while len(appended) > SEGMENT_BYTES // records.nbytes:
                        appended.popleft().result()
                    size += records.nbytes
                    if size >= SEGMENT_BYTES:
                        segments.append(disk.submit(writer.finish))
                        writer, size = None, 0
            except BaseException:  # of which the caller hears, and not of a disk that fails as well
                _log_failures([*appended, *segments, *([disk.submit(writer.finish)] if writer else [])])
                raise
            if writer:
                segments.append(disk.submit(writer.finish))
        for part in appended:
            part.result()
        return [segment.result() for segment in segments]


def _log_failures(writes: list[Future[Any]]) -> None:
    for write in writes:
        if error := write.exception():
            logger.warning("samples that had come before the fetch failed could not be kept: %s", error)


class ServedSamples:
    """The samples of one order, spread over segments on disk."""

    def __init__(self, known: Description, segments: list[Segment]) -> None:
        self._num_classes = known.num_classes
        self._records = [segment.records for segment in segments]
        rows = [segment.rows for segment in segments]
        ids = np.concatenate([segment.ids for segment in segments])
        order = np.argsort(ids)
        self._ids = ids[order]
        self._segment = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[order]
        self._row = np.concatenate(rows)[order]

    def fetch(self, ids: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """As `SampleStore.fetch`. Raises `IndexError` for IDs that the order does not name."""
        wanted = ids.numpy()
        place = np.searchsorted(self._ids, wanted)
        unknown = (place == len(self._ids)) | (self._ids[np.minimum(place, len(self._ids) - 1)] != wanted)
        if unknown.any():
            raise IndexError(f"sample IDs {wanted[unknown][:10].tolist()} are not in the order")
        found = zip(self._segment[place], self._row[place], strict=True)
        records = np.stack([self._records[segment][row] for segment, row in found])
        labels = records["label"].astype(np.int64) if self._num_classes else None
        batch = SampleStore(np.ascontiguousarray(records["pixels"]), labels, self._num_classes)
        return batch.fetch(torch.arange(len(records)), device)


@lru_cache(maxsize=4)
def open_access(service: ServiceConfig, data: DataConfig) -> SampleAccess:
    """The way these settings name: a service if there is an address, else the node's own data."""
    return ServedAccess(service, data) if service.address else LocalAccess(data)
