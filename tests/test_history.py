"""Where a sample was in every round: what is written of real runs, and what `ret-fl show --sample` tells of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ret_fl, run_server
from federations import Recorder, spoiling
from flwr.app import Message
from outcomes import SETTINGS, killed_at

from ret_fl.config import RunConfig, Scalar
from ret_fl.history import read_phases
from ret_fl.ledger import ShardLedger
from ret_fl.rundir import RunDir

Tiny = Callable[..., RunConfig]
MOVING: dict[str, Scalar] = {"redistribution.policy": "random", "num-server-rounds": 3, "quarantine.min-draws": 1}


def test_every_round_tells_the_orders_and_the_reports(tiny: Tiny, tmp_path: Path) -> None:
    seen = Recorder()
    run = run_server(tiny(SETTINGS, MOVING), tmp_path / "run", seen)
    phases = list(read_phases(run.history))
    assert [phase.round for phase in phases] == [1, 2, 3]
    for _, order in seen.orders:
        phase = phases[order.round - 1]
        np.testing.assert_array_equal(np.flatnonzero(phase.shard == order.shard), order.ids)
        assert not len(phase.lost)
    for report, _ in seen.replies:
        phase = phases[report.round - 1]
        np.testing.assert_array_equal(phase.visits[report.ids], report.visits)
        np.testing.assert_array_equal(phase.skips[report.ids], report.skips)
    ledger = ShardLedger.load(run.ledger)
    np.testing.assert_array_equal(sum(phase.visits.astype(int) for phase in phases), ledger.visits)
    np.testing.assert_array_equal(sum(phase.skips.astype(int) for phase in phases), ledger.skips)
    assert sum((a.shard != b.shard).sum() for a, b in pairwise(phases)) == sum(row["moved"] for row in run.rows())


def test_show_follows_a_sample_through_the_rounds(tiny: Tiny, tmp_path: Path) -> None:
    def silent(request: Message, reply: Message) -> None:
        reply.content.clear()

    config = tiny(SETTINGS, MOVING, {"retries": 0})
    run = run_server(config, tmp_path / "run", spoiling(1, silent, rounds=(2,)))
    phases = list(read_phases(run.history))
    moved = int(np.flatnonzero((phases[0].shard == 0) & (phases[1].shard == 1) & (phases[2].shard == 1))[0])
    visits = [int(phase.visits[moved]) for phase in phases]
    assert visits[1] == 0 and phases[1].lost.tolist() == [1]
    shown = ret_fl("show", run.path, "--sample", moved).output.replace("\n", " ")
    assert f"round 1: in shard 0, visited {visits[0]} times, skipped {phases[0].skips[moved]}" in shown
    assert f"rounds 2 to 3: in shard 1, visited {visits[2]} times" in shown
    assert "the shard was not trained in round 2" in shown
    assert "moved 1 time;" in shown and "after round 1 it went from shard 0 to shard 1" in shown


def test_a_resumed_run_has_the_history_of_an_uninterrupted_one(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(SETTINGS, MOVING)
    killed_at(config, tmp_path / "run", 3, 0)
    run_server(config, tmp_path / "run", resume=True)
    run_server(config, tmp_path / "whole")
    both = [list(read_phases(RunDir(tmp_path / name).history)) for name in ("run", "whole")]
    assert len(both[0]) == len(both[1]) == 3
    for ours, theirs in zip(*both, strict=True):
        for name in ("round", "shard", "visits", "skips", "lost"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(("change", "words"), [("no history", "has no history/"), ("tails", "report=tails")])
def test_show_says_what_it_cannot_know(tiny: Tiny, tmp_path: Path, change: str, words: str) -> None:
    run = run_server(tiny({"num-server-rounds": 1, "report": "tails"}), tmp_path / "run")
    if change == "no history":
        for file in run.history.iterdir():
            file.unlink()
    assert words in ret_fl("show", run.path, "--sample", 3).output.replace("\n", " ")
