"""Real SuperLink and SuperNodes, of which some die and come back, send nonsense or have other data: the run goes on."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY, copied_app, run_server
from pictures import grey_pictures, one_pixel_changed
from test_deployment_faults import a_supernode, assert_as_undisturbed, kill_after_round

import ret_fl.deploy.local
from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.deploy.federation import Federation, SuperNode, parse_federation
from ret_fl.deploy.local import LocalFederation, local_federation, loopback_federation
from ret_fl.engines import submit
from ret_fl.events import ANSWERED, BACK, FAILED, GONE, JOINED, REFUSED, Event
from ret_fl.files import read_lines
from ret_fl.rundir import RunDir
from ret_fl.settings import new_run

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

DEPLOYED: dict[str, Scalar] = TINY | {
    "min-nodes": 2,
    "wait-seconds": 300,
    # every node keeps its moments on a disk of its own: a stand-in has none of them
    "optimizer.carry-moments": False,
}


def events_of(run: RunDir, partition: int) -> list[Event]:
    """All that is told of a node, from its introduction."""
    events = read_lines(run.events)
    (node,) = {e["node"] for e in events if e["event"] in (JOINED, REFUSED) and e["partition"] == partition}
    return [e for e in events if e.get("node") == node]


def rounds_of(events: list[Event], kind: str) -> list[int]:
    return [e["round"] for e in events if e["event"] == kind]


@contextmanager
def started_as_by_its_unit(running: LocalFederation, node: SuperNode, killed: threading.Thread) -> Iterator[list[int]]:
    """A SuperNode, once killed, is started whenever it has ended, after the unit's pause: the exit codes so far."""
    unit = (running.kit.host(node.host) / "ret-fl-supernode@.service").read_text()
    assert {"Restart=always", "StartLimitIntervalSec=0"} <= set(unit.splitlines())
    pause = re.search(r"^RestartSec=(\d+)$", unit, re.MULTILINE)
    assert pause
    ended: list[int] = []
    over = threading.Event()

    def keep_running() -> None:
        killed.join()
        while not over.wait(float(pause[1])):
            process = running.start_supernode(node)
            while process.poll() is None and not over.is_set():
                over.wait(0.2)
            if process.returncode is not None:
                ended.append(process.returncode)

    keeper = threading.Thread(target=keep_running, daemon=True)
    keeper.start()
    try:
        yield ended
    finally:
        over.set()
        keeper.join(timeout=60)


def test_a_killed_supernode_is_refused_until_its_minute_is_over_and_then_trains_again(tmp_path: Path) -> None:
    """And all shards, as the other is killed in the round after."""
    settings = DEPLOYED | {"num-server-rounds": 3, "local-epochs": 150}
    run, config = new_run(settings, tmp_path / "run")
    killed: list[psutil.Process] = []
    with local_federation(tmp_path / "federation", 2, run.path / "flower.log", tls=True) as running:
        victim, other = running.federation.supernodes
        killers = [
            threading.Thread(target=kill_after_round, args=(running, run, round, a_supernode, killed), daemon=True)
            for round in (1, 2)
        ]
        for killer in killers:
            killer.start()
        with started_as_by_its_unit(running, victim, killers[0]) as ended:
            submit(ROOT, run, config, dict(os.environ) | dict(running.environment))
        assert running.processes[f"SuperNode {victim.name}"].poll() is None
    assert len(killed) == 2 and ended and set(ended) == {1}, (killed, ended)
    assert (run.path / "flower.log").read_text(errors="replace").count("Exit Code: 305") == len(ended)
    rows = run.rows()
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert not any(row["failures"] for row in rows)
    assert [again["shard"] for row in rows[:2] for again in row["resent"]] == [0]
    assert rows[2]["resent"], "no order was sent again"  # one where rounds are so long that the other is back for it
    told = events_of(run, victim.partition)  # of one node: it is back under the ID that it had
    # one that is back within the half second in which the server did not look was not seen to go
    unseen = "far behind" in rows[1]["resent"][0]["why"]
    assert [e["event"] for e in told if e["event"] in (GONE, BACK)] == ([] if unseen else [GONE, BACK])
    assert rounds_of(told, ANSWERED) == [1, 3, 3]
    assert rounds_of(events_of(run, other.partition), ANSWERED) == [1, 2, 2]
    assert_as_undisturbed(run, run_server(RunConfig.from_flat(settings), tmp_path / "undisturbed"))


SPOILED = """

from dataclasses import replace

from ret_fl.packing import unpack_state
from ret_fl.protocol import TrainReport

honest, app = app, ClientApp()
app.query()(honest)


@app.train()
def spoil(message: Message, context: Context) -> Message:
    round = TrainOrder.unpack(message.content)[0].round
    reply = honest(message, context)
    if context.node_config["partition-id"] != 1 or not 2 <= round <= 6:
        return reply
    report, weights = TrainReport.unpack(reply.content)
    state = unpack_state(weights)
    first = next(iter(state))
    if round == 2:
        state[first].fill(float("nan"))
    elif round == 3:
        state[first] = state[first][..., :1]
    else:
        lies = {4: {"ids": report.ids + 1000}, 5: {"round": 4}, 6: {"num_examples": 0}}
        report = replace(report, **lies[round])
    return Message(report.pack(state), reply_to=message)
"""
"""What the app of a hostile node has more: from the second round to the sixth it sends nonsense."""

EQUALLY_FAST = """

# measured in rounds of milliseconds they would differ by chance, and the hostile node have no shard in some round
Roster.speed_of = lambda self, node: 100.0
"""
NONSENSE = ["is not finite", "other names or shapes", "does not own", "answers round 4", "0 examples"]


def test_nonsense_of_a_node_and_other_data_of_another_change_nothing_of_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = grey_pictures(tmp_path / "pictures")
    other = one_pixel_changed(pictures, tmp_path / "other")

    def third_has_other_data(*arguments: object, **more: object) -> Federation:
        table = loopback_federation(*arguments, **more).model_dump(mode="json", by_alias=True, exclude_none=True)  # type: ignore[arg-type]
        table["hosts"][2]["data-path"] = str(other)
        return parse_federation(table)

    monkeypatch.setattr(ret_fl.deploy.local, "loopback_federation", third_has_other_data)
    app = copied_app(tmp_path / "app")
    for file, more in (("clients/training.py", SPOILED), ("server/app.py", EQUALLY_FAST)):
        with (app / file).open("a") as code:
            code.write(more)
    settings = DEPLOYED | {
        "num-server-rounds": 7,
        "data.source": "image-folder",
        "data.path": str(pictures),
        "data.limit": 0,
        "data.cache-dir": str(tmp_path / "cache"),
    }
    run, config = new_run(settings, tmp_path / "run")
    with local_federation(tmp_path / "federation", 3, run.path / "flower.log", tls=True) as running:
        submit(app, run, config, dict(os.environ) | dict(running.environment))
    rows = run.rows()
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert not any(row["failures"] for row in rows)
    told = [(row["round"], again["shard"], again["why"]) for row in rows for again in row["resent"]]
    assert [(round, shard) for round, shard, _ in told] == [(round, 1) for round in range(2, 7)]
    assert all(said in why for said, (_, _, why) in zip(NONSENSE, told, strict=True)), told
    assert [row["shards"]["1"]["partition"] for row in rows] == [1, 0, 0, 0, 0, 0, 1]
    failed = [(e["round"], e["shard"], e["why"]) for e in events_of(run, 1) if e["event"] == FAILED]
    assert failed == told
    (refused,) = events_of(run, 2)
    own, others = (load_splits(config.data.model_copy(update={"path": str(p)})).train for p in (pictures, other))
    assert refused["event"] == REFUSED
    assert own.fingerprint[:16] in refused["why"] and others.fingerprint[:16] in refused["why"]
    assert all(np.isfinite(w).all() for w in load_latest(run.checkpoints).weights.values())
    assert_as_undisturbed(run, run_server(RunConfig.from_flat(settings), tmp_path / "undisturbed"))
