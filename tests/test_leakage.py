"""Leakage: exact oracles for the statistics of scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ret_fl.audit.leakage import exposure, membership, suspected_duplicates
from ret_fl.audit.schema import Interval

scores = st.integers(1, 30).flatmap(lambda n: arrays(np.float64, n, elements=st.integers(0, 12).map(float)))
TIMESTEPS = np.array([50, 399, 400, 900])


def inside(interval: Interval) -> bool:
    return 0 <= interval.low <= interval.value + 1e-9 and interval.value <= interval.high + 1e-9 <= 1 + 2e-9


class TestMembership:
    @settings(max_examples=60, deadline=None)
    @given(members=scores, others=scores)
    def test_auc_is_the_share_of_ordered_pairs_and_every_interval_holds_its_value(
        self, members: np.ndarray, others: np.ndarray
    ) -> None:
        found = membership(members, others, "loss", bootstrap=200)
        pairs = [1.0 if m < o else 0.5 if m == o else 0.0 for m in members for o in others]
        assert found.auc.value == pytest.approx(np.mean(pairs), abs=1e-12)
        assert (found.members, found.non_members, found.attack) == (len(members), len(others), "loss")
        assert all(map(inside, (found.auc, found.tpr_at_1_percent, found.tpr_at_01_percent)))

    @settings(max_examples=40, deadline=None)
    @given(members=scores, others=scores)
    def test_swapped_sets_have_one_minus_the_auc(self, members: np.ndarray, others: np.ndarray) -> None:
        there, back = (membership(a, b, "pia", bootstrap=100).auc for a, b in ((members, others), (others, members)))
        assert there.value + back.value == pytest.approx(1, abs=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(members=scores, others=scores)
    def test_monotone_transforms_change_nothing(self, members: np.ndarray, others: np.ndarray) -> None:
        plain = membership(members, others, "loss", bootstrap=100)
        assert membership(np.exp(members / 3), np.exp(others / 3), "loss", bootstrap=100) == plain
        shuffled = membership(torch.as_tensor(members).flip(0), others[::-1].copy(), "loss", bootstrap=100)
        assert shuffled == plain

    @pytest.mark.parametrize(
        ("count", "at_1_percent", "at_01_percent"),
        [
            (99, 0.2, 0.2),  # no false positive allowed: members below 0
            (100, 0.3, 0.2),  # one allowed at 1 %: below 1
            (999, 0.8, 0.2),  # nine at 1 %, none at .1 %
            (1000, 0.9, 0.3),
            (2999, 1.0, 0.4),  # 29 and 2
        ],
    )
    def test_tpr_is_that_of_the_highest_threshold_that_keeps_to_the_rate(
        self, count: int, at_1_percent: float, at_01_percent: float
    ) -> None:
        members = np.array([-2, -1, 0.5, 1.5, 2.5, 3.5, 4.5, 8.5, 9.5, 28.5])
        found = membership(members, np.random.default_rng(0).permutation(count).astype(float), "loss")
        assert (found.tpr_at_1_percent.value, found.tpr_at_01_percent.value) == (at_1_percent, at_01_percent)

    def test_members_that_tie_with_a_false_positive_too_many_are_not_counted(self) -> None:
        others = np.r_[np.zeros(2), np.ones(98)]
        assert membership(np.array([-1.0, 0.0, 0.0, 0.0]), others, "loss").tpr_at_1_percent.value == 0.25

    @settings(max_examples=40, deadline=None)
    @given(members=scores, others=arrays(np.float64, 250, elements=st.integers(0, 12).map(float)))
    def test_tpr_is_the_best_that_any_threshold_reaches(self, members: np.ndarray, others: np.ndarray) -> None:
        candidates = [-1.0, *np.unique(np.r_[members, others])]
        best = max(float((members <= c).mean()) for c in candidates if (others <= c).sum() <= 2)
        assert membership(members, others, "loss", bootstrap=100).tpr_at_1_percent.value == pytest.approx(best)

    def test_sets_that_separate_perfectly_are_still_uncertain(self) -> None:
        found = membership(np.zeros(20), np.ones(50), "loss")
        assert found.auc.value == 1 and 0.8 < found.auc.low < 0.9 and found.auc.high == pytest.approx(1)
        # 50 non-members say little of a threshold that 1 % of them pass
        assert found.tpr_at_1_percent == Interval(value=1, low=0, high=1)

    def test_a_rate_of_zero_has_an_upper_end_that_shrinks_with_the_members(self) -> None:
        others = np.linspace(0, 1, 5000)
        few, many = (membership(np.full(n, 2.0), others, "loss").tpr_at_1_percent for n in (30, 3000))
        assert few.value == many.value == many.low == 0
        # Clopper-Pearson at 0 of n: about 3.7 / n
        assert 0.09 < few.high < 0.13 and 0.0009 < many.high < 0.0013

    def test_intervals_cover_the_truth(self) -> None:
        """Unit normals shifted by 1: in 200 experiments the 95 % intervals miss some 5 % of the time, or less."""
        normal = torch.distributions.Normal(0.0, 1.0)
        truth = [normal.cdf(torch.tensor(0.5).sqrt()).item()]
        truth += [normal.cdf(normal.icdf(torch.tensor(level)) + 1).item() for level in (0.01, 0.001)]
        rng, missed = np.random.default_rng(0), np.zeros(3)
        for _ in range(200):
            found = membership(rng.normal(-1, 1, 150), rng.normal(0, 1, 300), "loss", bootstrap=200)
            intervals = (found.auc, found.tpr_at_1_percent, found.tpr_at_01_percent)
            missed += [not i.low <= value <= i.high for i, value in zip(intervals, truth, strict=True)]
        assert (missed <= 0.1 * 200).all() and missed[0] >= 2

    def test_the_seed_decides_the_interval(self) -> None:
        rng = np.random.default_rng(0)
        sets = rng.normal(-0.5, 1, 80), rng.normal(0, 1, 80)
        assert membership(*sets, "loss", seed=1) == membership(*sets, "loss", seed=1)
        assert membership(*sets, "loss", seed=1) != membership(*sets, "loss", seed=2)

    @pytest.mark.parametrize(
        ("members", "others", "message"),
        [
            ([], [1.0], "member_scores must hold"),
            ([1.0], [], "non_member_scores must hold"),
            ([1.0, math.nan], [1.0], "member_scores hold NaN for 1 of 2"),
            ([1.0], [math.nan], "non_member_scores hold NaN"),
            ([[1.0, 2.0]], [1.0], "one number an image"),
        ],
    )
    def test_bad_scores_are_refused_by_name(self, members: list, others: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            membership(np.array(members), np.array(others), "loss")

    def test_too_few_draws_are_refused(self) -> None:
        with pytest.raises(ValueError, match="bootstrap must be >= 100"):
            membership(np.ones(3), np.ones(3), "loss", bootstrap=99)


class TestExposure:
    def test_exposures_by_hand_with_ties_behind(self) -> None:
        unseen = np.array([8.0, 1, 2, 3, 4, 5, 6, 7])
        # below all; ties with the lowest; between 3 and 4; ties with the last but one; above all
        found = exposure(np.array([0.0, 1.0, 3.5, 7.0, 9.0]), unseen)
        assert found.exposures == pytest.approx([3, 2, 1, 0, 0])
        assert found.mean == pytest.approx(6 / 5) and found.most == 3

    @given(canaries=scores, unseen=scores)
    def test_exposures_lie_between_0_and_log2_n_and_fall_with_the_loss(
        self, canaries: np.ndarray, unseen: np.ndarray
    ) -> None:
        found = exposure(np.sort(canaries), unseen)
        assert found.exposures == sorted(found.exposures, reverse=True)
        assert found.most == pytest.approx(math.log2(len(unseen)))
        assert min(found.exposures) >= 0 and max(found.exposures) <= found.most

    def test_canaries_that_left_no_trace_have_the_mean_it_says(self) -> None:
        rng = np.random.default_rng(0)
        assert exposure(rng.random(20_000), rng.random(1000)).mean == pytest.approx(math.log2(math.e), abs=0.05)

    def test_bad_scores_are_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="canary_scores must hold"):
            exposure(np.array([]), np.ones(2))
        with pytest.raises(ValueError, match="unseen_scores hold NaN"):
            exposure(np.ones(2), np.array([1.0, math.nan]))


def flat_losses(log_ratios: list[float]) -> np.ndarray:
    """[n, 4] losses with the given log-ratios at t < 400 up to a constant, and high ones above."""
    levels = np.array([1e-1, 1e-2, 1e-3, 1e-4])
    losses = levels * np.exp(np.array(log_ratios))[:, None]
    losses[:, 2:] = 1e6
    return losses


class TestDuplicates:
    RATIOS = (-1.0, 0.0, 1.0, -9.0, 2.0, -2.0, -8.0)

    def test_suspects_by_hand(self) -> None:
        # row 7 repeats row 3, which therefore counts once; row 6 stands alone
        hashes = np.array([10, 11, 12, 13, 14, 15, 16, 13], dtype=np.uint64)
        losses = flat_losses([*self.RATIOS, self.RATIOS[3]])
        found = suspected_duplicates(losses, TIMESTEPS, hashes, z=-2.5)
        distinct = np.array(self.RATIOS)
        spread = 1.4826 * 2  # |ratio + 1| is 0, 1, 1, 2, 3, 7, 8
        assert [s.train for s in found.suspects] == [3] and found.suspects[0].copies == 2
        assert found.suspects[0].log_ratio == pytest.approx(-9 - distinct.mean())
        assert found.suspects[0].z == pytest.approx(-8 / spread)
        assert (found.precision, found.recall) == (1, 1)

    def test_a_higher_bar_suspects_more_in_ascending_order(self) -> None:
        hashes = np.array([10, 11, 12, 13, 14, 15, 16, 13], dtype=np.uint64)
        found = suspected_duplicates(flat_losses([*self.RATIOS, -9.0]), TIMESTEPS, hashes, z=-2)
        assert [s.train for s in found.suspects] == [3, 6]
        assert (found.precision, found.recall) == (0.5, 1)

    def test_the_list_is_cut_but_the_rates_are_not(self) -> None:
        hashes = np.array([10, 11, 12, 13, 14, 15, 16, 13], dtype=np.uint64)
        found = suspected_duplicates(flat_losses([*self.RATIOS, -9.0]), TIMESTEPS, hashes, z=-2, most=1)
        assert [s.train for s in found.suspects] == [3]
        assert (found.precision, found.recall) == (0.5, 1)
        assert (found.below, found.examined, found.z, found.t_max) == (2, 7, -2, 400)

    def test_only_columns_below_t_max_count(self) -> None:
        losses = np.ones((9, 4))
        losses[:, :2] = np.exp(np.linspace(-1, 1, 9))[:, None]
        losses[4, 2:] = 1e-20
        assert suspected_duplicates(losses, TIMESTEPS, np.arange(9, dtype=np.uint64)).suspects == []
        assert suspected_duplicates(losses, TIMESTEPS, np.arange(9, dtype=np.uint64), t_max=401).suspects[0].train == 4

    def test_without_exact_copies_there_is_nothing_to_compare_with(self) -> None:
        found = suspected_duplicates(flat_losses(list(self.RATIOS)), TIMESTEPS, np.arange(7, dtype=np.uint64), z=-2)
        assert len(found.suspects) == 2 and found.precision is None and found.recall is None

    def test_copies_that_nobody_suspects_are_not_recalled(self) -> None:
        hashes = np.array([1, 2, 3, 4, 5, 1], dtype=np.uint64)
        found = suspected_duplicates(flat_losses([0, 1, 2, 3, 4, 0]), TIMESTEPS, hashes)
        assert found.suspects == [] and found.precision is None and found.recall == 0

    @pytest.mark.parametrize("losses", [np.ones((6, 4)), np.zeros((6, 4)), np.full((1, 4), 0.3)])
    def test_equal_losses_suspect_nobody(self, losses: np.ndarray) -> None:
        assert suspected_duplicates(losses, TIMESTEPS, np.arange(len(losses), dtype=np.uint64)).suspects == []

    @settings(max_examples=40, deadline=None)
    @given(
        losses=arrays(np.float64, (12, 4), elements=st.floats(1e-6, 1e3)),
        factors=arrays(np.float64, 4, elements=st.floats(0.01, 100)),
        order=st.permutations(range(12)),
    )
    def test_the_scale_of_a_timestep_and_the_order_of_images_do_not_matter(
        self, losses: np.ndarray, factors: np.ndarray, order: list[int]
    ) -> None:
        hashes = np.arange(12, dtype=np.uint64) // 2 * 2
        losses = losses[hashes.astype(int)]
        plain = suspected_duplicates(losses, TIMESTEPS, hashes, z=-1e-6, most=12)
        other = suspected_duplicates((losses * factors)[order], TIMESTEPS, hashes[order], z=-1e-6, most=12)

        def seen(found: object, rows: list[int]) -> dict[int, float]:
            return {int(hashes[rows[s.train]]): s.z for s in found.suspects if s.z < -1e-3}  # type: ignore[attr-defined]

        assert seen(other, order) == pytest.approx(seen(plain, list(range(12))), rel=1e-3, abs=1e-3)
        assert all(s.copies == 2 for s in plain.suspects)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"t_max": 50}, "no column below t_max=50: the lowest timestep is 50"),
            ({"z": 0.0}, "z must be < 0"),
            ({"most": -1}, "most >= 0"),
            ({"losses": np.ones((3, 3))}, "one timestep a column"),
            ({"losses": np.ones((2, 4))}, "for 3 hashes"),
            ({"losses": np.ones((0, 4)), "content_hashes": np.zeros(0, np.uint64)}, "n >= 1"),
            ({"losses": np.full((3, 4), math.nan)}, "for 3 of 3 images"),
            ({"losses": np.full((3, 4), math.inf)}, "negative, NaN or infinite"),
            ({"losses": -np.ones((3, 4))}, "negative, NaN or infinite"),
        ],
    )
    def test_bad_input_is_refused_by_name(self, change: dict, message: str) -> None:
        given_ = {
            "losses": np.ones((3, 4)),
            "timesteps_of_columns": TIMESTEPS,
            "content_hashes": np.arange(3, dtype=np.uint64),
        } | change
        with pytest.raises(ValueError, match=message):
            suspected_duplicates(**given_)
