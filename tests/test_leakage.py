"""Leakage: exact oracles for the statistics, reference formulas for the losses, and one model that memorizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ret_fl.audit.leakage import exposure, loss_grid, membership, pia_scores, suspected_duplicates, timestep_grid
from ret_fl.audit.schema import Interval
from ret_fl.config import DiffusionConfig, ModelConfig
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.objective import Objective, make_scheduler
from ret_fl.diffusion.sampling import start_noise
from ret_fl.evaluation import fixed_losses

torch.set_num_threads(1)
CPU = torch.device("cpu")
Prediction = Literal["epsilon", "v_prediction"]
PREDICTIONS = ("epsilon", "v_prediction")

scores = st.integers(1, 30).flatmap(lambda n: arrays(np.float64, n, elements=st.integers(0, 12).map(float)))


def digits(first: int, count: int, labels: bool = False) -> SampleStore:
    """Digits first..first+count-1 in a shuffled order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))[first : first + count]
    images = (data.images[order] * (255 / 16)).round().astype(np.uint8)
    return SampleStore(images, data.target[order], 10) if labels else SampleStore(images)


def make_objective(prediction: Prediction = "epsilon", fold: int = 1, timesteps: int = 1000) -> Objective:
    return Objective(make_scheduler(DiffusionConfig(prediction=prediction, timesteps=timesteps)), CPU, fold=fold)


def tiny(fold: int = 1, classes: int = 0) -> UNet2DModel:
    config = ModelConfig(preset="tiny", pixel_unshuffle=fold, class_conditional=classes > 0)
    return build_unet(config, (1, 8, 8), classes, 0)


class Pointwise(nn.Module):
    """Works on every value alone, so folding cannot matter to it."""

    class config:  # noqa: N801, as diffusers names it
        num_class_embeds = None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
        return (torch.tanh(x) * (1 + t[:, None, None, None] / 1000),)


class TestLossGrid:
    @pytest.mark.parametrize("classes", [0, 10])
    def test_an_entry_is_the_mean_loss_over_the_noises_of_its_timestep(self, classes: int) -> None:
        unet, objective, store = tiny(classes=classes), make_objective(), digits(0, 5, labels=True)
        grid = loss_grid(unet, objective, store, torch.tensor([4, 0, 2]), timesteps=3, noises=2, seed=7)
        assert grid.shape == (3, 3) and grid.dtype == torch.float32
        noise = start_noise(7, 0, 6, (1, 8, 8))
        for row, image in enumerate((4, 0, 2)):
            x0, labels = store.fetch(torch.tensor([image]))
            for column, t in enumerate(timestep_grid(1000, 3)):
                with torch.no_grad():
                    expected = [
                        objective.losses(unet, x0, t[None], noise[i][None], labels if classes else None).item()
                        for i in (2 * column, 2 * column + 1)
                    ]
                assert grid[row, column].item() == pytest.approx(np.mean(expected), rel=1e-4)

    def test_the_grid_holds_the_middles_of_equal_parts_of_the_chain(self) -> None:
        assert timestep_grid(1000, 10).tolist() == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
        assert timestep_grid(10, 10).tolist() == list(range(10))

    def test_fixed_losses_are_the_means_of_the_grid(self) -> None:
        unet, objective, store, ids = tiny(), make_objective(), digits(0, 6), torch.arange(6)
        grid = loss_grid(unet, objective, store, ids, timesteps=4, seed=3)
        assert torch.equal(fixed_losses(unet, objective, store, ids, timesteps=4, seed=3), grid.mean(1))

    @settings(max_examples=8, deadline=None)
    @given(batch_size=st.integers(1, 9), fold=st.sampled_from([1, 2]))
    def test_scores_do_not_depend_on_the_batch_size(self, batch_size: int, fold: int) -> None:
        unet, objective, store, ids = tiny(fold), make_objective(fold=fold), digits(0, 7), torch.arange(7)
        for score, options in ((loss_grid, {"timesteps": 2}), (pia_scores, {})):
            whole = score(unet, objective, store, ids, **options)
            seen: list[int] = []
            parts = score(unet, objective, store, ids, batch_size=batch_size, on_progress=seen.append, **options)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
            assert seen == [*range(batch_size, 7, batch_size), 7]

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_folding_changes_no_score(self, prediction: Prediction) -> None:
        store, ids = digits(0, 4), torch.arange(4)
        for score in (loss_grid, pia_scores):
            plain, folded = (score(Pointwise(), make_objective(prediction, fold), store, ids) for fold in (1, 2))
            torch.testing.assert_close(folded, plain)

    def test_dropout_is_off_and_no_gradient_is_kept(self) -> None:
        unet = build_unet(ModelConfig(preset="tiny", pixel_unshuffle=1, dropout=0.5), (1, 8, 8), 0, 0)
        for score in (loss_grid, pia_scores):
            unet.train()
            first, second = (score(unet, make_objective(), digits(0, 3), torch.arange(3)) for _ in range(2))
            assert torch.equal(first, second) and not first.requires_grad

    @pytest.mark.parametrize("options", [{"timesteps": 0}, {"noises": 0}, {"batch_size": 0}])
    def test_counts_below_one_are_refused_by_name(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            loss_grid(tiny(), make_objective(), digits(0, 3), torch.arange(3), **options)  # type: ignore[arg-type]

    def test_no_ids_are_refused(self) -> None:
        for score in (loss_grid, pia_scores, fixed_losses):
            with pytest.raises(ValueError, match="at least one id"):
                score(tiny(), make_objective(), digits(0, 3), torch.arange(0))


class TestPia:
    @pytest.mark.parametrize("classes", [0, 10])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_scores_are_those_of_the_papers_formula(self, prediction: Prediction, classes: int) -> None:
        unet, store = tiny(classes=classes).eval(), digits(0, 4, labels=True)
        objective = make_objective(prediction)
        found = pia_scores(unet, objective, store, torch.arange(4), t=300)
        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

        def noise(x: Tensor, t: int, labels: Tensor) -> Tensor:
            with torch.no_grad():
                out = unet(x.float(), t, class_labels=labels if classes else None).sample.double()
            a = signal[t]
            return out if prediction == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * x

        for i in range(4):
            x0, labels = store.fetch(torch.tensor([i]))
            first = noise(x0.double(), 0, labels)
            second = noise(signal[300].sqrt() * x0 + (1 - signal[300]).sqrt() * first, 300, labels)
            assert found[i].item() == pytest.approx((first - second).pow(4).sum().item() ** 0.25, rel=1e-3)
        assert found.dtype == torch.float32

    def test_a_model_that_knows_the_image_scores_zero(self) -> None:
        """It sees exactly the noise that was put in, so the noise it started from, at every timestep."""
        objective, store = make_objective(), digits(0, 1)
        x0, _ = store.fetch(torch.arange(1))

        class Knows(Pointwise):
            def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
                signal = objective.scheduler.alphas_cumprod[t][:, None, None, None]
                return ((x - signal.sqrt() * x0) / (1 - signal).sqrt(),)

        assert pia_scores(Knows(), objective, store, torch.arange(1)).item() == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("t", [-1, 0, 100, 1000])
    def test_timesteps_outside_the_chain_are_refused(self, t: int) -> None:
        with pytest.raises(ValueError, match=r"t must lie in 1\.\.99"):
            pia_scores(tiny(), make_objective(timesteps=100), digits(0, 2), torch.arange(2), t=t)

    def test_a_norm_that_is_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="p must be > 0"):
            pia_scores(tiny(), make_objective(), digits(0, 2), torch.arange(2), p=0)

    def test_a_model_that_predicts_images_is_refused(self) -> None:
        objective = make_objective()
        objective.scheduler.register_to_config(prediction_type="sample")
        with pytest.raises(ValueError, match="epsilon or v_prediction, not 'sample'"):
            pia_scores(tiny(), objective, digits(0, 2), torch.arange(2))


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


TIMESTEPS = np.array([50, 399, 400, 900])


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


MEMBERS, DUPLICATE, COPIES = 24, 5, 10


@dataclass
class Memorizer:
    """A U-Net trained to memorize MEMBERS digits, one of them COPIES times in the data."""

    unet: UNet2DModel
    objective: Objective
    train: SampleStore
    held_out: SampleStore

    def scores(self, score: str) -> tuple[Tensor, Tensor]:
        """Of the distinct training images and of the held-out ones."""
        call = fixed_losses if score == "loss" else pia_scores
        sets = (self.train, torch.arange(MEMBERS)), (self.held_out, torch.arange(len(self.held_out)))
        member, other = (call(self.unet, self.objective, store, ids) for store, ids in sets)
        return member, other


@pytest.fixture(scope="module")
def memorizer() -> Memorizer:
    rows = torch.cat([torch.arange(MEMBERS), torch.full((COPIES - 1,), DUPLICATE)])
    trained = Memorizer(tiny(), make_objective(), digits(0, MEMBERS).subset(rows), digits(100, 200))
    optimizer = torch.optim.AdamW(trained.unet.parameters(), lr=2e-3)
    trained.unet.train()
    torch.manual_seed(0)
    for _ in range(150):
        x0, _ = trained.train.fetch(torch.randint(len(rows), (32,)))
        t, noise = trained.objective.draw(x0)
        optimizer.zero_grad()
        trained.objective.losses(trained.unet, x0, t, noise, None).mean().backward()
        nn.utils.clip_grad_norm_(trained.unet.parameters(), 1.0)
        optimizer.step()
    return trained


class TestMemorizer:
    @pytest.mark.parametrize("attack", ["loss", "pia"])
    def test_members_are_told_from_held_out_images(self, memorizer: Memorizer, attack: Literal["loss", "pia"]) -> None:
        found = membership(*memorizer.scores(attack), attack)
        assert found.auc.low > 0.6 and found.auc.value > 0.75

    def test_the_repeated_image_is_suspected_first(self, memorizer: Memorizer) -> None:
        losses = loss_grid(memorizer.unet, memorizer.objective, memorizer.train, torch.arange(len(memorizer.train)))
        found = suspected_duplicates(losses, timestep_grid(1000, 10), memorizer.train.content_hashes, z=-2.5)
        assert (found.suspects[0].train, found.suspects[0].copies) == (DUPLICATE, COPIES)
        assert found.recall == 1

    def test_the_repeated_image_is_exposed_more_than_the_others(self, memorizer: Memorizer) -> None:
        found = exposure(*memorizer.scores("loss"))
        assert found.exposures[DUPLICATE] == max(found.exposures) > found.mean > 2

    @pytest.mark.parametrize("attack", ["loss", "pia"])
    def test_an_untrained_model_tells_nothing(self, attack: Literal["loss", "pia"]) -> None:
        call = fixed_losses if attack == "loss" else pia_scores
        sets = (digits(first, 200) for first in (0, 200))
        found = membership(*(call(tiny(), make_objective(), store, torch.arange(200)) for store in sets), attack)
        assert found.auc.low < 0.5 < found.auc.high
        assert found.tpr_at_1_percent.low < 0.01 < found.tpr_at_1_percent.high
