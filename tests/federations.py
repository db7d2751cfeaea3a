"""What tests of the strategy share: clients that are watched or spoiled, and states compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from conftest import Client
from flwr.app import Context, Message, MessageType

from clients.app import app as client_app
from ret_fl.config import Scalar
from ret_fl.packing import State, unpack_state
from ret_fl.protocol import TrainOrder, TrainReport

UNEQUAL: Mapping[str, Scalar] = {"shards": 3, "partition.sizes": "0.6,0.3,0.1"}


def assert_equal_states(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []


def furthest(left: State, right: State) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name].astype(float) - right[name]).max()) for name in left)


class Recorder:
    """A real client whose orders and replies are kept."""

    def __init__(self, client: Client = client_app) -> None:
        self.client = client
        self.orders: list[tuple[int, TrainOrder]] = []
        self.replies: list[tuple[TrainReport, State | None]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return self.client(message, context)
        self.orders.append((context.node_id, TrainOrder.unpack(message.content)[0]))
        reply = self.client(message, context)
        report, weights = TrainReport.unpack(reply.content)
        self.replies.append((report, unpack_state(weights) if weights is not None else None))
        return reply


def spoiling(shard: int, spoil: Callable[[Message, Message], Message | None], rounds: tuple[int, ...] = (1,)) -> Client:
    """Real clients, but the reply for one shard goes through `spoil(request, reply)` in some rounds."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return client_app(message, context)
        order = TrainOrder.unpack(message.content)[0]
        reply = client_app(message, context)
        if order.shard == shard and order.round in rounds:
            return spoil(message, reply) or reply
        return reply

    return client
