"""Images to audit, from real tiny pipelines on disk: the same whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny_pipelines import assert_same, drawn, small_pipeline, small_unet

from ret_fl.audit.generate import generate, load_denoiser
from ret_fl.diffusion.sampling import draw_images, save_pipeline


class TestPixelPipelines:
    @pytest.mark.parametrize("ddim", [False, True])
    def test_images_of_a_pipeline(self, tmp_path: Path, ddim: bool) -> None:
        folder = small_pipeline(tmp_path / "model", ddim=ddim, channels=3)
        found = generate(folder, samples=5, seed=3, steps=4)
        assert (found.kind, found.name, found.seed, found.steps) == ("pipeline", "model", 3, 4)
        assert found.parameters == sum(p.numel() for p in small_unet(3).parameters())
        assert found.images.shape == (5, 3, 8, 8) and found.images.dtype == torch.float32
        assert found.images.min() >= 0 and found.images.max() <= 1 and found.images.std() > 0.01
        ours = draw_images(small_unet(3), DDPMScheduler(num_train_timesteps=100), 5, seed=3, steps=4)
        assert_same(found.images, ours)

    @pytest.mark.parametrize("more", [{}, {"num_class_embeds": 3}, {"side": (8, 4)}])
    def test_image_i_is_the_same_in_every_batch_size(self, tmp_path: Path, more: dict[str, Any]) -> None:
        folder = small_pipeline(tmp_path / "model", **more)
        whole = drawn(folder, batch_size=64)
        for size in (1, 2, 5):
            assert_same(drawn(folder, batch_size=size), whole)
        assert_same(drawn(folder, 3, batch_size=2), whole[:3])
        assert len(whole.flatten(1).unique(dim=0)) == 7

    def test_a_class_conditional_model_draws_all_classes_in_turn(self, tmp_path: Path) -> None:
        unet = small_unet(num_class_embeds=3)
        with torch.no_grad():
            unet.class_embedding.weight.mul_(50)
        DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(tmp_path)
        images = drawn(tmp_path, 6)
        for label in range(3):
            with torch.no_grad():
                unet.class_embedding.weight[label] += 100
            DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(tmp_path)
            now = drawn(tmp_path, 6)
            changed = [i for i in range(6) if not torch.allclose(now[i], images[i], atol=1e-4)]
            assert changed == [label, label + 3]
            images = now

    def test_a_run_gives_its_final_model_unfolded_and_not_its_old_samples(self, tmp_path: Path) -> None:
        run = tmp_path / "my-run"
        unet, scheduler = small_unet(4, 4), DDPMScheduler(num_train_timesteps=100)
        save_pipeline(run / "final", unet, scheduler, 2)
        (run / "config.json").write_text(json.dumps({"num-server-rounds": 2}))
        np.save(run / "samples.npy", np.zeros((7, 1, 8, 8), np.uint8))
        found = generate(run, samples=7, steps=3)
        assert (found.kind, found.name) == ("run", "my-run")
        assert_same(found.images, draw_images(unet, scheduler, 7, steps=3, fold=2))

    def test_drawn_images_take_the_size_and_colour_asked_for(self, tmp_path: Path) -> None:
        folder = small_pipeline(tmp_path / "model", channels=1)
        plain = drawn(folder, 2)
        assert_same(drawn(folder, 2, channels="rgb"), plain.expand(-1, 3, -1, -1))
        assert drawn(folder, 2, image_size=4).shape == (2, 1, 4, 4)


class TestLoadDenoiser:
    def test_it_is_the_model_with_its_schedule_and_fold(self, tmp_path: Path) -> None:
        save_pipeline(tmp_path / "final", small_unet(4, 4), DDPMScheduler(num_train_timesteps=60), 2)
        (tmp_path / "config.json").write_text(json.dumps({"num-server-rounds": 2}))
        found = load_denoiser(tmp_path, "cpu")
        assert found is not None
        unet, scheduler, fold = found
        assert (fold, scheduler.config.num_train_timesteps, unet.training) == (2, 60, False)
        expected = small_unet(4, 4).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items())

    def test_a_ddim_pipeline_keeps_its_schedule(self, tmp_path: Path) -> None:
        scheduler = DDIMScheduler(num_train_timesteps=70, beta_schedule="scaled_linear", prediction_type="v_prediction")
        DDIMPipeline(small_unet(), scheduler).save_pretrained(tmp_path)
        found = load_denoiser(tmp_path, "cpu")
        assert found is not None and found[1].config.prediction_type == "v_prediction"
        torch.testing.assert_close(
            found[1].alphas_cumprod, DDIMScheduler.from_pretrained(tmp_path / "scheduler").alphas_cumprod
        )

    def test_none_where_there_are_no_such_losses(self, tmp_path: Path) -> None:
        np.save(tmp_path / "images.npy", np.zeros((2, 4, 4), np.uint8))
        assert load_denoiser(tmp_path / "images.npy", "cpu") is None
        DDPMPipeline(small_unet(), DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path / "x0")
        with pytest.warns(UserWarning, match="leakage left out: .* predicts sample"):
            assert load_denoiser(tmp_path / "x0", "cpu") is None
        assert drawn(tmp_path / "x0", 1).isfinite().all()
