"""Policies move what they say they move, sizes and samples are conserved, and quarantine finds copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import fits_of, ledger_of, report, rng, with_ratios

from ret_fl import plugins
from ret_fl.config import ConfigError, RedistributionConfig, RunConfig
from ret_fl.ledger import Moves, ShardLedger
from ret_fl.loading import load
from ret_fl.redistribution import (
    balance,
    high_loss,
    is_due,
    memorized,
    parse_policy,
    propose,
    random,
    random_of_equal_number,
    shard_fits,
)

RINGS = {"memorized": memorized, "high-loss": high_loss, "random": random}


class TestShardFits:
    def test_the_worst_comes_first_and_common_noise_levels_cancel(self) -> None:
        ledger = ledger_of(3, 3, 3)
        fits = shard_fits(fits_of(ledger, 0.1, 0.4, -0.2))
        assert [f.shard for f in fits] == [1, 0, 2]
        assert fits[0].log_loss - fits[2].log_loss == pytest.approx(0.6)
        assert fits[0].error == pytest.approx(0.5 / 5000**0.5)

    def test_drawing_other_timesteps_makes_no_shard_worse(self) -> None:
        """Log-loss falls by 2 over the bins; shard 1 drew mostly where it is high. Both fit equally well."""
        counts = [np.where(np.arange(50) < 20, c, 0) for c in (10, np.maximum(1, 200 - 10 * np.arange(50)))]
        reports = [report(k, [k], bin_count=counts[k]) for k in range(2)]
        a, b = shard_fits(reports)
        assert a.log_loss == pytest.approx(0, abs=1e-9) and b.log_loss == pytest.approx(0, abs=1e-9)

    def test_no_reports_have_no_fits(self) -> None:
        assert shard_fits([]) == []


class TestBalance:
    def test_the_worst_fitted_samples_of_the_worst_shard_go_to_the_best_shard(self) -> None:
        ratios = rng().permutation(60) / 60.0
        ledger = with_ratios(ledger_of(20, 20, 20), ratios)
        moves = balance(ledger, fits_of(ledger, 0.0, 0.5, -0.5), rng(), RedistributionConfig(fraction=0.2))
        assert set(moves.source.tolist()) == {1} and set(moves.target.tolist()) == {2}
        worst_four = 20 + np.argsort(-ratios[20:40])[:4]
        assert sorted(moves.ids.tolist()) == sorted(worst_four.tolist())

    def test_samples_never_drawn_move_last(self) -> None:
        ledger = with_ratios(ledger_of(10, 10), np.zeros(20))
        ledger.draws[:8] = 0
        moves = balance(ledger, fits_of(ledger, 1.0, 0.0), rng(), RedistributionConfig(fraction=0.2))
        assert sorted(moves.ids.tolist()) == [8, 9]

    @pytest.mark.parametrize(("difference", "moved"), [(0.09, 0), (0.11, 1)])
    def test_a_difference_up_to_gap_is_left_alone(self, difference: float, moved: int) -> None:
        ledger = ledger_of(20, 20)
        reports = fits_of(ledger, difference, 0.0, losses=10**8)
        assert len(balance(ledger, reports, rng(), RedistributionConfig(gap=0.1, fraction=0.05))) == moved

    @pytest.mark.parametrize(("difference", "moved"), [(0.25, 0), (0.35, 1)])
    def test_a_difference_below_three_standard_errors_is_left_alone(self, difference: float, moved: int) -> None:
        ledger = ledger_of(20, 20)
        reports = fits_of(ledger, difference, 0.0, losses=60)  # .5 / sqrt(60) each: three errors of both are .274
        assert len(balance(ledger, reports, rng(), RedistributionConfig(gap=0.0, fraction=0.05))) == moved

    def test_noise_alone_rarely_moves_anything(self) -> None:
        ledger, generator, moved = ledger_of(20, 20), rng(1), 0
        for _ in range(500):
            noisy = 0.5 / 60**0.5 * generator.normal(size=2)
            reports = fits_of(ledger, *noisy.tolist(), losses=60)
            moved += len(balance(ledger, reports, generator, RedistributionConfig(gap=0.0))) > 0
        assert moved <= 5  # three sigma: .3 %

    @settings(deadline=None)
    @given(
        st.lists(st.integers(0, 30), min_size=2, max_size=5).filter(lambda s: sum(s) > 0),
        st.floats(0.01, 0.5),
        st.integers(0, 99),
    )
    def test_moving_for_ever_empties_no_shard_and_stops(self, sizes: list[int], fraction: float, seed: int) -> None:
        ledger = ledger_of(*sizes)
        floor = max(1, len(ledger) // (2 * len(sizes)))
        reports = [report(k, ledger.ids(k), float(k == seed % len(sizes))) for k in range(len(sizes))]
        for _ in range(400):
            moves = balance(ledger, reports, rng(seed), RedistributionConfig(fraction=fraction))
            ledger.apply(moves)
            if not len(moves):
                break
        assert not len(moves)
        giver = ledger.sizes()[seed % len(sizes)]
        assert giver == min(floor, sizes[seed % len(sizes)]) or (giver <= floor)
        assert giver >= min(floor, sizes[seed % len(sizes)])

    def test_one_report_is_nothing_to_compare_with(self) -> None:
        ledger = ledger_of(5, 5)
        assert len(balance(ledger, fits_of(ledger, 9.0), rng(), RedistributionConfig())) == 0

    def test_shards_of_unequal_size_are_evened_out_from_the_largest_to_the_smallest(self) -> None:
        ledger = with_ratios(ledger_of(70, 20, 7, 3), np.random.default_rng(0).normal(size=100))
        before, generator = ledger.log_loss_ratio(), rng()
        first = balance(ledger, fits_of(ledger, 0.0, 0.0, 0.0, 0.0), generator, RedistributionConfig())
        assert set(first.source) == {0}
        assert set(first.target) == {3}
        assert sorted(before[first.ids]) == sorted(before[:70])[-len(first) :]
        for _ in range(100):
            ledger.apply(balance(ledger, fits_of(ledger, 0.0, 0.0, 0.0, 0.0), generator, RedistributionConfig()))
        assert ledger.sizes().max() <= 1.5 * ledger.sizes().min()
        assert len(balance(ledger, fits_of(ledger, 0.0, 0.0, 0.0, 0.0), generator, RedistributionConfig())) == 0

    def test_losses_decide_before_sizes(self) -> None:
        ledger = ledger_of(70, 30)
        moves = balance(ledger, fits_of(ledger, -1.0, 1.0), rng(), RedistributionConfig(fraction=0.1))
        assert set(moves.source) == {1}


class TestMemorized:
    def skipped(self, sizes: tuple[int, ...], visits: list[int], skips: list[int]) -> ShardLedger:
        ledger = ledger_of(*sizes)
        ledger.visits, ledger.skips = np.array(visits), np.array(skips)
        ledger.recent_visits, ledger.recent_skips = ledger.visits.copy(), ledger.skips.copy()
        return ledger

    def test_the_highest_skip_rates_go_first_not_the_highest_counts(self) -> None:
        ledger = self.skipped((4, 4), [100, 2, 9, 9, 100, 2, 9, 9], [50, 2, 1, 0, 0, 1, 9, 8])
        moves = memorized(ledger, [], rng(), RedistributionConfig(fraction=0.25))
        assert sorted(zip(moves.ids.tolist(), moves.source.tolist(), moves.target.tolist(), strict=True)) == [
            (1, 0, 1),
            (6, 1, 0),
        ]

    def test_only_samples_with_a_skip_move_and_all_shards_give_alike(self) -> None:
        ledger = self.skipped((4, 4), [9] * 8, [1, 0, 0, 0, 3, 2, 1, 1])
        moves = memorized(ledger, [], rng(), RedistributionConfig(fraction=0.5))
        assert sorted(moves.ids.tolist()) == [0, 4]

    def test_skips_before_the_last_move_do_not_count(self) -> None:
        ledger = self.skipped((2, 2), [9] * 4, [9, 1, 1, 9])
        ledger.apply(Moves.join([Moves.between(np.array([0]), 0, 1), Moves.between(np.array([3]), 1, 0)]))
        moves = memorized(ledger, [], rng(), RedistributionConfig(fraction=0.5))
        assert sorted(moves.ids.tolist()) == [1, 2]

    def test_ties_are_broken_by_the_seed_alone(self) -> None:
        ledger = self.skipped((40, 40), [4] * 80, [2] * 80)
        config = RedistributionConfig(fraction=0.25)
        chosen = [sorted(memorized(ledger, [], rng(seed), config).ids.tolist()) for seed in (1, 1, 2)]
        assert chosen[0] == chosen[1] != chosen[2]
        # nor do low IDs go first
        assert chosen[0] != list(range(10)) + list(range(40, 50))


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("topology", ["ring", "derangement"])
def test_ring_policies_repeat_with_the_seed(name: str, topology: Any) -> None:
    ledger = with_ratios(ledger_of(20, 25, 30), np.zeros(75))
    ledger.recent_skips = ledger.recent_visits = ledger.skips = ledger.visits = np.ones(75, np.int64)
    config = RedistributionConfig(fraction=0.2, topology=topology)
    first, again, other = (RINGS[name](ledger, [], rng(seed), config) for seed in (5, 5, 6))
    for column in ("ids", "source", "target"):
        assert np.array_equal(getattr(first, column), getattr(again, column))
    assert len(first) == 3 * 4
    assert first.ids.tolist() != other.ids.tolist()


def test_high_loss_passes_on_the_highest_log_ratios_that_are_known() -> None:
    ledger = with_ratios(ledger_of(4, 4), np.array([0.0, 3, 1, 2, 5, -1, 0, 4]))
    ledger.draws[4] = 0  # its ratio is unknown
    moves = high_loss(ledger, [], rng(), RedistributionConfig(fraction=0.25))
    assert sorted(moves.ids.tolist()) == [1, 7]


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000))
def test_in_a_derangement_no_shard_keeps_its_own_and_each_gets_from_one(k: int, seed: int) -> None:
    ledger = ledger_of(*[3] * k)
    moves = random(ledger, [], rng(seed), RedistributionConfig(fraction=0.3, topology="derangement"))
    assert (moves.source != moves.target).all()
    assert sorted(moves.source.tolist()) == sorted(moves.target.tolist()) == list(range(k))


def test_a_derangement_changes_from_time_to_time_and_a_ring_does_not() -> None:
    ledger = ledger_of(2, 2, 2, 2)
    for topology, arrangements in (("ring", {(1, 2, 3, 0)}), ("derangement", None)):
        config = RedistributionConfig(topology=topology)  # type: ignore[arg-type]
        seen = {tuple(random(ledger, [], rng(seed), config).target.tolist()) for seed in range(50)}
        assert seen == arrangements if arrangements else len(seen) > 3


POLICIES = {name: load(plugins.POLICIES, name)[0].call for name in plugins.POLICIES.built_in}
policy_names = st.lists(st.sampled_from(sorted(POLICIES)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.lists(policy_names, min_size=1, max_size=4),
    st.sampled_from(["ring", "derangement"]),
    st.floats(0.01, 0.5),
    st.integers(0, 10_000),
)
def test_whatever_the_policies_every_sample_stays_in_one_shard_and_no_shard_is_emptied(
    sizes: list[int], rounds: list[list[str]], topology: Any, fraction: float, seed: int
) -> None:
    ledger, generator = ledger_of(*sizes), rng(seed)
    config = RedistributionConfig(fraction=fraction, topology=topology)
    for names in rounds:
        reports = []
        for shard in generator.permutation(len(sizes))[: generator.integers(1, len(sizes) + 1)]:
            ids = ledger.ids(int(shard))
            told = ids[generator.random(len(ids)) < 0.8]
            visits = generator.integers(0, 4, len(told))
            reports.append(
                report(
                    int(shard),
                    told,
                    float(generator.normal()),
                    visits=visits,
                    skips=generator.integers(0, visits + 1),
                    draws=visits,
                    log_ratio_sum=generator.normal(size=len(told)),
                )
            )
        for r in reports:
            ledger.absorb(r)
        before = ledger.sizes()
        moves = propose([POLICIES[name] for name in names], ledger, reports, generator, config)
        assert len(np.unique(moves.ids)) == len(moves)
        assert (ledger.shard[moves.ids] == moves.source).all() and (moves.source != moves.target).all()
        ledger.apply(moves)
        assert sorted(np.concatenate([ledger.ids(k) for k in range(len(sizes))]).tolist()) == list(range(sum(sizes)))
        assert ledger.sizes().min() >= 1
        if len(names) == 1 and names != ["balance"]:
            assert ledger.sizes().tolist() == before.tolist()


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["samples", "all"]), st.sampled_from([balance, random]), st.floats(0, 1), st.integers(0, 10_000))
def test_chance_chooses_among_visited_samples(control: Any, policy: Any, dropped: float, seed: int) -> None:
    ledger = with_ratios(ledger_of(12, 8, 8), rng(seed).normal(size=28))
    ledger.copies[rng(seed).random(28) < dropped] = np.inf
    ledger.draws[~ledger.visited()] = 0
    reports = fits_of(ledger, 1.0, 0.0, -1.0)
    config = RedistributionConfig(fraction=0.5, control=control)
    moves = propose([policy], ledger, reports, rng(seed), config)
    assert ledger.visited()[moves.ids].all()
    assert len(np.unique(moves.ids)) == len(moves) and (moves.source == ledger.shard[moves.ids]).all()
    inside = ledger.visited() & (rng(seed).random(28) < 0.5)
    chosen = random_of_equal_number(inside, ledger.visited(), seed)
    assert chosen.sum() == inside.sum() and ledger.visited()[chosen].all()


def test_two_policies_together_do_not_take_the_last_sample_of_a_small_shard() -> None:
    """balance claims the sample that the ring would have given shard 1, which gives away its only one."""
    ledger = with_ratios(ledger_of(6, 1, 6), np.array([9.0, *range(12)]))
    reports = fits_of(ledger, 1.0, 0.5, -1.0)
    moves = propose([balance, high_loss], ledger, reports, rng(), RedistributionConfig(fraction=0.05))
    assert 0 in moves.ids
    ledger.apply(moves)
    assert ledger.sizes().min() >= 1


def test_a_sample_claimed_by_one_policy_is_not_moved_by_the_next() -> None:
    ledger = with_ratios(ledger_of(4, 4), np.arange(8.0))
    once = propose([high_loss], ledger, [], rng(), RedistributionConfig(fraction=0.25))
    twice = propose([high_loss, high_loss], ledger, [], rng(), RedistributionConfig(fraction=0.25))
    assert twice.ids.tolist() == once.ids.tolist()


def test_no_policy_moves_nothing_and_one_shard_has_nowhere_to_give() -> None:
    assert len(propose([], ledger_of(3, 3), [], rng(), RedistributionConfig())) == 0
    for policy in POLICIES.values():
        ledger = with_ratios(ledger_of(5), np.arange(5.0))
        ledger.recent_skips[:] = ledger.recent_visits[:] = 1
        assert len(policy(ledger, fits_of(ledger, 1.0), rng(), RedistributionConfig())) == 0


def test_policies_change_neither_ledger_nor_reports() -> None:
    ledger = with_ratios(ledger_of(8, 8), np.arange(16.0))
    ledger.recent_skips = ledger.recent_visits = np.ones(16, np.int64)
    reports = fits_of(ledger, 1.0, 0.0)
    frozen = [v for v in (*vars(ledger).values(), *vars(reports[0]).values()) if isinstance(v, np.ndarray)]
    for array in frozen:
        array.flags.writeable = False
    for policy in POLICIES.values():
        assert len(policy(ledger, reports, rng(), RedistributionConfig()))


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_samples_move_at_every_nth_opportunity_between_averagings(every: int, period: int) -> None:
    flat = {"aggregate-every": every, "redistribution.period": period, "num-server-rounds": 41}
    config = RunConfig.from_flat(flat)
    rounds = range(1, 41)
    opportunities = [r for r in rounds if every <= 1 or r % every]
    assert [r for r in rounds if is_due(config, r)] == opportunities[period - 1 :: period]


def test_nothing_moves_after_the_last_round() -> None:
    assert not is_due(RunConfig.from_flat({"num-server-rounds": 5}), 5)


def test_two_ring_policies_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="memorized and random"):
        parse_policy("memorized+quarantine+random")


class TestParsePolicy:
    @pytest.mark.parametrize(
        ("text", "names", "quarantine"),
        [
            ("balance+quarantine", ["balance"], True),
            ("memorized", ["memorized"], False),
            ("none", [], False),
            ("quarantine", [], True),
            (" random + balance ", ["random", "balance"], False),
        ],
    )
    def test_names_become_policies_in_their_order(self, text: str, names: list[str], quarantine: bool) -> None:
        assert parse_policy(text) == ([POLICIES[n] for n in names], quarantine)

    @pytest.mark.parametrize("text", ["balanced", "balance+", "", "balance,quarantine", "balance+Quarantine"])
    def test_an_unknown_name_is_refused_with_those_there_are(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"redistribution\.policy: no policy .*balance, memorized, .*'\+'"):
            parse_policy(text)

    def test_the_default_is_a_policy(self) -> None:
        assert parse_policy(RunConfig().redistribution.policy) == ([random], False)
