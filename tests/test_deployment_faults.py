"""Real SuperLink, SuperNodes and client processes, and a kill -9 in the middle: the run ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY, run_server

from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.deploy.local import LocalFederation, local_federation
from ret_fl.engines import submit
from ret_fl.ledger import ShardLedger
from ret_fl.rundir import RunDir
from ret_fl.settings import new_run

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

Victim = Callable[[LocalFederation, float], psutil.Process]


def a_supernode(running: LocalFederation, since: float) -> psutil.Process:
    name = next(n for n in running.processes if n.startswith("SuperNode"))
    return psutil.Process(running.processes.pop(name).pid)


def a_client(running: LocalFederation, since: float) -> psutil.Process:
    """The process, begun after `since`, in which a SuperNode's ClientApp has worked longest."""
    found = [
        child
        for name, process in running.processes.items()
        if name.startswith("SuperNode")
        for child in psutil.Process(process.pid).children(recursive=True)
        if "clientapp" in child.name() and child.create_time() > since
    ]
    assert found, "no ClientApp process came up"
    return max(found, key=lambda process: process.cpu_times().user)


def kill_after_round(running: LocalFederation, run: RunDir, round: int, victim: Victim, killed: list[int]) -> None:
    while len(run.rows()) < round:
        time.sleep(0.1)
    since = time.time()
    # a client says so when it begins to train; one killed while it starts is started again by Flower
    training = f"no usable state of round {round} here"
    while training not in (run.path / "flower.log").read_text(errors="replace"):
        time.sleep(0.1)
    found = victim(running, since)
    for process in [*found.children(recursive=True), found]:
        process.send_signal(signal.SIGKILL)
    killed.append(found.pid)


@pytest.mark.parametrize("victim", [a_supernode, a_client])
def test_a_kill_in_mid_round_changes_nothing_of_the_outcome(tmp_path: Path, victim: Victim) -> None:
    settings: dict[str, Scalar] = TINY | {
        "num-server-rounds": 3,
        "local-epochs": 400,
        "wait-seconds": 120,
        # every node keeps its moments on a disk of its own: a stand-in has none of them
        "optimizer.carry-moments": False,
    }
    run, config = new_run(settings, tmp_path / "run")
    killed: list[int] = []
    with local_federation(tmp_path / "federation", 2, run.path / "flower.log", tls=False) as running:
        killer = threading.Thread(target=kill_after_round, args=(running, run, 1, victim, killed), daemon=True)
        killer.start()
        submit(ROOT, run, config, dict(os.environ) | dict(running.environment))
        killer.join(timeout=5)
    assert killed, "nothing was killed"
    rows = run.rows()
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert not any(row["failures"] for row in rows)
    assert [again["shard"] for row in rows for again in row["resent"]], "no order was sent again"
    ledger = ShardLedger.load(run.ledger)
    ledger.check()
    undisturbed = run_server(RunConfig.from_flat(settings), tmp_path / "undisturbed")
    expected, found = load_latest(undisturbed.checkpoints), load_latest(run.checkpoints)
    np.testing.assert_array_equal(ledger.shard, ShardLedger.load(undisturbed.ledger).shard)
    for name, weights in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], weights, rtol=1e-4, atol=1e-6, err_msg=name)
