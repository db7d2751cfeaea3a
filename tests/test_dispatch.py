"""A reply that is still on its way: Flower's own pulling, from a SuperLink that has its parts one after the other."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
from conftest import TINY
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid, http_grid

import ret_fl.dispatch
from ret_fl.config import RunConfig
from ret_fl.dispatch import Dispatcher
from ret_fl.roster import Roster


class SlowLink:
    """As much of a SuperLink as pulling asks of: one reply, each part of which is there at its `tries`th asking."""

    def __init__(self, reply: Message, tries: int) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.reply, self.tries, self.asked = reply, tries, Counter[str]()
        self.objects = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}

    def PullMessages(self, _: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        proto = message_to_proto(remove_content_from_message(self.reply))
        return PullAppMessagesResponse(messages_list=[proto], message_object_trees=[get_object_tree(self.reply)])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        self.asked[request.object_id] += 1
        there = self.asked[request.object_id] >= self.tries
        content = self.objects[request.object_id] if there else b""
        return PullObjectResponse(object_found=True, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, _: ConfirmMessageReceivedRequest) -> ConfirmMessageReceivedResponse:  # noqa: N802
        return ConfirmMessageReceivedResponse()


def test_parts_of_a_reply_that_are_still_on_their_way_are_asked_for_at_equal_intervals_until_they_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    link = SlowLink(Message(RecordDict({"a": ConfigRecord({"b": 3})}), 1, MessageType.TRAIN), tries=600)
    grid = HttpGrid(token="none")
    grid.set_run(Run.create_empty(1))
    grid._client = cast(Any, link)
    monkeypatch.setattr(ret_fl.dispatch, "PULL_SECONDS", 0.0002)
    usual = http_grid.pull_objects
    # Flower's own waits would add up to more than an hour, and end after 500 tries
    (reply,) = Dispatcher(grid, Roster(RunConfig.from_flat(TINY), "f"), 1, 2.0)._pull(["an order"])
    assert reply.content["a"]["b"] == 3
    assert set(link.asked.values()) == {600} and len(link.asked) == 3
    assert http_grid.pull_objects is usual
