"""What a folder holds is told apart, and text-to-image draws image by image as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, EulerAncestralDiscreteScheduler
from tiny_pipelines import assert_same, drawn, edit_index, small_pipeline, small_unet, text_pipeline
from torch import Tensor

from ret_fl.audit.generate import generate, load_denoiser
from ret_fl.audit.ready import read_images


class TestTextToImage:
    def draw(self, folder: Path, samples: int = 5, **more: Any) -> Tensor:
        return drawn(folder, samples, **({"prompts": ["a cat", "a dog", "zzz"], "steps": 2} | more))

    def test_images_follow_prompt_seed_and_guidance_and_no_batch_size(self, tmp_path: Path) -> None:
        folder = text_pipeline(tmp_path / "sd")
        found = generate(folder, samples=5, steps=2, prompts=["a cat", "a dog", "zzz"])
        assert (found.kind, found.seed, found.steps) == ("pipeline", 0, 2)
        assert found.images.shape == (5, 3, 16, 16) and found.images.dtype == torch.float32
        assert found.images.min() >= 0 and found.images.max() <= 1
        for size in (1, 2):
            assert_same(self.draw(folder, batch_size=size), found.images)
        assert (found.prompts, found.guidance) == (("a cat", "a dog", "zzz"), 7.5)
        other = self.draw(folder, prompts=["a cat", "mm", "zzz"], guidance=20.0)
        same = self.draw(folder, prompts=["a cat", "a dog", "zzz"], guidance=20.0)
        assert [torch.equal(a, b) for a, b in zip(other, same, strict=True)] == [True, False, True, True, False]
        assert not torch.allclose(found.images[0], same[0], atol=1e-6)
        assert not torch.allclose(found.images, self.draw(folder, seed=1), atol=1e-3)
        with pytest.warns(UserWarning, match="leakage left out: losses of text-to-image"):
            assert load_denoiser(folder, "cpu") is None

    def test_noise_added_at_every_step_is_the_images_own(self, tmp_path: Path) -> None:
        folder = text_pipeline(tmp_path / "sd")
        EulerAncestralDiscreteScheduler(num_train_timesteps=100, steps_offset=1).save_pretrained(folder / "scheduler")
        edit_index(folder, scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
        whole = self.draw(folder)
        assert_same(self.draw(folder, batch_size=1), whole)
        assert_same(self.draw(folder, batch_size=2), whole)

    def test_it_resumes_and_other_prompts_or_guidance_reuse_nothing(self, tmp_path: Path) -> None:
        folder, cache = text_pipeline(tmp_path / "sd"), tmp_path / "cache"
        whole = self.draw(folder, cache=cache, batch_size=2)
        next(cache.rglob("00000002.npz")).unlink()
        assert_same(self.draw(folder, cache=cache, batch_size=5), whole)
        for more in ({"prompts": ["b"]}, {"guidance": 1.0}):
            self.draw(folder, cache=cache, **more)
        assert len(list(cache.iterdir())) == 3

    def test_a_safety_checker_is_not_loaded(self, tmp_path: Path) -> None:
        folder = text_pipeline(tmp_path / "sd", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
        assert self.draw(folder, 1).shape == (1, 3, 16, 16)

    def test_nothing_is_printed_while_it_draws(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        folder = text_pipeline(tmp_path / "sd")
        ddim = small_pipeline(tmp_path / "ddim", ddim=True)
        capfd.readouterr()
        self.draw(folder, 2)
        drawn(ddim, 2)
        assert capfd.readouterr() == ("", "")

    def test_what_cannot_be_drawn_is_said(self, tmp_path: Path) -> None:
        folder = text_pipeline(tmp_path / "sd")
        with pytest.raises(ValueError, match="sd draws images from text: give it --prompts"):
            generate(folder)
        edit_index(folder, _class_name="StableDiffusionImg2ImgPipeline")
        with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline does not draw from a prompt alone"):
            self.draw(folder)
        edit_index(folder, _class_name="NeverHeardOfPipeline")
        with pytest.raises(ValueError, match=r"diffusers [\d.]+\w* knows no pipeline NeverHeardOfPipeline"):
            self.draw(folder)
        edit_index(folder, _class_name="StableDiffusionPipeline", unet=["mine", "UNet2DConditionModel"])
        (folder / "unet" / "mine.py").write_text("raise SystemExit('code of the folder ran')")
        with pytest.raises(ValueError, match=r"its unet is code of its own \(mine\)"):
            self.draw(folder)


class TestWhatIsNoModel:
    def test_a_missing_path(self, tmp_path: Path) -> None:
        for call in (generate, read_images, lambda path: load_denoiser(path, "cpu")):
            with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
                call(tmp_path / "nowhere")

    def test_a_run_that_is_not_finished(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"num-server-rounds": 20}))
        with pytest.raises(FileNotFoundError, match="is a run without final/"):
            generate(tmp_path)

    def test_a_single_model_without_its_pipeline(self, tmp_path: Path) -> None:
        small_unet().save_pretrained(tmp_path / "one")
        with pytest.raises(FileNotFoundError, match=r"one holds one model and no model_index\.json"):
            generate(tmp_path / "one")
        folder = small_pipeline(tmp_path / "model")
        (folder / "model_index.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"not a whole diffusers pipeline: it has no model_index\.json"):
            generate(folder)

    def test_a_pipeline_that_is_not_diffusion(self, tmp_path: Path) -> None:
        index = {"_class_name": "TextGeneration", "decoder": ["transformers", "GPT2LMHeadModel"], "unet": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        for call in (generate, lambda path: load_denoiser(path, "cpu")):
            with pytest.raises(ValueError, match=r"cannot draw from a TextGeneration of decoder \(GPT2LMHeadModel\)"):
                call(tmp_path)

    def test_a_consistency_model_has_no_noise_schedule(self, tmp_path: Path) -> None:
        folder = small_pipeline(tmp_path / "model")
        CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")
        with pytest.raises(ValueError, match="a CMStochasticIterativeScheduler has no noise schedule"):
            generate(folder)

    def test_a_unet_that_cannot_be_sampled(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="makes 2 channels from 1"):
            generate(small_pipeline(tmp_path / "variance", out_channels=2))
        with pytest.raises(ValueError, match=r"sizeless cannot be loaded: .* no sample_size"):
            generate(small_pipeline(tmp_path / "sizeless", side=None))

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        folder = small_pipeline(tmp_path / "model")
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="model cannot be loaded"):
            generate(folder)
        weights.unlink()
        with pytest.raises(ValueError, match="model cannot be loaded"):
            generate(folder)
        (folder / "model_index.json").write_text("{")
        with pytest.raises(ValueError, match=r"model_index\.json is damaged"):
            generate(folder)

    @pytest.mark.parametrize("setting", ["samples", "steps", "batch_size", "seed"])
    def test_numbers_out_of_range(self, tmp_path: Path, setting: str) -> None:
        least = 0 if setting == "seed" else 1
        with pytest.raises(ValueError, match=f"{setting} must be >= {least}, got {least - 1}"):
            generate(tmp_path, **{setting: least - 1})
