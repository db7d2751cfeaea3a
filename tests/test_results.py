"""What a study's rows say over seeds: exact on rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ret_fl.audit.schema import Interval
from ret_fl.config import RunConfig, Scalar
from simulations.results import (
    Point,
    ResultsFile,
    Row,
    at_precision,
    cr_interval,
    curve,
    early_stop_fd,
    of_seeds,
    same_training,
)


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "dataset": "digits",
        "method": "central",
        "seed": 0,
        "share": 1.0,
        "images": 100,
        "settings": {},
        "rounds": 20,
        "skip_rate": 0.0,
        "moved": 0,
        "quarantined": 0,
        "mq_15": 0.2,
        "mq_15_floor": 0.1,
        "cr": Interval(value=0.1, low=0.08, high=0.12),
        "cr_floor": Interval(value=0.01, low=0.0, high=0.02),
        "cr_shift": 0.2,
        "canary_copies": 0.05,
        "distinct": 5,
        "fd": 2.0,
        "kid": 0.1,
        "precision": 0.8,
        "recall": 0.5,
        "confident": None,
        "fd_real": 1.0,
        "precision_real": 0.9,
        "auc": None,
        "seconds": 1.0,
    }
    return Row.model_validate(values | changes)


def point(cr: float, fd: float, precision: float = 0.5, share: float = 1.0) -> Point:
    return Point([row(cr=Interval(value=cr, low=cr, high=cr), fd=fd, precision=precision, share=share)])


def test_the_interval_over_seeds_is_students() -> None:
    three = Point([row(seed=s, fd=fd) for s, fd in enumerate((1.0, 2.0, 3.0))])
    low, high = three.interval(lambda r: r.fd) or (0, 0)
    # t(.975, 2) = 4.30265, sd 1, root 3
    assert (low, high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)
    assert three.fd == 2.0


def test_one_seed_has_the_interval_of_its_audit_and_shares_stay_shares() -> None:
    assert cr_interval(Point([row()])) == (0.08, 0.12)
    wide = Point([row(seed=s, cr=Interval(value=v, low=v, high=v)) for s, v in enumerate((0.0, 0.0, 0.03))])
    assert cr_interval(wide)[0] == 0.0


def test_early_stopping_may_use_every_length_at_which_it_copies_no_more() -> None:
    central = [point(0.0, 9.0), point(0.02, 5.0), point(0.1, 3.0), point(0.2, 4.0)]
    assert early_stop_fd(central, 0.0) == 9.0
    assert early_stop_fd(central, 0.02) == 5.0
    assert early_stop_fd(central, 0.06) == pytest.approx(4.0)  # half way from (.02, 5) to (.1, 3)
    assert early_stop_fd(central, 0.5) == 3.0  # not the last, the best
    assert early_stop_fd(central[1:], 0.01) == 5.0  # none copies as little: the least copying one


def test_equal_precision_lies_between_points_on_a_line() -> None:
    points = [point(0.0, 9.0, 0.4, 0.5), point(0.02, 5.0, 0.6, 1.0), point(0.1, 3.0, 0.8, 2.0)]
    assert at_precision(points, 0.3) == (0.5, 0.0, 9.0)
    assert at_precision(points, 0.7) == pytest.approx((1.5, 0.06, 4.0))
    assert at_precision(points, 0.9) is None


def test_a_curve_holds_only_points_of_all_seeds() -> None:
    rows = [row(seed=s, share=share) for s in (0, 1) for share in (0.5, 1.0)] + [row(share=0.25), row(share=2.0)]
    assert [(p.share, len(p.rows)) for p in curve(rows, "digits", "central")] == [(0.5, 2), (1.0, 2), (2.0, 1)]


def test_a_curve_of_some_seeds_has_the_points_that_all_of_them_reached() -> None:
    rows = [row(seed=s, fd=float(s)) for s in (0, 1)] + [row(seed=1, share=1.5, fd=4.0), row(share=2.0, fd=6.0)]
    points = curve(rows, "digits", "central")
    assert [(p.share, p.fd) for p in of_seeds(points, {0, 1})] == [(1.0, 0.5)]
    assert [(p.share, p.fd) for p in of_seeds(points, {0})] == [(1.0, 0.0), (2.0, 6.0)]


def test_rows_of_a_file_with_other_defaults_keep_their_settings(tmp_path: Path) -> None:
    ours, theirs = ResultsFile(tmp_path / "ours.jsonl"), ResultsFile(tmp_path / "theirs.jsonl")
    ours.defaults["optimizer.lr"] = 1.0  # begun when that was the default
    config = RunConfig.from_flat({"shards": 7})
    theirs.add([row(settings=theirs.difference(config))])
    ours.take(theirs)
    (taken,) = ResultsFile(ours.path).rows
    assert taken.settings == {"shards": 7, "optimizer.lr": RunConfig().optimizer.lr}
    assert ours.find(taken.cell, 1.0, config) == taken


def test_settings_that_do_nothing_do_not_tell_trainings_apart() -> None:
    def config(**changes: Scalar) -> RunConfig:
        return RunConfig.from_flat({"redistribution.policy": "none", "agc.mode": "off"} | changes)

    plain = config()
    for idle in (
        {"agc.mem-ratio": 3.0},
        {"quarantine.z": -1.0},
        {"taa.kappa": 2.0},
        {"redistribution.fraction": 0.3},
    ):
        assert same_training(plain, config(**idle))
    assert same_training(plain, config(seed=3))
    for change in ({"agc.mode": "agc"}, {"redistribution.policy": "quarantine"}, {"optimizer.lr": 0.1}):
        assert not same_training(plain, config(**change))
    apart = config(**{"aggregate-every": 0})
    assert not same_training(apart, config(**{"aggregate-every": 0, "ensemble": "average"}))
    near: dict[str, Scalar] = {"data.near-duplicates": "cosine", "data.duplicates": "keep"}
    kept = config(**{"data.duplicates": "keep"})
    assert same_training(config(**{"data.canary-jitter": 4.0}), plain)
    for change in (near | {"partition.clusters": "spread"}, near | {"data.duplicates": "drop"}):
        assert not same_training(kept, config(**change))
    assert not same_training(plain, config(**{"data.near-duplicates": "cosine"}))
    assert not same_training(config(**{"data.canaries": 2}), config(**{"data.canaries": 2, "data.canary-jitter": 4.0}))
    gated = config(**{"agc.mode": "agc"})
    assert not same_training(gated, config(**{"agc.mode": "agc", "agc.mem-ratio": 3.0}))


def test_rows_survive_the_file_and_a_later_default_does_not_hide_a_difference(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    config = RunConfig.from_flat({"agc.mem-ratio": 2.0, "shards": 7})
    file.add([row(settings=file.difference(config))])
    again = ResultsFile(file.path)
    assert again.rows == file.rows and again.rows[0].settings == {"agc.mem-ratio": 2.0, "shards": 7}
    assert again.find(("digits", "central", 0), 1.0, config) == again.rows[0]
    assert again.find(("digits", "central", 0), 1.0, RunConfig()) is None
    # the file was begun when shards was 7 by default: today's default is a difference, and 7 is none
    again.defaults["shards"] = 7
    assert again.difference(RunConfig()) == {"shards": RunConfig().shards}
    # a setting younger than the file counts only where it is off its default
    del again.defaults["agc.mem-ratio"]
    assert again.difference(RunConfig.from_flat({"shards": 7})) == {}
    assert again.difference(config) == {"agc.mem-ratio": 2.0}


def test_a_newer_row_of_the_same_point_replaces_the_older(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.jsonl")
    file.add([row(fd=1.0), row(seed=1)])
    file.add([row(fd=3.0)])
    assert [(r.seed, r.fd) for r in ResultsFile(file.path).rows] == [(0, 3.0), (1, 2.0)]
