"""Encodings of samples on disk: computed once by row, memory-mapped, shared by rounds, shards, runs and processes.

A file holds one record a row: a checksum, and float32 values. A row is there if its checksum fits, so one that was
never written, half written or damaged is computed anew. The file is sparse: rows take disk when they are written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ret_fl.config import ConfigError

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Rows encoded together: all of a VAE's activations are in memory."""
_WRITTEN = 1 << 32  # keeps the checksum of a written row from being 0, which is what an unwritten one has


def encoding_file(folder: Path, contents: object, rows: int, shape: tuple[int, ...]) -> EncodingFile:
    """The file in `folder` for `contents`, which tells what is encoded and by what (JSON-able): another has another.

    Raises `ConfigError` if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the cache {folder}: {error}; set data.cache-dir") from error
    key = hashlib.sha256(json.dumps([1, contents, rows, shape]).encode()).hexdigest()[:32]
    return EncodingFile(folder / f"{key}.rows", rows, shape)


class EncodingFile:
    """Float32 [rows, *shape] at `path`, of which some rows are there."""

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...]) -> None:
        self.path, self.rows = path, rows
        self.record = np.dtype([("check", "<u8"), ("values", "<f4", shape)])
        with self._locked():
            if not path.is_file() or path.stat().st_size != rows * self.record.itemsize:
                self._create()
        self._records = np.memmap(path, self.record, mode="r", shape=(rows,))
        self._sound = np.zeros(rows, bool)

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of these rows are not there, or damaged, each once, ascending."""
        doubtful = np.unique(rows[~self._sound[rows]])
        for row in doubtful:
            record = self._records[row]
            self._sound[row] = record["check"] == _checksum(record["values"])
        return doubtful[~self._sound[doubtful]]

    def fill(self, rows: NDArray[np.int64], encode: Callable[[NDArray[np.int64]], Tensor]) -> None:
        """Write the rows that are missing. encode: int64 [n] rows -> float32 [n, *shape].

        One process at a time: another that wants the same waits and finds them there. Raises `ConfigError` where the
        disk is full.
        """
        if not len(self.missing(rows)):
            return
        with self._locked():
            lacking = self.missing(rows)
            if not len(lacking):
                return
            logger.info("encoding %d samples into %s", len(lacking), self.path)
            for start in range(0, len(lacking), AT_ONCE):
                part = lacking[start : start + AT_ONCE]
                self._write(part, encode(part))

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """float32 [n, *shape] on the CPU, of rows that are there."""
        return torch.from_numpy(self._records["values"][rows])

    def _write(self, rows: NDArray[np.int64], values: Tensor) -> None:
        records = np.empty(len(rows), self.record)
        records["values"] = values.float().cpu().numpy()
        records["check"] = [_checksum(row) for row in records["values"]]
        try:
            # not through the mapping: there a full disk is a signal that kills the process
            with self.path.open("r+b") as file:
                for row, record in zip(rows, records, strict=True):
                    file.seek(int(row) * self.record.itemsize)
                    file.write(record.tobytes())
        except OSError as error:
            size = self.rows * self.record.itemsize / 1e9
            raise ConfigError(
                f"encodings cannot be written to {self.path}: {error}. All rows take {size:.1f} GB: make room, set "
                "data.cache-dir to another disk, or text.cache=false"
            ) from error
        self._sound[rows] = True

    def _create(self) -> None:
        temporary = self.path.with_name(f"{uuid.uuid4().hex}.tmp")
        with temporary.open("wb") as file:
            file.truncate(self.rows * self.record.itemsize)
        temporary.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process that writes this file; the lock goes with the process, however it ends."""
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _checksum(values: NDArray[np.float32]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data) + _WRITTEN
