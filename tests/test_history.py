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

from ret_fl.auditing import data_of
from ret_fl.background import background_of
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.history import read_phases
from ret_fl.ledger import ShardLedger
from ret_fl.rundir import RunDir

Tiny = Callable[..., RunConfig]
MOVING: dict[str, Scalar] = {"redistribution.policy": "random", "num-server-rounds": 3, "quarantine.min-draws": 1}


def shown(run: RunDir, *more: object) -> str:
    """What `ret-fl show` prints, however its lines are broken."""
    return " ".join(ret_fl("show", run.path, *more).output.split()) + " "


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


def test_the_default_skips_nothing_before_usual_losses_are_known_and_some_afterwards(
    tiny: Tiny, tmp_path: Path
) -> None:
    own: dict[str, Scalar] = {"agc.usual-share": 0.5, "agc.bins": 5, "agc.bias-correct": True, "num-server-rounds": 4}
    seen = Recorder()
    run = run_server(tiny(SETTINGS, {"agc.mode": RunConfig().agc.mode}, own), tmp_path / "run", seen)
    usual = ShardLedger.load(run.ledger).usual
    draws, sums = np.zeros(len(usual)), np.zeros(len(usual))
    reports = sorted((report for report, _ in seen.replies), key=lambda report: report.round)
    for report in reports[: len(reports) // 2]:
        draws[report.ids] += report.draws
        sums[report.ids] += report.log_ratio_sum
    known = draws > 0
    np.testing.assert_allclose(usual[known], (sums[known] / draws[known]).astype(np.float32))
    assert f", {usual[known][0]:+.2f} over the first rounds " in shown(run, "--sample", np.flatnonzero(known)[0])
    for _, order in seen.orders:
        assert np.isnan(order.usual).all() if order.round <= 2 else np.isfinite(order.usual[known[order.ids]]).all()
    skips = [report.skips.sum() for report in reports]
    assert sum(skips[: len(skips) // 2]) == 0 and min(skips[len(skips) // 2 :]) > 0


def test_show_follows_a_sample_through_the_rounds(tiny: Tiny, tmp_path: Path) -> None:
    def silent(request: Message, reply: Message) -> None:
        reply.content.clear()

    config = tiny(SETTINGS, MOVING, {"retries": 0})
    run = run_server(config, tmp_path / "run", spoiling(1, silent, rounds=(2,)))
    phases = list(read_phases(run.history))
    moved = int(np.flatnonzero((phases[0].shard == 0) & (phases[1].shard == 1) & (phases[2].shard == 1))[0])
    visits = [int(phase.visits[moved]) for phase in phases]
    assert visits[1] == 0 and phases[1].lost.tolist() == [1]
    text = shown(run, "--sample", moved)
    assert f"round 1: in shard 0, visited {visits[0]} times, skipped {phases[0].skips[moved]}" in text
    assert f"rounds 2 to 3: in shard 1, visited {visits[2]} times" in text
    assert "the shard was not trained in round 2" in text
    assert "moved 1 time;" in text and "after round 1 it went from shard 0 to shard 1" in text


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
    assert words in shown(run, "--sample", 3)


@pytest.mark.parametrize("handling", ["drop", "weight", "keep"])
def test_show_says_what_orders_say_of_copies(tiny: Tiny, tmp_path: Path, handling: str) -> None:
    copies: dict[str, Scalar] = {"data.canaries": 1, "data.canary-repeats": 3, "data.duplicates": handling}
    seen = Recorder()
    run = run_server(tiny(copies, {"num-server-rounds": 1}), tmp_path / "run", seen)
    ordered = {int(i): float(p) for _, o in seen.orders for i, p in zip(o.ids, o.probability, strict=True)}
    first, *others = load_splits(run.read_config().data).canaries[0].tolist()
    other = next(i for i in range(24) if i != first)

    told = {"drop": "visited with probability 1 ", "weight": "probability 0.333, as one of 3 copies ", "keep": "ty 1 "}
    assert told[handling] in shown(run, "--sample", first)
    assert "visited with probability 1 " in shown(run, "--sample", other)
    dropped = others if handling == "drop" else []
    assert [i for i, p in ordered.items() if p == 0] == dropped
    assert background_of(run, data_of(run.read_config())).dropped.tolist() == dropped
    for sample in dropped:
        text = shown(run, "--sample", sample)
        assert "dropped: a copy of another sample is visited instead" in text and "probability" not in text
    assert ("2 samples dropped: a copy of each is visited instead" in shown(run)) == bool(dropped)


def test_show_has_no_counts_where_clients_tell_none(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    private: dict[str, Scalar] = {
        "dp.mode": "server-fixed", "redistribution.policy": "none", "data.duplicates": "keep", "agc.mode": "off",
        "quorum": 1.0, "num-server-rounds": 2,
    }  # fmt: skip
    run = run_server(tiny(private), tmp_path / "run")
    for more in ((), ("--sample", 3)):
        text = shown(run, *more)
        assert "visits, skips and losses of samples: not reported under dp.mode=server-fixed" in text
        assert not any(word in text for word in ("visited 0", "0.0% of", "log-ratio"))
        assert text.count("not reported") == (1 if more else 5)  # of two shards neither visits nor skips
    assert f"rounds 1 to 2: in shard {ShardLedger.load(run.ledger).shard[3]} " in text


def test_a_ledger_of_a_version_without_copies_and_usual_losses_is_read(tmp_path: Path) -> None:
    ledger = ShardLedger.start(np.array([0, 1, 1]), 2)
    ledger.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as saved:
        np.savez(tmp_path / "old.npz", **{name: saved[name] for name in saved if name not in ("copies", "usual")})
    old = ShardLedger.load(tmp_path / "old.npz")
    assert old.copies.tolist() == [1, 1, 1] and np.isnan(old.usual).all()
