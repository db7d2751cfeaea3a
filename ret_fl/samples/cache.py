"""Samples a client has fetched, on its disk, up to a size limit.

A segment is a .npy file of records (records.py), written whole under another name and then renamed; it never changes
and is only ever dropped. So two processes may share a cache: whoever has a segment open keeps its content even if the
other drops it. Every record is hashed when an order opens it and compared with the order's hash: a damaged one is
fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ret_fl.config import ConfigError
from ret_fl.samples.records import Description, Hashes, Records, hash_records

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20
"""What is fetched becomes a segment whenever so many bytes are there: a broken fetch loses no more than that."""
_HEADER = 256  # of a .npy file, at most
_STALE_SECONDS = 3600  # a half-written file that old belongs to a process that is gone
_CHUNK = 4096


class CacheFullError(ConfigError):
    """The samples of one order do not fit into the cache."""


@dataclass(frozen=True)
class Segment:
    """Records of one file, and which of them hold samples of the order in hand, sound ones only: bool [n]."""

    path: Path
    records: Records
    sound: NDArray[np.bool_]

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


class SegmentCache:
    """The segments of all datasets below `folder`, together at most `limit` bytes.

    Raises `ConfigError` if the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the cache {folder}: {error}; set data.cache-dir") from error

    def find(self, known: Description, ids: NDArray[np.int64], hashes: Hashes) -> list[Segment]:
        """The segments that hold some of the samples `ids` (sorted, distinct) with these hashes, each sample once.

        Damaged files are dropped.
        """
        found: list[Segment] = []
        wanted = np.ones(len(ids), bool)
        for path in sorted(self._folder.glob(f"{_prefix(known.fingerprint)}-*.npy")):
            try:
                records = _open(path, known.record)
            except FileNotFoundError:  # dropped by another process since the listing
                continue
            except (OSError, ValueError, EOFError) as error:
                logger.warning("dropped the damaged cache file %s: %s", path.name, error)
                path.unlink(missing_ok=True)
                continue
            sound = _sound(records, ids, hashes, wanted)
            if sound.any():
                with suppress(FileNotFoundError):
                    os.utime(path)  # the least recently used go first
                found.append(Segment(path, records, sound))
        return found

    def make_room(self, segments: list[Segment], missing: int, record_bytes: int) -> list[Segment]:
        """Drop what the order in hand does not need until its `missing` samples fit; those of its segments that remain.

        Where they do not fit beside its segments, the segments with the fewest of its samples go, too: these samples
        are then missing again. Raises `CacheFullError` if the order alone exceeds the limit.
        """
        with self._locked():
            kept = sorted(segments, key=lambda segment: float(segment.sound.mean()))
            size = _file_bytes(missing, record_bytes) + sum(segment.size for segment in kept)
            while size > self._limit and kept:
                sparsest = kept.pop(0)
                missing += int(sparsest.sound.sum())
                size = _file_bytes(missing, record_bytes) + sum(segment.size for segment in kept)
            if size > self._limit:
                raise CacheFullError(
                    f"the samples of one order take {size / 1e6:.1f} MB, the cache may hold {self._limit / 1e6:.1f}: "
                    "raise service.cache-mb (on a node: sample-cache-mb), or make shards smaller"
                )
            self._drop_others({segment.path for segment in kept}, self._limit - size)
        return kept

    def add(self, known: Description, records: Records) -> Segment:
        """Write records as a segment. Raises `OSError` if the disk is full."""
        name = f"{_prefix(known.fingerprint)}-{uuid.uuid4().hex}"
        temporary, path = self._folder / f"{name}.tmp", self._folder / f"{name}.npy"
        try:
            with temporary.open("wb") as file:
                np.save(file, records, allow_pickle=False)
            # opened before it has its name: another process may drop it as soon as it has one
            written = _open(temporary, known.record)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return Segment(path, written, np.ones(len(records), bool))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _drop_others(self, kept: set[Path], room: int) -> None:
        """Drop segments that are not in `kept`, the least recently used first, until they take at most `room` bytes."""
        others = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".tmp" and time.time() - stat.st_mtime > _STALE_SECONDS:
                    path.unlink()
                elif path.suffix == ".npy" and path not in kept:
                    others.append((stat.st_mtime_ns, stat.st_size, path))
        taken = sum(size for _, size, _ in others)
        for _, size, path in sorted(others):
            if taken <= room:
                return
            path.unlink(missing_ok=True)
            taken -= size


def _file_bytes(samples: int, record_bytes: int) -> int:
    """What new segments of so many samples take on disk, at most."""
    return samples * record_bytes + (samples * record_bytes // SEGMENT_BYTES + 1) * _HEADER if samples else 0


def _prefix(fingerprint: str) -> str:
    """What files of a dataset are called: hashed, since a fingerprint from the wire must not become a path."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


def _open(path: Path, record: np.dtype[np.void]) -> Records:
    records = np.load(path, mmap_mode="r", allow_pickle=False)
    if records.dtype != record or records.ndim != 1:
        raise ValueError(f"it holds {records.dtype} {records.shape}")
    return records


def _sound(records: Records, ids: NDArray[np.int64], hashes: Hashes, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which records are samples still wanted, and undamaged: bool [n]. They are then wanted no longer."""
    sound = np.zeros(len(records), bool)
    own = records["id"]
    place = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
    candidates = np.flatnonzero((ids[place] == own) & wanted[place])
    for start in range(0, len(candidates), _CHUNK):
        rows = candidates[start : start + _CHUNK]
        same = (hash_records(records[rows]) == hashes[place[rows]]).all(axis=1)
        for row in rows[same]:  # one by one: a file may hold a sample twice
            if wanted[place[row]]:
                sound[row], wanted[place[row]] = True, False
    return sound
