"""Files that are whole or not there."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def user_cache(name: str) -> Path:
    """The folder ret-fl/`name` in the user's cache (XDG_CACHE_HOME, else ~/.cache); it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ret-fl" / name


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that readers see the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)


def as_line(entry: Mapping[str, Any]) -> str:
    """A line of a .jsonl file, line break and all. What JSON has no number for, NaN and infinities, is null."""
    return json.dumps(_told(entry), allow_nan=False) + "\n"


def _told(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _told(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_told(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry to a .jsonl file, on a line of its own also where a full disk or power cut has torn the last."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(as_line(entry).encode())


def read_lines(path: Path, *, skip_torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that a run is writing, without a half-written last line; none without the file.

    skip_torn: leave out lines that are no objects, as `append_line` leaves them, and say so in the log (level DEBUG:
    who watches a run reads them again and again). Else raises ValueError.
    """
    if not path.is_file():
        return []
    if not skip_torn:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        entry = _parsed(line)
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            log.debug("%s: line %d is torn", path, number)
    return entries


def _parsed(line: str) -> object:
    """What a line says, None if it is no JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None
