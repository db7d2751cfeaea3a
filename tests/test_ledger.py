"""Every sample is in exactly one shard, whatever is asked of the ledger; what it refuses changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ret_fl.ledger import LedgerError, Moves, ShardLedger
from ret_fl.protocol import TrainReport

COLUMNS = [f.name for f in fields(ShardLedger)]


def ledger_of(*sizes: int) -> ShardLedger:
    """Shard 0 owns the first sizes[0] samples, and so on."""
    return ShardLedger.start(np.repeat(np.arange(len(sizes)), sizes).astype(np.int32), len(sizes))


def report(shard: int, ids: Any, **changes: Any) -> TrainReport:
    """A sound report of ids (int64 [m]): two visits, one of them skipped, one draw each."""
    ids = np.asarray(ids, np.int64)
    ones = np.ones(len(ids), np.int64)
    sound: dict[str, Any] = {
        "shard": shard,
        "round": 1,
        "num_examples": max(1, len(ids)),
        "images": 1,
        "seconds": 1.0,
        "loss": 1.0,
        "skip_rate": 0.5,
        "spread": 1.0,
        "start": "global",
        "moments": "fresh",
        "ids": ids,
        "visits": 2 * ones,
        "skips": ones,
        "draws": ones,
        "log_ratio_sum": 0.5 * ones,
        "strength": ones.astype(np.float32),
        "memorized": np.empty(0, np.int64),
        "memorized_score": np.empty(0, np.float32),
        "high_loss": np.empty(0, np.int64),
        "high_loss_score": np.empty(0, np.float32),
        "bank_values": np.zeros(10, np.float32),
        "bank_visits": np.zeros(10, np.int64),
        "bin_mean": np.zeros(50),
        "bin_count": np.zeros(50, np.int64),
        "level_draws": np.zeros(50, np.int64),
        "level_skips": np.zeros(50, np.int64),
    }
    return TrainReport(**(sound | changes))


def moves(*triples: tuple[int, int, int]) -> Moves:
    ids, source, target = (np.array(column) for column in zip(*triples, strict=True))
    return Moves(ids.astype(np.int64), source.astype(np.int32), target.astype(np.int32))


def same(a: ShardLedger, b: ShardLedger) -> bool:
    unknown = ("usual",)
    return all(np.array_equal(getattr(a, c), getattr(b, c), equal_nan=c in unknown) for c in COLUMNS)


def refuses(ledger: ShardLedger, action: Callable[[ShardLedger], None], message: str) -> None:
    before = copy.deepcopy(ledger)
    with pytest.raises(LedgerError, match=message):
        action(ledger)
    assert same(ledger, before)


def assert_every_sample_is_in_one_shard(ledger: ShardLedger) -> None:
    shards = [ledger.ids(k) for k in range(ledger.num_shards)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(ledger)))
    assert [len(ids) for ids in shards] == ledger.sizes().tolist()
    assert all(ids.dtype == np.int64 for ids in shards)
    ledger.check()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.data())
def test_any_sequence_of_moves_is_applied_in_full_or_refused_in_full(k: int, n: int, data: st.DataObject) -> None:
    ledger = ShardLedger.start(data.draw(npst.arrays(np.int32, n, elements=st.integers(0, k - 1))), k)
    for _ in range(data.draw(st.integers(1, 5))):
        triple = st.tuples(st.integers(-1, n), st.integers(0, k - 1), st.integers(-1, k))
        wanted = data.draw(st.lists(triple, max_size=6))
        honest = data.draw(st.booleans())
        if honest:  # what a policy does: from the owner, once, to a shard there is
            owners = {i: int(ledger.shard[i]) for i, _, _ in wanted if 0 <= i < n}
            wanted = [(i, owner, i % k) for i, owner in owners.items()]
        before = copy.deepcopy(ledger)
        proposed = moves(*wanted) if wanted else Moves.none()
        try:
            ledger.apply(proposed)
        except LedgerError:
            assert not honest
            assert same(ledger, before)
        else:
            expected = before.shard.copy()
            for i, source, target in wanted:
                assert before.shard[i] == source
                expected[i] = target
            assert np.array_equal(ledger.shard, expected)
        assert_every_sample_is_in_one_shard(ledger)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([(0, 0, 1), (6, 1, 0)], r"unknown samples: \[6\]"),
        ([(0, 0, 1), (-1, 1, 0)], r"unknown samples: \[-1\]"),
        ([(0, 0, 1), (3, 0, 1)], r"do not own them: \[3\]"),
        ([(0, 0, 1), (0, 0, 1)], "cannot move twice"),
        ([(0, 0, 1), (1, 0, 2)], r"shard numbers must be in 0\.\.1"),
        ([(0, 0, 1), (1, 0, -1)], r"shard numbers must be in 0\.\.1"),
    ],
)
def test_one_bad_move_stops_them_all(wanted: list[tuple[int, int, int]], message: str) -> None:
    refuses(ledger_of(3, 3), lambda ledger: ledger.apply(moves(*wanted)), message)


def test_a_move_resets_the_recent_counters_of_the_moved_alone() -> None:
    ledger = ledger_of(3, 3)
    ledger.absorb(report(0, [0, 1, 2]))
    ledger.apply(Moves.between(np.array([1]), 0, 1))
    assert ledger.shard.tolist() == [0, 1, 0, 1, 1, 1]
    assert ledger.recent_visits.tolist() == [2, 0, 2, 0, 0, 0]
    assert ledger.recent_skips.tolist() == [1, 0, 1, 0, 0, 0]
    assert ledger.visits.tolist() == [2, 2, 2, 0, 0, 0]
    assert ledger.skip_rate().tolist() == [0.5, 0, 0.5, 0, 0, 0]


def test_reports_add_up() -> None:
    ledger = ledger_of(3, 2)
    ledger.absorb(
        report(
            0,
            [2, 0],
            visits=np.array([4, 3]),
            skips=np.array([4, 0]),
            draws=np.array([2, 0]),
            log_ratio_sum=np.array([-3.0, 0.0]),
            strength=np.array([0.25, 0.5], np.float32),
        )
    )
    ledger.absorb(
        report(
            0,
            [2],
            visits=np.array([1]),
            skips=np.array([0]),
            draws=np.array([1]),
            log_ratio_sum=np.array([1.5]),
            strength=np.array([0.75], np.float32),
        )
    )
    ledger.absorb(report(1, [4]))
    assert ledger.visits.tolist() == [3, 0, 5, 0, 2] == ledger.recent_visits.tolist()
    assert ledger.skips.tolist() == [0, 0, 4, 0, 1] == ledger.recent_skips.tolist()
    assert ledger.draws.tolist() == [0, 0, 3, 0, 1]
    assert ledger.log_ratio_sum.tolist() == [0, 0, -1.5, 0, 0.5]
    assert ledger.strength.tolist() == [0.5, 0, 0.75, 0, 1]  # the newest
    np.testing.assert_array_equal(ledger.log_loss_ratio(), np.array([np.nan, np.nan, -0.5, np.nan, 0.5], np.float32))
    np.testing.assert_allclose(ledger.skip_rate(), [0, 0, 0.8, 0, 0.5])
    ledger.check()


def test_a_usual_log_ratio_once_known_stays_and_what_is_not_known_yet_follows() -> None:
    ledger = ledger_of(3)
    one = np.ones(1, np.int64)
    ledger.settle_usual()
    assert np.isnan(ledger.usual).all()
    ledger.absorb(report(0, [0], draws=2 * one, log_ratio_sum=-1.0 * one))
    ledger.settle_usual()
    np.testing.assert_array_equal(ledger.usual, np.array([-0.5, np.nan, np.nan], np.float32))
    ledger.absorb(report(0, [0, 2], draws=np.array([2, 1]), log_ratio_sum=np.array([-9.0, 0.25])))
    ledger.settle_usual()
    np.testing.assert_array_equal(ledger.usual, np.array([-0.5, np.nan, 0.25], np.float32))


def test_a_reported_strength_is_clipped_to_what_augmentation_means() -> None:
    ledger = ledger_of(2)
    ledger.absorb(report(0, [0, 1], strength=np.array([-1.0, 7.0], np.float32)))
    assert ledger.strength.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("shard", "ids", "changes", "message"),
    [
        (2, [0], {}, r"report of shard 2, but shards are 0\.\.1"),
        (-1, [0], {}, r"report of shard -1"),
        (0, [0, 3], {}, r"does not own: \[3\]"),
        (0, [0, 6], {}, r"does not own: \[6\]"),
        (0, [0, -1], {}, r"does not own: \[-1\]"),
        (0, [0, 0], {}, "reports a sample twice"),
        (0, [0], {"memorized": np.array([4])}, r"does not own: \[4\]"),
        (0, [0], {"high_loss": np.array([99])}, r"does not own: \[99\]"),
        (0, [0], {"skips": np.array([3])}, "impossible visit or skip counts"),
        (0, [0], {"visits": np.array([-1]), "skips": np.array([-2])}, "impossible visit or skip counts"),
        (0, [0], {"draws": np.array([-1])}, "impossible losses"),
        (0, [0], {"log_ratio_sum": np.array([np.nan])}, "impossible losses"),
        (0, [0], {"log_ratio_sum": np.array([np.inf])}, "impossible losses"),
        (0, [0], {"strength": np.array([np.nan], np.float32)}, "impossible"),
    ],
)
def test_a_report_that_cannot_be_true_is_refused(shard: int, ids: list[int], changes: dict, message: str) -> None:
    refuses(ledger_of(3, 3), lambda ledger: ledger.absorb(report(shard, ids, **changes)), message)


def test_a_report_of_nothing_is_fine() -> None:
    ledger = ledger_of(3, 3)
    before = copy.deepcopy(ledger)
    ledger.absorb(report(1, []))
    assert same(ledger, before)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 1000))
def test_a_saved_ledger_loads_as_it_was_without_pickle(
    tmp_path_factory: pytest.TempPathFactory, k: int, n: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ledger = ShardLedger.start(rng.integers(0, k, n).astype(np.int32), k)
    for shard in range(k):
        ids = ledger.ids(shard)
        ledger.absorb(report(shard, ids, log_ratio_sum=rng.normal(size=len(ids)), draws=rng.integers(0, 2, len(ids))))
    ledger.probability = rng.uniform(0.1, 1, n).astype(np.float32)
    path = tmp_path_factory.mktemp("ledger") / "ledger.npz"
    ledger.save(path)
    again = ShardLedger.load(path)
    assert same(again, ledger)
    assert all(getattr(again, c).dtype == getattr(ledger, c).dtype for c in COLUMNS if c != "num_shards")
    with np.load(path, allow_pickle=False) as saved:
        assert saved["shard"].dtype == np.int32
        np.testing.assert_array_equal(saved["log_loss_ratio"], ledger.log_loss_ratio())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": np.array([0, 2], np.int32)}, r"shard numbers must be in 0\.\.1"),
        ({"shard": np.array([0, -1], np.int32)}, r"shard numbers must be in 0\.\.1"),
        ({"probability": np.array([0.0, 1.0], np.float32)}, r"probabilities must be in \(0, 1\]"),
        ({"probability": np.array([np.nan, 1.0], np.float32)}, r"probabilities must be in \(0, 1\]"),
        ({"skips": np.array([1, 0])}, "skipped more often than it was visited"),
        ({"visits": np.array([1, 1, 1])}, r"column visits has shape \(3,\), expected \(2,\)"),
    ],
)
def test_a_damaged_ledger_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    replace(ledger_of(1, 1), **changes).save(tmp_path / "ledger.npz")
    with pytest.raises(LedgerError, match=message):
        ShardLedger.load(tmp_path / "ledger.npz")


def test_a_ledger_does_not_share_the_array_it_was_started_from() -> None:
    shard = np.zeros(3, np.int32)
    ledger = ShardLedger.start(shard, 2)
    shard[:] = 1
    assert ledger.sizes().tolist() == [3, 0]
