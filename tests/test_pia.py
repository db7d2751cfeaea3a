"""Attacks on models: the papers' formula, and one model that memorizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from diffusers import UNet2DModel
from small_models import PREDICTIONS, Pointwise, Prediction, make_objective, tiny
from torch import Tensor, nn

from ret_fl.audit.leakage import exposure, membership, pia_scores, suspected_duplicates
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import Objective
from ret_fl.evaluation import fixed_losses, loss_grid, timestep_grid

Stored = Callable[..., SampleStore]
MEMBERS, DUPLICATE, COPIES = 24, 5, 10


class TestPia:
    @pytest.mark.parametrize("classes", [0, 10])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_scores_are_those_of_the_papers_formula(self, stored: Stored, prediction: Prediction, classes: int) -> None:
        unet, store = tiny(classes=classes).eval(), stored(0, 4, labels=True)
        objective = make_objective(prediction)
        found = pia_scores(unet, objective, store, torch.arange(4), t=300)
        angle = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
        signal = (angle.cos() / angle[0].cos())[1:] ** 2  # Nichol & Dhariwal 2021, equation 17

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

    def test_a_model_that_knows_the_image_scores_zero(self, stored: Stored) -> None:
        """It sees exactly the noise that was put in, so the noise it started from, at every timestep."""
        objective, store = make_objective(), stored(0, 1)
        x0, _ = store.fetch(torch.arange(1))

        class Knows(Pointwise):
            def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
                signal = objective.scheduler.alphas_cumprod[t][:, None, None, None]
                return ((x - signal.sqrt() * x0) / (1 - signal).sqrt(),)

        assert pia_scores(Knows(), objective, store, torch.arange(1)).item() == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("t", [-1, 0, 100, 1000])
    def test_timesteps_outside_the_chain_are_refused(self, stored: Stored, t: int) -> None:
        with pytest.raises(ValueError, match=r"t must lie in 1\.\.99"):
            pia_scores(tiny(), make_objective(timesteps=100), stored(0, 2), torch.arange(2), t=t)

    def test_a_norm_that_is_none_is_refused(self, stored: Stored) -> None:
        with pytest.raises(ValueError, match="p must be > 0"):
            pia_scores(tiny(), make_objective(), stored(0, 2), torch.arange(2), p=0)

    def test_a_model_that_predicts_images_is_refused(self, stored: Stored) -> None:
        objective = make_objective()
        objective.scheduler.register_to_config(prediction_type="sample")
        with pytest.raises(ValueError, match="epsilon or v_prediction, not 'sample'"):
            pia_scores(tiny(), objective, stored(0, 2), torch.arange(2))


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
def memorizer(stored: Stored) -> Memorizer:
    rows = torch.cat([torch.arange(MEMBERS), torch.full((COPIES - 1,), DUPLICATE)])
    trained = Memorizer(tiny(), make_objective(), stored(0, MEMBERS).subset(rows), stored(100, 200))
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
    def test_an_untrained_model_tells_nothing(self, stored: Stored, attack: Literal["loss", "pia"]) -> None:
        call = fixed_losses if attack == "loss" else pia_scores
        sets = (stored(first, 200) for first in (0, 200))
        found = membership(*(call(tiny(), make_objective(), store, torch.arange(200)) for store in sets), attack)
        assert found.auc.low < 0.5 < found.auc.high
        assert found.tpr_at_1_percent.low < 0.01 < found.tpr_at_1_percent.high
