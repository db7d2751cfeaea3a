"""Replies on their way: Flower's own client against as much of a SuperLink as pulling asks of, over HTTP.

As the real one it hands a reply out once. What it fails at with "database is locked", and which parts it has, is told.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from conftest import TINY
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from superlinks import served

import ret_fl.dispatch
import ret_fl.pulling
from ret_fl.config import RunConfig
from ret_fl.dispatch import Dispatcher, Errand, Phase
from ret_fl.pulling import UnusableReplyError
from ret_fl.roster import Roster

PULL, PART, CONFIRM = "/v1/runtime/pull-messages", "/v1/runtime/pull-object", "/v1/runtime/confirm-message-received"


class Link:
    """replies: by the ID of the message they answer. fails: whether a request fails, by its path and how often it (for
    a part: this part) was asked for; has: whether a part is there, by how often it was asked for."""

    def __init__(self) -> None:
        self.replies: dict[str, Message] = {}
        self.objects: dict[str, bytes] = {}
        self.asked = Counter[tuple[str, str]]()
        self.fails: Callable[[str, int], bool] = lambda path, tried: False
        self.has: Callable[[str, int], bool] = lambda object_id, tried: True

    def hold(self, message_id: str, **told: str | int) -> None:
        reply = Message(RecordDict({"a": ConfigRecord(told)}), 1, MessageType.TRAIN)  # type: ignore[arg-type]
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.replies[message_id] = reply
        self.objects |= {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}

    def answer(self, path: str, body: bytes) -> bytes | None:
        """None: HTTP 500."""
        about = PullObjectRequest.FromString(body).object_id if path == PART else ""
        self.asked[path, about] += 1
        tried = self.asked[path, about]
        if self.fails(path, tried):
            return None
        if path == PULL:
            asked = PullAppMessagesRequest.FromString(body).message_ids
            found = [self.replies.pop(i) for i in asked if i in self.replies]
            return PullAppMessagesResponse(
                messages_list=[message_to_proto(remove_content_from_message(reply)) for reply in found],
                message_object_trees=[get_object_tree(reply) for reply in found],
            ).SerializeToString()
        if path == PART:
            there = self.has(about, tried)
            content = self.objects[about] if there else b""
            return PullObjectResponse(
                object_found=True, object_available=there, object_content=content
            ).SerializeToString()
        return ConfirmMessageReceivedResponse().SerializeToString()


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def dispatcher(link: Link, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ret_fl.dispatch, "PULL_SECONDS", 0.001)
    monkeypatch.setattr(ret_fl.pulling, "BUSY_SECONDS", 0.001)
    with served(link.answer, 1) as grid:
        yield Dispatcher(grid, Roster(RunConfig.from_flat(TINY), "f"), 1, 2.0)


def taken(dispatcher: Dispatcher, message_id: str) -> list[object]:
    """What a reply tells, as soon as asking for it gives anything; nothing after 20 askings."""
    for _ in range(20):
        if reply := dispatcher._pull(message_id, float("inf")):
            return [reply.content["a"]["told"]]
    return []


def test_parts_of_a_reply_that_are_still_on_their_way_are_asked_for_until_they_are_there(
    link: Link, dispatcher: Dispatcher
) -> None:
    """Flower's own waits, 1, 2, 4, ... 10 s, would add up to more than an hour, and end after 500 tries."""
    link.hold("an order", told=3)
    last = link.replies["an order"].metadata.message_id
    link.has = lambda object_id, tried: object_id != last or tried >= 510
    assert taken(dispatcher, "an order") == [3]
    assert sorted(count for (path, _), count in link.asked.items() if path == PART) == [1, 1, 510]


@pytest.mark.parametrize(
    ("path", "times"), [(PULL, 2), (PART, 3), (CONFIRM, 2), (CONFIRM, 10**9)], ids=["ask", "part", "confirm", "never"]
)
def test_a_reply_that_was_handed_out_is_not_lost_by_a_superlink_that_is_busy_afterwards(
    link: Link, dispatcher: Dispatcher, path: str, times: int
) -> None:
    link.hold("an order", told=3)
    link.fails = lambda asked, tried: asked == path and tried <= times
    assert taken(dispatcher, "an order") == [3]


def test_a_reply_larger_than_any_sound_one_is_not_taken_into_memory(
    link: Link, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.dispatch, "MORE_BYTES", 10_000)
    link.hold("small", told="x" * 8_000)
    link.hold("large", told="x" * 12_000)
    assert taken(dispatcher, "small") == ["x" * 8_000]
    with pytest.raises(UnusableReplyError, match="more than 10,000 bytes"):
        taken(dispatcher, "large")


def test_a_reply_whose_parts_do_not_come_keeps_no_other_waiting(
    link: Link, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.pulling, "UPLOAD_SECONDS", 0.1)
    link.hold("stalled", told=1)
    late, arrived = set(link.objects), threading.Event()
    link.has = lambda object_id, tried: object_id not in late or arrived.is_set()
    link.hold("other", told=2)
    assert dispatcher._pull("stalled", float("inf")) is None
    assert taken(dispatcher, "other") == [2]
    arrived.set()
    while not (reply := dispatcher._pull("stalled", float("inf"))):
        time.sleep(0.01)
    assert reply.content["a"]["told"] == 1


def test_a_reply_whose_parts_do_not_come_is_given_up_when_its_time_is_over(link: Link, dispatcher: Dispatcher) -> None:
    link.hold("stalled", told=1)
    link.has = lambda object_id, tried: False
    dispatcher.grid.push_messages = lambda messages: ["stalled"]  # type: ignore[method-assign]
    order = Message(RecordDict(), 1, MessageType.TRAIN)
    dispatcher.phase = Phase(1, {0: Errand(0, [order])}, lambda shard, reply: None, {0: 1})
    assert not list(dispatcher.send_and_receive([order], timeout=0.2))
    time.sleep(0.1)  # requests under way
    asked = link.asked.total()
    time.sleep(0.2)
    assert link.asked.total() == asked
