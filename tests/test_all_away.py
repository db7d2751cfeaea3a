"""Too few nodes: a run waits for them, uses those that come back, and stops with a way to go on."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable

import pytest
from conftest import Federation
from failing_nodes import FIRST, SECOND, Federate, Tiny, states_differ, unavailable
from flwr.app import Message, MessageType

from ret_fl.protocol import TrainOrder
from ret_fl.roster import FederationError

pytestmark = pytest.mark.usefixtures("impatient")


def away(fed: Federation, rounds: tuple[int, ...], back: Callable[[int], dict[int, int]]) -> None:
    """Every order of these rounds meets a node that Flower no longer hears from; then no node is listed, until
    `back(looks)` names some: new IDs and those whose contexts they have."""
    contexts, looks = dict(fed.grid.contexts), [0]
    handle = fed.grid._handle

    def handling(message: Message) -> Message:
        if message.metadata.message_type != MessageType.TRAIN or looks[0]:
            return handle(message)
        if TrainOrder.unpack(message.content)[0].round not in rounds:
            return handle(message)
        fed.grid.contexts.clear()
        return unavailable(message, message)

    def listed() -> list[int]:
        if not fed.grid.contexts:
            looks[0] += 1
            fed.grid.contexts.update({new: contexts[old] for new, old in back(looks[0]).items()})
        return list(fed.grid.contexts)

    fed.grid._handle = handling  # type: ignore[method-assign]
    fed.grid.get_node_ids = listed  # type: ignore[method-assign]


@pytest.mark.parametrize("node", [FIRST, 9], ids=["as itself", "under a new ID"])
def test_a_round_waits_for_a_node_where_all_are_away(tiny: Tiny, federate: Federate, node: int) -> None:
    settings = {"shards": 1, "wait-seconds": 60}
    whole = federate(tiny(settings, {"state-dir": str(tiny().state_dir) + "-other"})).run()
    fed = federate(tiny(settings))
    away(fed, (2,), lambda looks: {node: FIRST} if looks > 10 else {})
    final = fed.run()
    assert fed.rounds[1].resent == [{"shard": 0, "why": "Node Unavailable"}]
    assert not any(summary.failures for summary in fed.rounds)
    assert not states_differ(final, whole)


def test_a_round_whose_nodes_stay_away_stops_the_run_with_a_way_to_go_on(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny({"wait-seconds": 0.5, "out": "runs/mine"}))
    away(fed, (2,), lambda looks: {})
    with pytest.raises(FederationError, match=r"round 2: .*no node came within wait-seconds=0.5.*--resume runs/mine"):
        fed.run()
    assert len(fed.rounds) == 1


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("ret-fl", "`ret-fl run --resume runs/mine`"),
        ("flwr-simulation", "`ret-fl run --resume runs/mine`"),
        ("/venv/bin/flwr-serverapp", "`flwr run . --stream --run-config 'resume=\"runs/mine\"'`"),
    ],
)
def test_too_few_nodes_stop_the_run_with_a_way_to_go_on(
    tiny: Tiny, federate: Federate, monkeypatch: pytest.MonkeyPatch, program: str, command: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    fed = federate(tiny({"min-nodes": 2, "out": "runs/mine"}))
    note = fed._note

    def dies(server_round, arrays):  # type: ignore[no-untyped-def]
        if server_round == 1:
            del fed.grid.contexts[SECOND]
        return note(server_round, arrays)

    fed._note = dies  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(FederationError, match=rf"round 2: 1 of min-nodes=2.*{re.escape(command)}"):
        fed.run()
    assert time.monotonic() - began < 30
    assert len(fed.rounds) == 1


def test_a_node_that_comes_back_is_used_again(
    tiny: Tiny, federate: Federate, flower_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = federate(tiny({"num-server-rounds": 3}))
    # measured in rounds of milliseconds they would differ by chance
    monkeypatch.setattr(fed.strategy.roster, "speed_of", lambda node: 100.0)
    note, away = fed._note, {}

    def comes_and_goes(server_round, arrays):  # type: ignore[no-untyped-def]
        if server_round == 1:
            away[SECOND] = fed.grid.contexts.pop(SECOND)
        if server_round == 2:
            fed.grid.contexts.update(away)
        return note(server_round, arrays)

    fed._note = comes_and_goes  # type: ignore[method-assign]
    with flower_log.at_level(logging.WARNING):
        fed.run()
    used = [set(summary.partitions.values()) for summary in fed.rounds]
    assert used[:2] == [{0, 1}, {0}]
    assert not any(summary.failures for summary in fed.rounds)
    assert used[2] == {0, 1}
