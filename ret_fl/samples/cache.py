"""Samples a client has fetched, on its disk, up to a size limit.

A segment is a .npy file of records (records.py), written under another name, flushed to disk and then renamed; it
never changes and is only ever dropped. So two processes may share a cache: whoever has a segment open keeps its content
even if the other drops it. Every record is hashed when an order opens it and compared with the order's hash: a damaged
one is fetched again.
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
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray

from ret_fl.config import ConfigError
from ret_fl.samples.records import Description, Hashes, Records, hash_records

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20
"""What is fetched becomes a segment whenever so many bytes are there: a client that is killed loses little more."""
_HEADER = 256  # of a .npy file, at most
_STALE_SECONDS = 3600  # a half-written file that old belongs to a process that is gone
_CHUNK = 4096


class CacheFullError(ConfigError):
    """The samples of one order do not fit into the cache."""


@dataclass(frozen=True)
class Segment:
    """Records of one file, and which of them are samples of the order in hand, sound ones only.

    rows, ids: int64 [m], where in `records` and which.
    """

    path: Path
    records: Records
    rows: NDArray[np.int64]
    ids: NDArray[np.int64]

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
            rows = np.flatnonzero(_sound(records, ids, hashes, wanted))
            if len(rows):
                with suppress(FileNotFoundError):
                    os.utime(path)  # the least recently used go first
                found.append(Segment(path, records, rows, records["id"][rows]))
        return found

    def make_room(self, segments: list[Segment], missing: int, record_bytes: int) -> list[Segment]:
        """Drop what the order in hand does not need until its `missing` samples fit; those of its segments that remain.

        Where they do not fit beside its segments, the segments with the fewest of its samples go, too: these samples
        are then missing again. Raises `CacheFullError` if the order alone exceeds the limit.
        """
        with self._locked():
            kept = sorted(segments, key=lambda segment: len(segment.rows) / len(segment.records))
            size = _file_bytes(missing, record_bytes) + sum(segment.size for segment in kept)
            while size > self._limit and kept:
                sparsest = kept.pop(0)
                missing += len(sparsest.rows)
                size = _file_bytes(missing, record_bytes) + sum(segment.size for segment in kept)
            if size > self._limit:
                raise CacheFullError(
                    f"the samples of one order take {size / 1e6:.1f} MB, the cache may hold {self._limit / 1e6:.1f}: "
                    "raise service.cache-mb (on a node: sample-cache-mb), or make shards smaller"
                )
            self._drop_others({segment.path for segment in kept}, self._limit - size)
        return kept

    def begin(self, known: Description) -> SegmentWriter:
        """A new segment. Raises `OSError` if it cannot be written."""
        return SegmentWriter(self._folder / f"{_prefix(known.fingerprint)}-{uuid.uuid4().hex}.npy", known.record)

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


class SegmentWriter:
    """A segment in the making: it is `path` once it is finished, and a file of another name before.

    Its methods raise `OSError` where the disk is full; nothing remains of it then.
    """

    def __init__(self, path: Path, record: np.dtype[np.void]) -> None:
        self._path, self._temporary, self._record = path, path.with_suffix(".tmp"), record
        self._ids: list[NDArray[np.int64]] = []
        self._file = self._temporary.open("wb")
        self._write_header(0)

    def append(self, records: Records) -> None:
        with self._nothing_left_of_a_failure():
            self._file.write(records.view(np.uint8).data)
            self._ids.append(records["id"].copy())

    def finish(self) -> Segment:
        """Flush it to disk, then name it."""
        ids = np.concatenate(self._ids)
        with self._nothing_left_of_a_failure():
            with self._file:
                self._file.seek(0)
                self._write_header(len(ids))
                self._file.flush()
                os.fsync(self._file.fileno())
            # opened before it has its name: another process may drop it as soon as it has one
            records = _open(self._temporary, self._record)
            self._temporary.replace(self._path)
        return Segment(self._path, records, np.arange(len(ids)), ids)

    def _write_header(self, count: int) -> None:
        """As long for one count as for another: numpy leaves room in it for arrays that grow."""
        told = {"descr": dtype_to_descr(self._record), "fortran_order": False, "shape": (count,)}
        write_array_header_1_0(self._file, told)

    @contextmanager
    def _nothing_left_of_a_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            with suppress(OSError):  # it would write what is left in its buffer
                self._file.close()
            raise


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
