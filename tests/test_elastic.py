"""Shards outlive their nodes: a node that dies, falls silent or answers nonsense loses its orders to another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Client, Federation, run_server
from failing_nodes import FIRST, SECOND, Federate, Tiny, states_differ, unavailable
from flwr.app import Context, Error, Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import Strategy

import ret_fl.dispatch
import ret_fl.pulling
import ret_fl.roster
from clients.app import app as client_app
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import TrainOrder, TrainReport
from ret_fl.pulling import UnusableReplyError
from ret_fl.strategy import RedistributeEnsemble
from ret_fl.worker.calls import WorkerError
from simulations.inline import InlineGrid

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def undisturbed(tiny: Tiny, federate: Federate) -> dict[str, np.ndarray]:
    return federate(tiny({"state-dir": str(tiny().state_dir) + "-undisturbed"})).run()


def failing(node: int, answer: Callable[[Message, Message], Message], rounds: tuple[int, ...] = (1,)) -> Client:
    """Real clients, but what `node` replies to orders goes through `answer(request, reply)` in some rounds."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type != MessageType.TRAIN or context.node_id != node:
            return reply
        return answer(message, reply) if TrainOrder.unpack(message.content)[0].round in rounds else reply

    return client


def silence(fed: Federation, node: int, *, gone: bool) -> None:
    """Replies of a node to orders are lost from now on; `gone`: Flower no longer lists it, either."""
    pull, push, listed = fed.grid.pull_messages, fed.grid.push_messages, fed.grid.get_node_ids
    lost: set[str] = set()

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(push(messages))
        for message, message_id in zip(messages, ids, strict=True):
            if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == node:
                lost.add(message_id)
        return ids

    fed.grid.push_messages = pushing  # type: ignore[method-assign]
    fed.grid.pull_messages = lambda ids: pull([i for i in ids if i not in lost])  # type: ignore[method-assign]
    if gone:
        fed.grid.get_node_ids = lambda: [n for n in listed() if not lost or n != node]  # type: ignore[method-assign]


def nan_weights(request: Message, reply: Message) -> Message:
    report, weights = TrainReport.unpack(reply.content)
    assert weights is not None
    bad = unpack_state(weights)
    next(iter(bad.values())).fill(np.nan)
    return Message(report.pack(bad), reply_to=request)


def crashed(request: Message, reply: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "OSError: disk full"), reply_to=request)


@pytest.mark.parametrize(
    ("answer", "why"), [(nan_weights, "not finite"), (unavailable, "Node Unavailable"), (crashed, "disk full")]
)
def test_what_a_node_fails_another_does_in_the_same_round(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray], answer: Callable[..., Message], why: str
) -> None:
    fed = federate(tiny(), failing(SECOND, answer))
    final = fed.run()
    assert not fed.rounds[0].failures
    assert [(again["shard"], why in str(again["why"])) for again in fed.rounds[0].resent] == [(1, True)]
    assert fed.rounds[0].row()["shards"]["1"]["partition"] == 0  # type: ignore[index]
    assert not states_differ(final, undisturbed)


def test_the_shard_of_a_node_that_dies_in_a_round_is_trained_elsewhere_in_that_round(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray]
) -> None:
    fed = federate(tiny())
    silence(fed, SECOND, gone=True)
    final = fed.run()
    assert [summary.failures for summary in fed.rounds] == [{}, {}]
    assert fed.rounds[0].resent == [{"shard": 1, "why": "the node is gone"}]
    assert not fed.rounds[1].resent  # the next round does not try it again
    assert not states_differ(final, undisturbed)
    np.testing.assert_array_equal(np.sort(np.concatenate([fed.strategy.ledger.ids(k) for k in (0, 1)])), np.arange(24))


def test_a_node_far_behind_its_speed_gets_a_stand_in(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.dispatch, "LEAST_SECONDS", 0.3)
    fed = federate(tiny())
    fed.strategy.roster.turnaround = {FIRST: 1e-4, SECOND: 1e-4}
    silence(fed, SECOND, gone=False)
    final = fed.run()
    assert [again["shard"] for again in fed.rounds[0].resent] == [1]
    assert "usual time" in str(fed.rounds[0].resent[0]["why"])
    assert not fed.rounds[1].resent  # it gets no order in the next round
    assert not states_differ(final, undisturbed)


def test_an_order_lost_in_the_first_round_is_missed_once_another_node_has_answered(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of the node's speed; without the other's it would be waited for until round-timeout."""
    monkeypatch.setattr(ret_fl.dispatch, "LEAST_SECONDS", 0.3)
    fed = federate(tiny())
    silence(fed, SECOND, gone=False)
    assert not fed.strategy.roster.turnaround
    final = fed.run()
    assert fed.rounds[0].resent == [{"shard": 1, "why": "the node is far behind the usual time"}]
    assert not any(summary.failures for summary in fed.rounds)
    assert not states_differ(final, undisturbed)


def test_where_every_order_of_the_first_round_is_lost_measured_speed_tells(
    tiny: Tiny, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.dispatch, "LEAST_SECONDS", 0.3)
    fed = federate(tiny({"shards": 1, "num-server-rounds": 1}), nodes=2)
    fed.strategy.roster.speed = {FIRST: 1e4, SECOND: 1e4}
    silence(fed, FIRST, gone=False)
    fed.run()
    assert fed.rounds[0].resent == [{"shard": 0, "why": "the node is far behind the usual time"}]
    assert fed.rounds[0].partitions == {0: 1}


def test_a_reply_larger_than_any_sound_one_is_dropped_and_asked_of_another_node(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny({"num-server-rounds": 1}))
    push, pull, owing = fed.grid.push_messages, fed.grid.pull_messages, dict[str, int]()

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(push(messages))
        owing.update(
            (i, m.metadata.dst_node_id)
            for i, m in zip(ids, messages, strict=True)
            if m.metadata.message_type == MessageType.TRAIN
        )
        return ids

    def pulling(ids: Iterable[str]) -> Iterable[Message]:
        if any(owing.get(i) == SECOND for i in ids):
            raise UnusableReplyError("its reply has more than 7 bytes")
        return pull(ids)

    fed.grid.push_messages, fed.grid.pull_messages = pushing, pulling  # type: ignore[method-assign]
    fed.run()
    assert fed.rounds[0].resent == [{"shard": 1, "why": "its reply has more than 7 bytes"}]
    assert not fed.rounds[0].failures
    assert fed.rounds[0].partitions == {0: 0, 1: 0}


def busy(url: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", url)
    return httpx.HTTPStatusError("database is locked", request=request, response=httpx.Response(500, request=request))


def test_a_superlink_that_is_busy_costs_time_only(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower answers 500 while others keep its database locked, at whatever it is asked."""
    monkeypatch.setattr(ret_fl.pulling, "BUSY_SECONDS", 0.01)
    fed = federate(tiny())
    asked: dict[str, int] = {}

    def sometimes(name: str) -> None:
        answer = getattr(fed.grid, name)

        def ask(*arguments: object) -> object:
            asked[name] = asked.get(name, 0) + 1
            if asked[name] % 2:
                raise busy(name)
            return answer(*arguments)

        setattr(fed.grid, name, ask)

    for name in ("push_messages", "pull_messages", "get_node_ids"):
        sometimes(name)
    final = fed.run()
    assert not any(summary.failures for summary in fed.rounds)
    assert min(asked.values()) > 2
    assert not states_differ(final, undisturbed)


def test_a_superlink_that_is_busy_when_a_run_begins_costs_time_only(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.pulling, "BUSY_SECONDS", 0.01)
    listed, looks = InlineGrid.get_node_ids, []

    def busy_every_other_time(grid: InlineGrid) -> Iterable[int]:
        looks.append(grid)
        if len(looks) % 2:
            raise busy("get_node_ids")
        return listed(grid)

    monkeypatch.setattr(InlineGrid, "get_node_ids", busy_every_other_time)
    assert len(run_server(tiny(), tmp_path / "run").rows()) == 2


def test_a_superlink_that_stays_broken_ends_the_run(
    tiny: Tiny, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.pulling, "BUSY_SECONDS", 0.01)
    fed = federate(tiny())

    def broken(messages: Iterable[Message]) -> Iterable[str]:
        if next(iter(messages)).metadata.message_type == MessageType.TRAIN:
            raise busy("push_messages")
        return push(messages)

    push = fed.grid.push_messages
    fed.grid.push_messages = broken  # type: ignore[method-assign]
    with pytest.raises(httpx.HTTPStatusError, match="locked"):
        fed.run()


def test_a_node_that_was_always_slow_is_not_too_late(tiny: Tiny, federate: Federate) -> None:
    """Nodes that share a machine wait for each other: the time to an answer counts, not the speed of training."""
    fed = federate(tiny())
    roster = fed.strategy.roster
    roster.greet(fed.grid)
    assert roster.usual_seconds(FIRST, 100) is None
    roster.speed[FIRST] = 10.0
    assert roster.usual_seconds(FIRST, 100) == pytest.approx(10)
    roster.trained(0, FIRST, 1000, 1.0)
    roster.answered(FIRST, 1000, 500.0)
    assert roster.usual_seconds(FIRST, 100) == pytest.approx(50)
    roster.answered(FIRST, 1000, 20.0)
    assert 2 < (roster.usual_seconds(FIRST, 100) or 0) < 50
    roster.answered(FIRST, 1000, 100.0)
    assert roster.usual_seconds(FIRST, 100) == pytest.approx(18)


def test_one_slow_answer_is_forgotten_in_time(tiny: Tiny, federate: Federate) -> None:
    roster = federate(tiny()).strategy.roster
    roster.answered(FIRST, 1000, 3600.0)
    for _ in range(12):
        roster.answered(FIRST, 1000, 10.0)
    assert roster.usual_seconds(FIRST, 1000) == pytest.approx(10, rel=0.1)


def test_an_order_behind_others_on_its_node_has_their_time_too(
    tiny: Tiny, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shards on one node, which takes a quarter of a second each."""
    fed = federate(tiny({"shards": 4, "num-server-rounds": 2, "patience": 2}), nodes=1)
    monkeypatch.setattr(ret_fl.dispatch, "LEAST_SECONDS", 0.0)
    push, pull, ready = fed.grid.push_messages, fed.grid.pull_messages, dict[str, float]()

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(push(messages))
        for i, message in zip(ids, messages, strict=True):
            if message.metadata.message_type == MessageType.TRAIN:
                ready[i] = max([time.monotonic(), *ready.values()]) + 0.25
        return ids

    fed.grid.push_messages = pushing  # type: ignore[method-assign]
    fed.grid.pull_messages = lambda ids: pull([i for i in ids if time.monotonic() >= ready.get(i, 0)])  # type: ignore[method-assign]
    fed.run()
    assert [summary.resent for summary in fed.rounds] == [[], []]
    images = sum(report.images for report in fed.rounds[1].reports)
    assert fed.strategy.roster.usual_seconds(FIRST, images) == pytest.approx(1.0, rel=0.5)


def test_orders_too_large_for_one_request_go_one_by_one(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray]
) -> None:
    """Flower's grid then sends nothing and returns no IDs."""
    fed = federate(tiny())
    push = fed.grid.push_messages

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        orders = [m for m in messages if m.metadata.message_type == MessageType.TRAIN]
        return [] if len(orders) > 1 else push(messages)

    fed.grid.push_messages = pushing  # type: ignore[method-assign]
    assert not states_differ(fed.run(), undisturbed)


def test_a_strategy_around_ours_may_run_the_rounds_on_flowers_own_grid(
    tiny: Tiny, federate: Federate, undisturbed: dict[str, np.ndarray]
) -> None:
    class Around(Strategy):
        """As Flower's differential-privacy wrappers: a loop of its own, every hook handed on."""

        def __init__(self, inner: RedistributeEnsemble) -> None:
            self.configure_train, self.aggregate_train = inner.configure_train, inner.aggregate_train
            self.configure_evaluate, self.aggregate_evaluate = inner.configure_evaluate, inner.aggregate_evaluate
            self.summary = inner.summary

    Around.__abstractmethods__ = frozenset()
    fed = federate(tiny())
    fed.strategy.roster.greet(fed.grid)
    result = Around(fed.strategy).start(fed.grid, pack_state(fed.start), 2)
    assert not states_differ(unpack_state(result.arrays), undisturbed)


def test_an_order_goes_to_so_many_nodes_and_no_more(tiny: Tiny, federate: Federate) -> None:
    tried = []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and TrainOrder.unpack(message.content)[0].shard == 0:
            tried.append(context.node_id)
            return unavailable(message, message)
        return client_app(message, context)

    fed = federate(tiny({"retries": 3, "num-server-rounds": 1}), client, nodes=2)
    fed.run()
    assert tried == [FIRST, SECOND, SECOND, SECOND]
    assert list(fed.rounds[0].failures) == [0]
    assert fed.rounds[0].failures[0].count("Node Unavailable") >= 1
    assert fed.rounds[0].reports[0].shard == 1


def test_an_error_of_the_app_is_not_asked_for_again_of_the_same_node(tiny: Tiny, federate: Federate) -> None:
    calls = []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and TrainOrder.unpack(message.content)[0].shard == 1:
            calls.append(context.node_id)
            return crashed(message, message)
        return client_app(message, context)

    federate(tiny({"num-server-rounds": 1}), client, nodes=1).run()
    assert calls == [FIRST]


def test_a_worker_that_died_is_asked_again_of_the_only_node(tiny: Tiny, federate: Federate) -> None:
    """Its next order starts another; see ret_fl/worker."""
    died = []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and not died:
            died.append(context.node_id)
            raise WorkerError("the worker (process 7) ended with the order in it")
        return client_app(message, context)

    fed = federate(tiny({"num-server-rounds": 1}), client, nodes=1)
    fed.run()
    assert not fed.rounds[0].failures
    assert [again["shard"] for again in fed.rounds[0].resent] == [0]


def test_a_late_first_reply_does_not_count_twice(tiny: Tiny, federate: Federate) -> None:
    """A straggler and its stand-in both answer at once: one reply is taken."""
    fed = federate(tiny({"num-server-rounds": 1}))
    pull = fed.grid.pull_messages
    doubled = lambda ids: [r for reply in pull(ids) for r in (reply, reply)]  # noqa: E731
    fed.grid.pull_messages = doubled  # type: ignore[method-assign]
    fed.run()
    assert sorted(r.shard for r in fed.rounds[0].reports) == [0, 1]
    assert fed.strategy.ledger.visits.sum() == sum(r.visits.sum() for r in fed.rounds[0].reports)
