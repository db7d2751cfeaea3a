"""The grid of losses holds what the objective says, in any batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PREDICTIONS, Pointwise, Prediction, make_objective, tiny

from ret_fl.audit.leakage import pia_scores
from ret_fl.config import ModelConfig
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.sampling import start_noise
from ret_fl.evaluation import fixed_losses, loss_grid, timestep_grid

Stored = Callable[..., SampleStore]


class TestLossGrid:
    @pytest.mark.parametrize("classes", [0, 10])
    def test_an_entry_is_the_mean_loss_over_the_noises_of_its_timestep(self, stored: Stored, classes: int) -> None:
        unet, objective, store = tiny(classes=classes), make_objective(), stored(0, 5, labels=True)
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

    def test_fixed_losses_are_the_means_of_the_grid(self, stored: Stored) -> None:
        unet, objective, store, ids = tiny(), make_objective(), stored(0, 6), torch.arange(6)
        grid = loss_grid(unet, objective, store, ids, timesteps=4, seed=3)
        assert torch.equal(fixed_losses(unet, objective, store, ids, timesteps=4, seed=3), grid.mean(1))

    @settings(max_examples=8, deadline=None)
    @given(batch_size=st.integers(1, 9), fold=st.sampled_from([1, 2]))
    def test_scores_do_not_depend_on_the_batch_size(self, stored: Stored, batch_size: int, fold: int) -> None:
        unet, objective, store, ids = tiny(fold), make_objective(fold=fold), stored(0, 7), torch.arange(7)
        for score, options in ((loss_grid, {"timesteps": 2}), (pia_scores, {})):
            whole = score(unet, objective, store, ids, **options)
            seen: list[int] = []
            parts = score(unet, objective, store, ids, batch_size=batch_size, on_progress=seen.append, **options)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
            assert seen == [*range(batch_size, 7, batch_size), 7]

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_folding_changes_no_score(self, stored: Stored, prediction: Prediction) -> None:
        store, ids = stored(0, 4), torch.arange(4)
        for score in (loss_grid, pia_scores):
            plain, folded = (score(Pointwise(), make_objective(prediction, fold), store, ids) for fold in (1, 2))
            torch.testing.assert_close(folded, plain)

    def test_dropout_is_off_and_no_gradient_is_kept(self, stored: Stored) -> None:
        unet = build_unet(ModelConfig(preset="tiny", pixel_unshuffle=1, dropout=0.5), (1, 8, 8), 0, 0)
        for score in (loss_grid, pia_scores):
            unet.train()
            first, second = (score(unet, make_objective(), stored(0, 3), torch.arange(3)) for _ in range(2))
            assert torch.equal(first, second) and not first.requires_grad

    @pytest.mark.parametrize("options", [{"timesteps": 0}, {"noises": 0}, {"batch_size": 0}])
    def test_counts_below_one_are_refused_by_name(self, stored: Stored, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            loss_grid(tiny(), make_objective(), stored(0, 3), torch.arange(3), **options)  # type: ignore[arg-type]

    def test_no_ids_are_refused(self, stored: Stored) -> None:
        for score in (loss_grid, pia_scores, fixed_losses):
            with pytest.raises(ValueError, match="at least one id"):
                score(tiny(), make_objective(), stored(0, 3), torch.arange(0))
