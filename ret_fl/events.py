"""What happens in a run as it happens: lines of Flower's log, and events.jsonl in the run's folder for programs.

Every entry says which run (Flower's ID, as in `flwr list`), round, shard and node it is about, so that the logs of many
machines can be brought together by these. `ret-fl status` reads them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from logging import INFO, WARNING, getLevelName
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from ret_fl.files import append_line

JOINED, REFUSED, GONE, BACK = "node joined", "node refused", "node gone", "node back"
SENT, ANSWERED, FAILED, TRAINED = "order sent", "order answered", "order failed", "shard trained"
BEGUN, ROUND, MOVED = "run begun", "round finished", "samples moved"

EVENTS = (JOINED, REFUSED, GONE, BACK, SENT, ANSWERED, FAILED, TRAINED, BEGUN, ROUND, MOVED)

Event = dict[str, Any]

_LINE = re.compile(rf"(?:\x1b\[\d+m)?(?:INFO|WARNING) *(?:\x1b\[0m)? *: +({'|'.join(EVENTS)}): (.*) at=(\S+)")
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')


class Journal:
    """Takes events down. path: events.jsonl, or None to log only; run: Flower's run ID."""

    def __init__(self, path: Path | None = None, run: int = 0) -> None:
        self.path, self.run = path, run

    def note(
        self,
        event: str,
        *,
        round: int | None = None,
        shard: int | None = None,
        node: int | None = None,
        level: int = INFO,
        **more: object,
    ) -> None:
        """One event. `more` must be JSON, but for NaN, which the file has as null; lists go to the file only.

        A file that cannot be written (a full disk) is said in the log, and ends no run.
        """
        where = {k: v for k, v in (("round", round), ("shard", shard), ("node", node)) if v is not None}
        log(level, "%s", as_text(event, {"run": self.run} | where | more))
        if self.path is None:
            return
        entry = {"time": time.time(), "level": getLevelName(level), "event": event, "run": self.run} | where | more
        try:
            append_line(self.path, entry)
        except OSError as error:
            log(WARNING, "%s cannot be written (%s): ret-fl status will lack an event. Make room", self.path, error)


def as_text(event: str, fields: Event) -> str:
    """An event of now in one line of a log: 'order sent: run=7 round=2 shard=0 node=5 at=2026-11-26T07:04:13Z'."""
    told = {key: value for key, value in fields.items() if key != "ids"} | {
        "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    }
    return f"{event}: " + " ".join(f"{key}={_value(value)}" for key, value in told.items())


def was_deployed(events: Sequence[Event]) -> bool:
    """Whether a run was last begun on a deployed federation."""
    begun = [event for event in events if event["event"] == BEGUN]
    return bool(begun) and bool(begun[-1]["deployed"])


def from_log(text: str) -> list[Event]:
    """The events that lines of Flower's log tell, as events.jsonl has them but for lists; other lines are left out."""
    events = []
    for line in text.splitlines():
        if told := _LINE.fullmatch(line):
            fields = {key: _read(value) for key, value in _FIELD.findall(told[2])}
            events.append({"time": datetime.fromisoformat(told[3]).timestamp(), "event": told[1]} | fields)
    return events


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=') and (text == _read(text) or not isinstance(value, str))
    return text if text and plain else json.dumps(text)


def _read(text: str) -> Any:
    """What `_value` made a text of."""
    if text.startswith('"'):
        return json.loads(text)
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def one_line(text: str, most: int) -> str:
    """What another machine says, fit for a log and a terminal.

    What does not print, line breaks too, is escaped, and of more than `most` characters the middle is left out.
    """
    short = text if len(text) <= 2 * most else text[:most] + text[-most:]  # of 30 MB little is shown
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)
    return shown if len(shown) <= most else f"{shown[: most // 2]} ... {shown[-most // 2 :]}"
