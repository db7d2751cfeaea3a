"""Orders through Flower's own SuperLink: what it, or a node, does to them costs an order at most, never the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import flwr.app.message.array
import numpy as np
import pytest
from conftest import TINY
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from sqlalchemy.exc import OperationalError
from superlinks import SuperLink, served

import ret_fl.dispatch
import ret_fl.pulling
import ret_fl.roster
from ret_fl.config import RunConfig
from ret_fl.dispatch import Dispatcher, Errand, Phase
from ret_fl.protocol import Hello
from ret_fl.pulling import UnusableReplyError, arrays_size
from ret_fl.roster import Roster

pytestmark = pytest.mark.usefixtures("impatient")

SOUND = RecordDict({"a": ConfigRecord({"sound": True})})
Federate = Callable[..., tuple[SuperLink, Dispatcher]]


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federate]:
    """federate(nodes): a SuperLink whose nodes have introduced themselves and answer every order, and a dispatcher."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ret_fl.pulling, "BUSY_SECONDS", 0.01)
    grids = []

    def make(nodes: int) -> tuple[SuperLink, Dispatcher]:
        link = SuperLink(tmp_path, nodes)
        link.works = lambda order: link.reply(order, SOUND)
        grids.append(served(link.answer, link.run_id))
        config = RunConfig.from_flat(TINY)
        roster = Roster(config, "f", nodes={n: Hello(i, "cpu", "f", 1, 0.0) for i, n in enumerate(link.nodes)})
        return link, Dispatcher(grids[-1].__enter__(), roster, config.retries, config.patience)

    yield make
    for grid in grids:
        grid.__exit__(None, None, None)


def orders(dispatcher: Dispatcher, *nodes: int, ttl: float = 60.0) -> dict[int, Errand]:
    """A phase of one shard for each of these nodes is open: its errands."""
    contents = [RecordDict({"o": ConfigRecord({"shard": shard})}) for shard in range(len(nodes))]
    errands = {
        shard: Errand(shard, [Message(content, node, MessageType.TRAIN, ttl=ttl)])
        for shard, (content, node) in enumerate(zip(contents, nodes, strict=True))
    }
    dispatcher.phase = Phase(1, errands, lambda shard, reply: None, dict.fromkeys(errands, 10))
    return errands


def seen_through(dispatcher: Dispatcher, errands: dict[int, Errand], timeout: float = 60.0) -> dict[int, Errand]:
    list(dispatcher.send_and_receive([errand.first for errand in errands.values()], timeout=timeout))
    return errands


def phase(dispatcher: Dispatcher, *nodes: int) -> dict[int, Errand]:
    return seen_through(dispatcher, orders(dispatcher, *nodes))


def answers(errands: dict[int, Errand]) -> dict[int, int | None]:
    return {shard: errand.answered_by for shard, errand in errands.items()}


def test_a_reply_that_is_no_message_costs_its_order_only(federate: Federate) -> None:
    link, dispatcher = federate(2)
    bad, good = link.nodes
    link.works = lambda order: (
        link.reply_with(order, b"\xff" * 5) if order.metadata.dst_node_id == bad else link.reply(order, SOUND)
    )
    errands = phase(dispatcher, bad, good)
    assert answers(errands) == {0: good, 1: good}
    assert "its reply cannot be read: DecodeError" in errands[0].failures[0]


def test_a_reply_that_names_one_chunk_again_and_again_is_not_put_together(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of zeros are all the same one: 3 KB come, of an array of 100 KB."""
    monkeypatch.setattr(flwr.app.message.array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1000)
    monkeypatch.setattr(ret_fl.dispatch, "MORE_BYTES", 20_000)
    link, dispatcher = federate(2)
    bad, good = link.nodes
    size = {bad: 100_000, good: 10_000}

    def answer(order: Message) -> None:
        zeros = np.zeros(size[order.metadata.dst_node_id], np.uint8)
        link.reply(order, RecordDict({"w": ArrayRecord([zeros])}))

    link.works = answer
    errands = phase(dispatcher, bad, good)
    assert answers(errands) == {0: good, 1: good}
    assert "put together, have more than 20," in errands[0].failures[0]


def test_arrays_within_arrays_are_not_put_together() -> None:
    """Flower would put them together, too, each as often as it is named."""
    inner = Array(np.zeros(1000, np.uint8))
    parts = {key: part.deflate() for key, part in get_all_nested_objects(inner).items()}
    assert arrays_size(parts) >= 1000
    about = {"dtype": "uint8", "shape": [40_000], "stype": "numpy.ndarray", "arraychunk_ids": [0] * 40}
    body = json.dumps(about).encode()
    outer = b"Array %s %d\x00" % (inner.object_id.encode(), len(body)) + body
    with pytest.raises(UnusableReplyError, match="is made of Array"):
        arrays_size(parts | {get_object_id(outer): outer})


def test_a_hello_that_is_no_message_is_told_by_its_nodes_name(
    federate: Federate, flower_log: pytest.LogCaptureFixture
) -> None:
    link, dispatcher = federate(1)
    link.nodes.append(link.join())
    link.works = lambda order: link.reply_with(order, b"\xff" * 5)
    dispatcher.roster.meet(dispatcher)
    assert set(dispatcher.roster.nodes) == {link.nodes[0]}
    assert f"node {link.nodes[1]} does not answer properly: its reply cannot be read" in flower_log.text


def test_a_database_that_is_locked_while_an_order_is_sent_costs_time_only(federate: Federate) -> None:
    link, dispatcher = federate(2)
    link.fails = lambda what, tried: what == "push-object" and tried == 1
    assert answers(phase(dispatcher, *link.nodes)) == dict(enumerate(link.nodes))
    assert len(link.handed) == 2


def test_a_database_that_is_locked_while_a_node_is_greeted_costs_time_only(federate: Federate) -> None:
    link, dispatcher = federate(1)
    link.nodes.append(link.join())
    link.fails = lambda what, tried: what == "push-object" and tried == 1
    hello = Hello(1, "cpu", "f", 1, 0.0)
    link.works = lambda order: link.reply(order, hello.pack())
    dispatcher.roster.meet(dispatcher)
    assert dispatcher.roster.nodes[link.nodes[1]] == hello


def test_a_reply_counts_for_the_order_that_was_asked_about_whatever_it_says(federate: Federate) -> None:
    """Both orders are on one node; the first fails at once, and the reply to the second names the first."""
    link, dispatcher = federate(1)
    (node,) = link.nodes

    def works(order: Message) -> str:
        if len(link.handed) == 1:
            return link.reply(order, Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, "no memory"))
        first, second = link.handed[0].metadata.message_id, order.metadata.message_id
        return link.reply(order, SOUND, says=first if len(link.handed) == 2 else second)

    link.works = works
    assert answers(phase(dispatcher, node, node)) == {0: node, 1: node}


def test_a_superlink_that_fails_after_it_took_some_orders_gives_no_node_two(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, dispatcher = federate(3)
    store, calls = link.state.store_message_and_object_tree, []

    def fails_at_the_third(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise OperationalError("INSERT", {}, Exception("database is locked"))
        return store(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(link.state, "store_message_and_object_tree", fails_at_the_third)
    assert answers(phase(dispatcher, *link.nodes)) == dict(enumerate(link.nodes))
    assert sorted(order.metadata.dst_node_id for order in link.handed) == sorted(link.nodes)


def test_an_order_that_the_superlink_does_not_take_goes_to_another_node(federate: Federate) -> None:
    link, dispatcher = federate(1)
    unknown = max(link.nodes) + 1
    errands = phase(dispatcher, unknown)
    assert answers(errands) == {0: link.nodes[0]}
    assert errands[0].failures == ["Flower could not send the order"]


def test_a_node_that_dies_and_comes_back_for_ever_keeps_no_round_waiting(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a new ID each time, and before it has said who it is."""
    monkeypatch.setattr(ret_fl.roster, "POLL_SECONDS", 0.1)
    link, dispatcher = federate(1)
    dispatcher.roster.config = RunConfig.from_flat(TINY | {"wait-seconds": 1.0})
    link.works = lambda order: None
    returns: list[int] = []

    def comes_back(what: str, tried: int) -> bool:
        if what == "get-nodes" and len(returns) < 40:
            for last in returns[-1:]:
                link.state.deactivate_node(last)
            returns.append(link.join())
        return False

    link.fails = comes_back
    assert dispatcher.roster.wait_for_enough(dispatcher) == link.nodes
    assert len(returns) < 40


def test_the_shards_of_a_node_that_is_gone_go_to_all_others(federate: Federate) -> None:
    link, dispatcher = federate(5)
    gone, *others = link.nodes
    dispatcher.roster.speed = dict(zip(link.nodes, (5.0, 1.01, 1.0, 1.0, 1.0), strict=True))

    def works(order: Message) -> None:
        if order.metadata.dst_node_id != gone:
            link.reply(order, SOUND)
        elif len(link.handed) == 6:
            link.leave(gone)

    link.works = works
    trained = Counter(answers(phase(dispatcher, *[gone] * 6)).values())
    assert sorted(trained) == sorted(others)
    assert sorted(trained.values()) == [1, 1, 2, 2]


@pytest.fixture
def slow(federate: Federate) -> Callable[..., Slow]:
    """slow(n): n nodes that take ten minutes for an order, and one order, on the first."""

    def make(nodes: int) -> Slow:
        link, dispatcher = federate(nodes)
        dispatcher.roster.turnaround = dict.fromkeys(link.nodes, 60.0)
        return Slow(link, dispatcher, orders(dispatcher, link.nodes[0]))

    return make


@dataclass
class Slow:
    link: SuperLink
    dispatcher: Dispatcher
    errands: dict[int, Errand]

    def hangs(self, order: Message) -> None:
        """An hour has passed since it was sent."""
        self.errands[0].asked[order.metadata.message_id].at -= 3600

    def seen_through(self, *works: Callable[[Message], object]) -> tuple[list[int], list[str]]:
        """works: what is done with the order each time it is taken up. Which nodes it went to, by number, and why."""
        self.link.works = lambda order: works[len(self.link.handed) - 1](order)
        errand = seen_through(self.dispatcher, self.errands)[0]
        assert errand.reply is not None
        return [self.link.nodes.index(n) for n in errand.nodes], [str(again["why"]) for again in errand.resent]

    def sound(self, order: Message) -> None:
        self.link.reply(order, SOUND)

    def failing(self, words: str) -> Callable[[Message], object]:
        return lambda order: self.link.reply(order, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words))


LATE = "the node is far behind the usual time"


def test_a_stand_in_that_fails_gives_a_node_that_hangs_no_more_time(slow: Callable[..., Slow]) -> None:
    one = slow(3)
    assert one.seen_through(one.hangs, one.failing("disk full"), one.sound) == ([0, 1, 2], [LATE, LATE])


def test_a_stand_in_whose_worker_died_is_asked_again_before_a_node_that_hangs(slow: Callable[..., Slow]) -> None:
    one = slow(2)
    assert one.seen_through(one.hangs, one.failing("WorkerError: it ended"), one.sound)[0] == [0, 1, 1]


def test_a_node_that_hangs_is_asked_again_where_there_is_no_other(slow: Callable[..., Slow]) -> None:
    one = slow(1)
    assert one.seen_through(one.hangs, one.sound)[0] == [0, 0]


def test_a_reply_that_comes_after_its_round_leaves_the_superlink(slow: Callable[..., Slow]) -> None:
    """Without a part of it on the way; nodes that are still at their orders are looked at, here ten times."""
    one = slow(2)
    one.seen_through(one.hangs, one.sound)
    link, late, looks = one.link, one.link.reply(one.link.handed[0], SOUND), one.link.asked["get-nodes"] + 10
    pulled = link.asked["pull-object"]

    def after_a_while(what: str, tried: int) -> bool:
        if what == "get-nodes" and tried == looks:
            link.reply(link.handed[-1], SOUND)
        return False

    link.works, link.fails = (lambda order: None), after_a_while
    seen_through(one.dispatcher, orders(one.dispatcher, link.nodes[1]))
    assert link.state.num_message_res() == 0
    assert link.state.object_store.get(late) is None
    assert link.asked["pull-object"] == pulled + 3  # the parts of the reply that counts


def test_an_order_is_said_to_be_sent_again_for_what_it_was(slow: Callable[..., Slow]) -> None:
    """The first node fails, too, after all, when the second has the order; then that is late."""
    one = slow(3)

    def the_first_fails(order: Message) -> None:
        one.failing("no memory")(one.link.handed[0])
        one.hangs(order)

    assert one.seen_through(one.hangs, the_first_fails, one.sound) == ([0, 1, 2], [LATE, LATE])
    assert "no memory" in one.errands[0].failures


def test_an_order_that_is_sent_again_dies_with_its_round(slow: Callable[..., Slow]) -> None:
    one = slow(2)
    one.errands[0].first.metadata.__dict__["_created_at"] -= 20
    one.seen_through(one.hangs, one.sound)
    first, again = [m.metadata.created_at + m.metadata.ttl for m in one.errands[0].messages]
    assert again == pytest.approx(first, abs=1)


def test_an_order_whose_round_is_over_is_not_sent_again(federate: Federate) -> None:
    """The SuperLink says that it is unavailable, a little before the round ends."""
    link, dispatcher = federate(2)
    link.works = lambda order: None
    (errand,) = seen_through(dispatcher, orders(dispatcher, link.nodes[0], ttl=1.0), timeout=2.0).values()
    assert (len(errand.messages), errand.failures, errand.open) == (1, [], False)
