"""Memorized samples are visited less, and every policy has its control by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import fits_of, ledger_of, rng, with_ratios

from ret_fl.config import QuarantineConfig, RedistributionConfig
from ret_fl.ledger import ShardLedger
from ret_fl.recorder import canaries_found
from ret_fl.redistribution import (
    balance,
    propose,
    quarantined,
    random_of_equal_number,
)


class TestControls:
    """Chance in the place of a policy's choice, at equal numbers."""

    @pytest.mark.parametrize("control", ["samples", "all"])
    def test_as_many_samples_move_and_which_ones_is_chance(self, control: Any) -> None:
        config = RedistributionConfig(fraction=0.1, control=control)
        moved = np.zeros(90, int)
        for seed in range(200):
            ledger = with_ratios(ledger_of(50, 20, 20), np.arange(90.0))
            moves = propose([balance], ledger, fits_of(ledger, 1.0, 0.0, -1.0), rng(seed), config)
            ledger.apply(moves)
            assert len(moves) == 5  # a tenth of the worst-fitted shard, as without the control
            moved[moves.ids] += 1
        inside = moved[:50]
        assert inside.min() > 0 and np.corrcoef(inside, np.arange(50))[0, 1] < 0.4  # not the highest losses
        assert (moved[50:].sum() > 0) == (control == "all")

    def test_chosen_samples_keep_their_way_and_under_all_any_way_is_gone(self) -> None:
        ledger = with_ratios(ledger_of(50, 20, 20), np.arange(90.0))
        reports, settings_ = fits_of(ledger, 1.0, 0.0, -1.0), RedistributionConfig(fraction=0.2)
        kept = propose([balance], ledger, reports, rng(), settings_.model_copy(update={"control": "samples"}))
        assert set(kept.source) == {0} and set(kept.target) == {2}
        free = propose([balance], ledger, reports, rng(), settings_.model_copy(update={"control": "all"}))
        assert len(set(zip(free.source.tolist(), free.target.tolist(), strict=True))) > 2
        assert (free.source == ledger.shard[free.ids]).all() and (free.source != free.target).all()

    def test_the_control_of_quarantine_takes_as_many_and_the_same_ones_every_time(self) -> None:
        inside = np.arange(100) < 20
        everyone = np.ones(100, bool)
        chosen = random_of_equal_number(inside, everyone, 3)
        assert chosen.sum() == 20 and not np.array_equal(chosen, inside)
        more = random_of_equal_number(np.arange(100) < 30, everyone, 3)
        assert (more | ~chosen).all() and more.sum() == 30


class TestQuarantine:
    N, COPIES = 1000, 50

    def planted(self, seed: int = 0, *, below: float = 1.2, share: float = 0.05) -> tuple[ShardLedger, np.ndarray]:
        """Gaussian log-ratios of sd .2; the first `share` of the samples lie lower."""
        copies = np.arange(self.N) < share * self.N
        ratios = 0.2 * rng(seed).normal(size=self.N) - below * copies
        ledger = with_ratios(ledger_of(self.N), ratios)
        ledger.draws *= 5
        ledger.log_ratio_sum *= 5
        return ledger, copies

    @pytest.mark.parametrize("share", [0.05, 0.2])
    def test_by_z_it_finds_the_copies_and_few_others(self, share: float) -> None:
        for seed in range(5):
            ledger, copies = self.planted(seed, share=share)
            inside = quarantined(ledger, QuarantineConfig(z=-1.5))
            assert inside[copies].mean() > 0.98  # a fifth of copies widens the spread that they are measured by
            assert inside[~copies].mean() < 0.05

    def test_beside_the_usual_copies_are_found_and_easy_samples_are_not(self) -> None:
        for seed in range(5):
            # a fifth are copies, whose losses have fallen by 4 standard deviations; another has always been that low
            ledger, copies = self.planted(seed, below=0.8, share=0.2)
            easy = np.arange(self.N) >= 0.8 * self.N
            ledger.usual = (0.1 * rng(seed + 100).normal(size=self.N) - 0.8 * easy).astype(np.float32)
            ledger.log_ratio_sum -= 0.8 * easy * ledger.draws
            assert quarantined(ledger, QuarantineConfig(z=-1.0))[easy].mean() > 0.5
            inside = quarantined(ledger, QuarantineConfig(beside="usual"))
            assert inside[copies].mean() > 0.7
            assert inside[~copies].mean() < 0.02

    def test_beside_the_usual_nobody_is_quarantined_before_it_is_known(self) -> None:
        ledger, copies = self.planted()
        assert not quarantined(ledger, QuarantineConfig(beside="usual")).any()
        ledger.usual[:] = 0
        assert quarantined(ledger, QuarantineConfig(beside="usual"))[copies].all()
        ledger.usual[:] = ledger.log_loss_ratio()  # nothing has changed since
        assert not quarantined(ledger, QuarantineConfig(beside="usual")).any()

    def test_by_z_a_gaussian_without_copies_has_few_false_alarms(self) -> None:
        rates = [quarantined(self.planted(s, below=0.0)[0], QuarantineConfig(z=-3.0)).mean() for s in range(10)]
        assert np.mean(rates) < 0.004  # .135 % of a Gaussian lie below -3

    def test_by_share_it_takes_exactly_the_lowest(self) -> None:
        ledger, copies = self.planted()
        inside = quarantined(ledger, QuarantineConfig(share=0.05))
        assert np.array_equal(inside, copies)
        lowest = np.argsort(ledger.log_loss_ratio())[: round(0.3 * self.N)]
        assert set(np.flatnonzero(quarantined(ledger, QuarantineConfig(share=0.3)))) == set(lowest)

    @settings(deadline=None)
    @given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 99))
    def test_by_share_it_never_takes_more_than_the_share(self, n: int, share: float, seed: int) -> None:
        generator = rng(seed)
        ledger = with_ratios(ledger_of(n), np.round(generator.normal(size=n), 1))
        ledger.draws = generator.integers(0, 20, n)
        inside = quarantined(ledger, QuarantineConfig(share=share))
        assert inside.sum() <= round(share * n)
        assert not inside[ledger.draws < 10].any()

    def test_how_well_losses_find_canaries_is_the_share_of_pairs_in_order(self) -> None:
        generator = rng(1)
        ledger = with_ratios(ledger_of(30), np.round(generator.normal(size=30), 1))
        canaries = np.array([[0, 4, 5], [7, 8, 29]])
        ledger.draws[[5, 12]] = 0  # nothing known of these
        ratio, known = ledger.log_loss_ratio(), ledger.draws > 0
        pairs = [
            (ratio[i] < ratio[j]) + (ratio[i] == ratio[j]) / 2
            for i in canaries.ravel()
            for j in np.setdiff1d(np.arange(30), canaries)
            if known[i] and known[j]
        ]
        assert len(pairs) == 5 * 23 and canaries_found(ledger, canaries) == pytest.approx(np.mean(pairs))
        planted, copies = self.planted()
        assert canaries_found(planted, np.flatnonzero(copies)[:, None]) == pytest.approx(1, abs=0.01)
        assert canaries_found(planted, np.empty((0, 10), np.int64)) is None

    def test_samples_with_few_draws_are_left_alone(self) -> None:
        ledger, _ = self.planted()
        ledger.draws[:10] = 9
        ledger.log_ratio_sum[:10] = -90
        for config in (QuarantineConfig(), QuarantineConfig(share=0.05)):
            inside = quarantined(ledger, config)
            assert not inside[:10].any() and inside[10:50].all()

    def test_knowing_nothing_or_no_difference_quarantines_nobody(self) -> None:
        for config in (QuarantineConfig(), QuarantineConfig(share=0.2)):
            assert not quarantined(ledger_of(5, 5), config).any()
            even = with_ratios(ledger_of(20), np.ones(20))
            even.draws *= 5
            assert not quarantined(even, config).any()
