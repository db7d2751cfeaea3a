"""Orders through Flower's own SuperLink: what it, or a node, does to them costs an order at most, never the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from sqlalchemy.exc import OperationalError
from superlinks import SuperLink, served

import ret_fl.dispatch
import ret_fl.pulling
from ret_fl.config import RunConfig
from ret_fl.dispatch import Dispatcher, Errand, Phase
from ret_fl.protocol import Hello
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


def phase(dispatcher: Dispatcher, *nodes: int, timeout: float = 60.0) -> dict[int, Errand]:
    """A phase of one shard for each of these nodes: its errands when it is over."""
    messages = [Message(RecordDict({"o": ConfigRecord({"shard": shard})}), node, MessageType.TRAIN, ttl=timeout)
                for shard, node in enumerate(nodes)]  # fmt: skip
    errands = {shard: Errand(shard, [message]) for shard, message in enumerate(messages)}
    dispatcher.phase = Phase(1, errands, lambda shard, reply: None, dict.fromkeys(errands, 10))
    list(dispatcher.send_and_receive(messages, timeout=timeout))
    return errands


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

    def works(order: Message) -> None:
        if len(link.handed) == 1:
            return link.reply(order, Error(3, "no memory"))
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
