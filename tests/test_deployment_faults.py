"""Real SuperLink, SuperNodes and client processes, and a kill -9 in the middle: the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY, run_server
from rich.console import Console

from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.deploy.local import SUPERLINK, LocalFederation, local_federation, workers
from ret_fl.engines import RunFailedError, submit
from ret_fl.ledger import ShardLedger
from ret_fl.rundir import RunDir
from ret_fl.settings import new_run
from ret_fl.superlink_status import superlink_status

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

Victim = Callable[[LocalFederation, int], psutil.Process]
"""Of the processes of a federation, in which a node trains."""


def a_supernode(running: LocalFederation, node: int) -> psutil.Process:
    name = next(n for n in running.processes if n.startswith("SuperNode"))
    return psutil.Process(running.processes.pop(name).pid)


def workers_with(running: LocalFederation, **identity: int) -> set[psutil.Process]:
    """The workers that have this in common with the orders they carry out."""
    told = {w: json.loads(w.cmdline()[-1])["identity"] for w in workers(Path(running.federation.folder))}
    return {worker for worker, about in told.items() if identity.items() <= about.items()}


def a_client(running: LocalFederation, node: int) -> psutil.Process:
    """The living client process whose worker trains; without workers, that which has worked longest."""
    found = [
        child
        for name, process in running.processes.items()
        if name.startswith("SuperNode")
        for child in psutil.Process(process.pid).children(recursive=True)
        if "clientapp" in child.name() and child.status() != psutil.STATUS_ZOMBIE
    ]
    owners = {parent for child in found if workers_with(running, owner=(parent := child.ppid()), node=node)}
    found = [child for child in found if not owners or child.ppid() in owners]
    assert found, "no ClientApp process came up"
    return max(found, key=lambda process: process.cpu_times().user)


def a_worker(running: LocalFederation, node: int) -> psutil.Process:
    """The worker of the node that has begun to train."""
    assert len(workers(Path(running.federation.folder))) == 2
    (found,) = workers_with(running, node=node)
    return found


def kill_after_round(
    running: LocalFederation, run: RunDir, round: int, victim: Victim, killed: list[psutil.Process]
) -> None:
    """Kill once the next round trains; `killed` gets the victim and, of a client process, the worker that goes too."""
    while len(run.rows()) < round:
        time.sleep(0.1)
    # a client says so when it begins to train; one killed while it starts is started again by Flower
    training = re.compile(rf"order begun: .*\bround={round + 1}\b.*\bnode=(\d+)")
    while not (begun := training.search((run.path / "flower.log").read_text(errors="replace"))):
        time.sleep(0.1)
    found = victim(running, int(begun[1]))
    with_it = workers_with(running, owner=found.ppid()) if victim is a_client else set()
    for process in [*found.children(recursive=True), found]:
        process.send_signal(signal.SIGKILL)
    killed += [found, *with_it]


def the_server_app(running: LocalFederation, node: int) -> psutil.Process:
    """Flower's process for it; others that it started have the same command line and little work."""
    family = psutil.Process(running.processes[SUPERLINK].pid).children(recursive=True)
    found = [process for process in family if "serverapp" in process.name()]
    assert found, [process.cmdline() for process in family]
    return max(found, key=lambda process: process.cpu_times().user)


def the_superlink(running: LocalFederation, node: int) -> psutil.Process:
    return psutil.Process(running.processes[SUPERLINK].pid)


@pytest.mark.parametrize("victim", [the_server_app, the_superlink])
def test_a_run_whose_server_is_killed_goes_on_where_it_was(
    tmp_path: Path, victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Scalar] = TINY | {"num-server-rounds": 3, "local-epochs": 200, "wait-seconds": 240}
    run, config = new_run(settings, tmp_path / "run")
    killed: list[psutil.Process] = []
    with local_federation(tmp_path / "federation", 2, run.path / "flower.log", tls=True) as running:
        killer = threading.Thread(target=kill_after_round, args=(running, run, 1, victim, killed), daemon=True)
        killer.start()
        environment = dict(os.environ) | dict(running.environment)
        with pytest.raises(RunFailedError):
            submit(ROOT, run, config, environment)
        killer.join(timeout=5)
        assert killed, "nothing was killed"
        assert [row["round"] for row in run.rows()] == [1]
        if victim is the_superlink:
            running.start_superlink()
        submit(ROOT, run, run.read_config(), environment, resuming=True)
        monkeypatch.setenv("FLWR_HOME", environment["FLWR_HOME"])
        shown = Console(width=200)
        with shown.capture() as captured:
            shown.print(superlink_status(running.federation.name))
        assert captured.get().count("online") >= 2, captured.get()
        assert f"{run.path}: 3 of 3 rounds, finished" in captured.get(), captured.get()
    assert [row["round"] for row in run.rows()] == [1, 2, 3]
    undisturbed = run_server(RunConfig.from_flat(settings), tmp_path / "undisturbed")
    assert_as_undisturbed(run, undisturbed)


def assert_as_undisturbed(run: RunDir, undisturbed: RunDir) -> None:
    """No sample lost or doubled, and the same weights, to the tolerance of floats."""
    ledger = ShardLedger.load(run.ledger)
    ledger.check()
    expected, found = load_latest(undisturbed.checkpoints), load_latest(run.checkpoints)
    np.testing.assert_array_equal(ledger.shard, ShardLedger.load(undisturbed.ledger).shard)
    for name, weights in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], weights, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("victim", "worker"), [(a_supernode, True), (a_client, True), (a_client, False), (a_worker, True)]
)
def test_a_kill_in_mid_round_changes_nothing_of_the_outcome(tmp_path: Path, victim: Victim, worker: bool) -> None:
    settings: dict[str, Scalar] = TINY | {
        "num-server-rounds": 3,
        "local-epochs": 400,
        "wait-seconds": 120,
        # every node keeps its moments on a disk of its own: a stand-in has none of them
        "optimizer.carry-moments": False,
    }
    run, config = new_run(settings, tmp_path / "run")
    killed: list[psutil.Process] = []
    log = run.path / "flower.log"
    with local_federation(tmp_path / "federation", 2, log, tls=True, worker=worker) as running:
        killer = threading.Thread(target=kill_after_round, args=(running, run, 1, victim, killed), daemon=True)
        killer.start()
        submit(ROOT, run, config, dict(os.environ) | dict(running.environment))
        killer.join(timeout=5)
        assert not set(killed) & workers(Path(running.federation.folder))
    assert len(killed) == 1 + (worker and victim is a_client), killed
    rows = run.rows()
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert not any(row["failures"] for row in rows)
    assert [again["shard"] for row in rows for again in row["resent"]], "no order was sent again"
    assert_as_undisturbed(run, run_server(RunConfig.from_flat(settings), tmp_path / "undisturbed"))
