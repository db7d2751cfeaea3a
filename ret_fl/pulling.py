"""Replies taken from a SuperLink, each once, within bounds of memory and time, and none in the way of another.

A SuperLink hands a reply to the first who asks and to nobody again, while its parts may still be on their way. What
goes wrong after that must not lose it: "database is locked" while its parts are asked for, or when it is told that all
arrived. Flower's `HttpGrid.pull_messages` does the asking; the functions it calls for that are replaced here.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from logging import WARNING
from typing import Any, TypeVar

import httpx
from flwr.app import Array, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.logger import log
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ConfirmMessageReceivedResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, ObjectUnavailableError
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import http_grid

T = TypeVar("T")

BUSY_TRIES, BUSY_SECONDS = 10, 2.0
"""How often, and how long apart, a SuperLink that answers with an error of its own is asked again."""
UPLOAD_SECONDS = 30.0
"""How long a reply whose parts are still on their way keeps others, and the look at the nodes, waiting."""
ASK_SECONDS = 5.0
"""How long a reply that may be there is waited for even where time is over."""
REPLIES_AT_ONCE = 16
"""How many replies, at most, may have parts on their way. More than one is rare: see `UPLOAD_SECONDS`."""


class UnusableReplyError(RuntimeError):
    """A reply has more bytes than any sound one, or cannot be read. What came is dropped, and no more will come."""


def is_busy(error: httpx.HTTPStatusError | ObjectPushError) -> bool:
    """Whether the SuperLink failed at a request: above all "database is locked", which passes.

    A locked database is answered with HTTP 500, but a part of a message that meets one with `stored=False`.
    """
    return isinstance(error, ObjectPushError) or error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR


def until_not_busy(ask: Callable[[], T]) -> T:
    """What is answered, once it is. Raises what the last of `BUSY_TRIES` raised.

    Messages may be pushed so: a SuperLink knows one that it has by its ID, and asks for the parts that it lacks.
    """
    for tried in range(1, BUSY_TRIES + 1):
        try:
            return ask()
        except (httpx.HTTPStatusError, ObjectPushError) as error:
            if not is_busy(error) or tried == BUSY_TRIES:
                raise
            log(WARNING, "the SuperLink is busy (%s): asked again in %g s", error, BUSY_SECONDS)
        time.sleep(BUSY_SECONDS)
    raise AssertionError("BUSY_TRIES is at least 1")


@dataclass
class _Pull:
    """One reply being taken: most bytes it may have, when (monotonic) to give it up, how often to ask for a part."""

    most: float
    ends: float
    interval: float
    taken: int = 0
    given_up: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def part(self, ask: Callable[[str], bytes], object_id: str) -> bytes:
        """A part of the reply, as Flower's `pull_objects` wants it: `ObjectUnavailableError` to be asked again."""
        if self.given_up.is_set():
            raise ObjectPullError(object_id, "no longer needed")
        try:
            content = ask(object_id)
        except httpx.HTTPStatusError as error:
            if not is_busy(error):
                raise
            raise ObjectUnavailableError(object_id) from error
        with self.lock:
            self.taken += len(content)
            if self.taken > self.most:
                raise UnusableReplyError(f"its reply has more than {self.most:,.0f} bytes")
        return content


def arrays_size(parts: Mapping[str, bytes]) -> int:
    """Bytes of the arrays among a message's parts (by object ID) once they are put together.

    It may be far more than came: an array names its chunks by number, and one chunk as often as it likes. Raises
    `UnusableReplyError` for arrays made of anything else, which Flower would put together, too, and whatever the
    parts' bytes bring about, if they are no Flower objects.
    """
    size = 0
    for content in parts.values():
        if get_object_type_from_object_content(content) == Array.__qualname__:
            chunks = get_object_children_ids_from_object_content(content)
            if other := {get_object_type_from_object_content(parts[key]) for key in chunks} - {ArrayChunk.__qualname__}:
                raise UnusableReplyError(f"one of its arrays is made of {', '.join(sorted(other))}")
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            size += sum(len(parts[chunks[number]]) for number in named)
    return size


_pull: ContextVar[_Pull | None] = ContextVar("_pull", default=None)
_flowers_pull, _flowers_confirm = http_grid.pull_objects, RuntimeHttpClient.ConfirmMessageReceived


def _pull_objects(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **usual: Any) -> dict[str, bytes]:
    """Flower's, but parts are asked for at equal intervals; Flower itself waits 1, 2, 4 s, ... between."""
    pull = _pull.get()
    if pull is None:
        return _flowers_pull(object_ids, pull_object_fn, **usual)
    try:
        parts = _flowers_pull(
            object_ids,
            partial(pull.part, pull_object_fn),
            max_time=pull.ends - time.monotonic(),
            max_tries_per_object=None,
            initial_backoff=pull.interval,
            backoff_cap=pull.interval,
        )
        if arrays_size(parts) > pull.most:
            raise UnusableReplyError(f"its arrays, put together, have more than {pull.most:,.0f} bytes")
        return parts
    except ObjectPullError:
        if pull.given_up.is_set():
            return {}  # Flower tells the SuperLink that all arrived, which then drops its parts, and can read nothing
        raise


def _confirm(client: RuntimeHttpClient, request: ConfirmMessageReceivedRequest) -> ConfirmMessageReceivedResponse:
    """Flower's, but a SuperLink that stays busy keeps its copy of a reply; the reply itself is here."""
    try:
        return until_not_busy(partial(_flowers_confirm, client, request))
    except httpx.HTTPStatusError as error:
        if not is_busy(error):
            raise
        log(WARNING, "the SuperLink was not told that a reply arrived (%s): it keeps it to the end of the run", error)
        return ConfirmMessageReceivedResponse()


http_grid.pull_objects = _pull_objects
RuntimeHttpClient.ConfirmMessageReceived = _confirm  # type: ignore[method-assign,assignment]


class Puller:
    """Takes replies from `grid`, one after the other unless the parts of one keep it waiting."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._pool = futures.ThreadPoolExecutor(REPLIES_AT_ONCE, thread_name_prefix="pull")
        self._coming: dict[str, tuple[_Pull, futures.Future[Message | None]]] = {}

    def take(self, message_id: str, *, most: float, ends: float, interval: float) -> Message | None:
        """The reply to a message, where it is there with all its parts; else None, for now.

        most: bytes it may have. ends: when, by `time.monotonic`, its parts are no longer waited for. interval: seconds
        between two askings for a part. Raises `UnusableReplyError`, and what Flower raises where the SuperLink is not
        just busy.
        """
        coming = self._coming.get(message_id)
        wait = 0.0 if coming else min(UPLOAD_SECONDS, max(ASK_SECONDS, ends - time.monotonic()))
        if coming is None:
            pull = _Pull(most, ends, interval)
            coming = pull, self._pool.submit(self._fetch, pull, message_id)
            self._coming[message_id] = coming
        pull, future = coming
        futures.wait([future], timeout=wait)
        if not future.done():
            return None
        del self._coming[message_id]
        return future.result()

    def give_up(self, message_ids: Iterable[str]) -> None:
        """Ask for no further parts of the replies to these messages."""
        for message_id in message_ids:
            if coming := self._coming.pop(message_id, None):
                coming[0].given_up.set()

    def forget(self, message_id: str) -> bool:
        """Whether a reply that is no longer needed, or none that can be, has come: then the SuperLink drops it."""
        pull = _Pull(0, 0, 0)
        pull.given_up.set()
        try:
            return self._fetch(pull, message_id) is not None
        except UnusableReplyError:
            return True

    def _fetch(self, pull: _Pull, message_id: str) -> Message | None:
        _pull.set(pull)
        try:
            reply = next(iter(self.grid.pull_messages([message_id])), None)
            if reply is not None and not reply.has_error() and not isinstance(reply.content, RecordDict):
                raise UnusableReplyError("its reply cannot be read: its content is no RecordDict")
            return reply
        except httpx.HTTPStatusError as error:
            if not is_busy(error):
                raise
            log(WARNING, "the SuperLink is busy (%s): asked again", error)
            return None
        except (httpx.HTTPError, UnusableReplyError):
            raise
        except Exception as error:  # whatever Flower's own reader makes of what a node sent: no fault of the run's
            raise UnusableReplyError(f"its reply cannot be read: {type(error).__name__}: {error!s:.200}") from error
        finally:
            _pull.set(None)
