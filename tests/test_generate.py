"""Images to audit, from real tiny pipelines on disk and from files: the same whatever the batches and interruptions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ret_fl.audit.generate import Generated, generate, load_denoiser, read_images
from ret_fl.diffusion.sampling import draw_images, save_pipeline

torch.set_num_threads(1)
MakePipeline = Callable[..., Path]
SMALLEST: dict[str, Any] = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 2,  # of several channels each: with one a group, the norm would take time and class out again
    "add_attention": False,
}


def small_unet(channels: int = 1, side: Any = 8, *, seed: int = 0, **more: Any) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(sample_size=side, in_channels=channels, **({"out_channels": channels} | SMALLEST | more)).eval()


def small_pipeline(folder: Path, *, ddim: bool = False, **unet: Any) -> Path:
    kind, scheduler = (DDIMPipeline, DDIMScheduler) if ddim else (DDPMPipeline, DDPMScheduler)
    kind(small_unet(**unet), scheduler(num_train_timesteps=100)).save_pretrained(folder)
    return folder


def drawn(model: Path, samples: int = 7, **more: Any) -> Tensor:
    return generate(model, samples=samples, **({"steps": 3} | more)).images


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


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


class TestCache:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return small_pipeline(tmp_path / "model")

    def files(self, cache: Path) -> dict[Path, tuple[int, int]]:
        stats = {file: file.stat() for file in sorted(cache.rglob("*.npz"))}
        return {file: (stat.st_mtime_ns, stat.st_ino) for file, stat in stats.items()}

    def test_a_second_call_draws_nothing_and_more_samples_only_the_rest(self, tmp_path: Path, model: Path) -> None:
        cache, told = tmp_path / "cache", []
        first = drawn(model, 5, cache=cache, batch_size=2, on_progress=lambda *at: told.append(at))
        assert told == [(2, 5), (4, 5), (5, 5)]
        before = self.files(cache)
        assert [file.name for file in before] == ["00000000.npz", "00000002.npz", "00000004.npz"]
        assert torch.equal(drawn(model, 5, cache=cache, batch_size=64), first)
        assert torch.equal(drawn(model, 3, cache=cache), first[:3])
        assert self.files(cache) == before
        more = drawn(model, 9, cache=cache, batch_size=3)
        after = self.files(cache)
        assert before.items() <= after.items() and [file.name for file in after][3:] == ["00000005.npz", "00000008.npz"]
        assert torch.equal(more[:5], first)
        assert_same(more, drawn(model, 9))

    def test_an_interrupted_call_is_taken_up_where_it_stopped(self, tmp_path: Path, model: Path) -> None:
        def stop(done: int, total: int) -> None:
            if done >= 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            drawn(model, 6, cache=tmp_path / "cache", batch_size=2, on_progress=stop)
        before = self.files(tmp_path / "cache")
        assert len(before) == 2
        next(iter(before)).with_name("00000004.tmp").write_bytes(b"half of a batch")
        resumed = drawn(model, 6, cache=tmp_path / "cache", batch_size=2)
        assert before.items() <= self.files(tmp_path / "cache").items()
        assert_same(resumed, drawn(model, 6))

    @pytest.mark.parametrize("batch_size", [1, 2, 64])
    def test_a_lost_batch_is_drawn_again_and_no_other(self, tmp_path: Path, model: Path, batch_size: int) -> None:
        cache = tmp_path / "cache"
        whole = drawn(model, cache=cache, batch_size=3)
        before = self.files(cache)
        lost = next(file for file in before if file.name == "00000003.npz")
        lost.unlink()
        assert_same(drawn(model, cache=cache, batch_size=batch_size), whole)
        kept = {file: stat for file, stat in before.items() if file != lost}
        assert kept.items() <= self.files(cache).items()
        assert sum(len(np.load(file)["images"]) for file in self.files(cache)) == len(whole)

    def test_a_damaged_batch_is_drawn_again(
        self, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = tmp_path / "cache"
        whole = drawn(model, cache=cache, batch_size=3)
        file = list(self.files(cache))[1]
        intact = file.read_bytes()

        @settings(max_examples=40, deadline=None)
        @given(st.integers(0, len(intact) - 1), st.integers(1, 255), st.booleans())
        def damaged_at(position: int, flip: int, cut: bool) -> None:
            tail = b"" if cut else bytes([intact[position] ^ flip]) + intact[position + 1 :]
            file.write_bytes(intact[:position] + tail)
            assert_same(drawn(model, cache=cache, batch_size=3), whole)

        damaged_at()
        file.write_bytes(intact[:-100])
        with caplog.at_level(logging.WARNING):
            drawn(model, cache=cache, batch_size=3)
        assert f"{file} is damaged" in caplog.text
        assert file.stat().st_size == len(intact)

    def test_another_model_seed_or_number_of_steps_reuses_nothing(self, tmp_path: Path, model: Path) -> None:
        cache = tmp_path / "cache"
        before = drawn(model, cache=cache)
        for more in ({"seed": 1}, {"steps": 4}):
            assert_same(drawn(model, cache=cache, **more), drawn(model, **more))
        small_pipeline(model, seed=1)
        assert_same(drawn(model, cache=cache), drawn(model))
        assert not torch.allclose(drawn(model, cache=cache), before, atol=1e-3)
        assert len(list(cache.iterdir())) == 4

    def test_another_schedule_is_another_model_and_a_copy_elsewhere_is_the_same(
        self, tmp_path: Path, model: Path
    ) -> None:
        cache = tmp_path / "cache"
        drawn(model, cache=cache)
        drawn(small_pipeline(tmp_path / "copy"), cache=cache)
        assert len(list(cache.iterdir())) == 1
        schedule = model / "scheduler" / "scheduler_config.json"
        schedule.write_text(schedule.read_text().replace('"linear"', '"squaredcos_cap_v2"'))
        drawn(model, cache=cache)
        assert len(list(cache.iterdir())) == 2

    def test_the_cache_says_what_it_holds(self, tmp_path: Path, model: Path) -> None:
        drawn(model, cache=tmp_path / "cache", seed=5)
        (key,) = (tmp_path / "cache").glob("*/key.json")
        assert json.loads(key.read_text())["seed"] == 5


def text_pipeline(folder: Path, **model_index: Any) -> Path:
    """A random StableDiffusionPipeline: 8x8 latents, 16x16 images, a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    from diffusers import StableDiffusionPipeline

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=2,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    edit_index(folder, **model_index)
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


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
        other = self.draw(folder, prompts=["a cat", "mm", "zzz"], guidance=20.0)
        same = self.draw(folder, prompts=["a cat", "a dog", "zzz"], guidance=20.0)
        assert [torch.equal(a, b) for a, b in zip(other, same, strict=True)] == [True, False, True, True, False]
        assert not torch.allclose(found.images[0], same[0], atol=1e-6)
        assert not torch.allclose(found.images, self.draw(folder, seed=1), atol=1e-3)
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
        assert load_denoiser(tmp_path / "x0", "cpu") is None
        assert drawn(tmp_path / "x0", 1).isfinite().all()


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def save_pictures(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    """uint8 [N, H, W] or [N, H, W, 3], a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")
    return folder


class TestReadyImages:
    @pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
    def test_a_folder_of_pictures(self, tmp_path: Path, suffix: str) -> None:
        images = random_bytes(5, 8, 6, 3)
        folder = save_pictures(tmp_path / "drawn", images, suffix)
        found = generate(folder, samples=4)
        expected = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in sorted(folder.iterdir())[:4]])
        assert torch.equal(found.images, torch.from_numpy(expected).permute(0, 3, 1, 2) / 255)
        assert found == Generated(found.images, "images", "drawn", None, None, None)
        if suffix == ".png":
            assert np.array_equal(expected, images[:4])

    def test_the_users_cache_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
        folder = save_pictures(tmp_path / "drawn", random_bytes(2, 8, 8))
        read_images(folder)
        generate(folder, cache=tmp_path / "mine")
        assert not (tmp_path / "users").exists()
        assert (tmp_path / "mine").is_dir()

    def test_pictures_take_the_size_and_colour_asked_for(self, tmp_path: Path) -> None:
        folder = save_pictures(tmp_path / "drawn", random_bytes(2, 8, 12))
        save_pictures(folder / "more", random_bytes(2, 10, 10))
        assert read_images(folder, image_size=4, channels="rgb").shape == (4, 3, 4, 4)
        with pytest.raises(ValueError, match=r"drawn: the images differ in size \(10x10, 12x8\): set --image-size"):
            read_images(folder)

    def test_an_unreadable_picture_is_named(self, tmp_path: Path) -> None:
        folder = save_pictures(tmp_path / "drawn", random_bytes(3, 8, 8))
        broken = folder / "001.png"
        broken.write_bytes(broken.read_bytes()[:60])
        with pytest.raises(ValueError, match=r"drawn: cannot read 001\.png: [^;]*$"):
            generate(folder)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for call in (generate, read_images):
            with pytest.raises(ValueError, match=r"no PNG, JPEG, WebP or BMP images below .*empty"):
                call(tmp_path / "empty")

    @given(
        st.integers(1, 4),
        st.integers(4, 9),
        st.integers(4, 9),
        st.sampled_from([1, 3]),
        st.sampled_from([np.uint8, np.float16, np.float32, np.float64]),
        st.booleans(),
    )
    @settings(max_examples=40, deadline=None)
    def test_every_layout_and_type_of_npy_is_the_same_images(
        self, tmp_path_factory: pytest.TempPathFactory, n: int, h: int, w: int, c: int, dtype: type, last: bool
    ) -> None:
        path = tmp_path_factory.mktemp("npy") / "images.npy"
        pixels = random_bytes(n, c, h, w)
        stored = pixels if dtype == np.uint8 else (pixels / 255).astype(dtype)
        np.save(path, stored.transpose(0, 2, 3, 1) if last else stored)
        expected = torch.from_numpy(pixels.astype(np.float32) / 255)
        torch.testing.assert_close(read_images(path), expected, atol=3e-4 if dtype == np.float16 else 1e-7, rtol=0)
        if c == 1:
            np.save(path, stored[:, 0])
            assert read_images(path).shape == (n, 1, h, w)
        found = generate(path, samples=2)
        assert found.images.shape[0] == min(n, 2) and found.images.is_contiguous()

    @pytest.mark.parametrize("colours", [(), (3,)])
    def test_npy_and_pictures_are_resized_and_recoloured_alike(self, tmp_path: Path, colours: tuple[int, ...]) -> None:
        smooth = np.linspace(0, 255, 24 * 30).reshape(24, 30)
        images = np.stack([smooth, 255 - smooth])
        images = (images[..., None] * np.linspace(0.5, 1, 3) if colours else images).astype(np.uint8)
        folder = save_pictures(tmp_path / "drawn", images)
        np.save(tmp_path / "drawn.npy", images)
        for channels in ("auto", "grey", "rgb"):
            a, b = (read_images(path, 12, channels) for path in (folder, tmp_path / "drawn.npy"))
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1.5 / 255, rtol=0)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.full((3, 4, 4), np.nan), r"3 of 3 images hold NaN or values outside \[0, 1\]"),
            (np.array([0.5, 1.5]).repeat(16).reshape(2, 1, 4, 4), "1 of 2 images hold NaN"),
            (np.full((1, 4, 4), -0.5, np.float32), "1 of 1 images hold NaN"),
            (np.zeros((2, 4, 4), np.int64), "holds int64: save it as uint8"),
            (np.zeros((4, 4), np.uint8), r"must hold images \[N, C, H, W\].*, not \(4, 4\)"),
            (np.zeros((0, 4, 4), np.uint8), r"must hold images .*, not \(0, 4, 4\)"),
            (np.zeros((2, 4, 8, 8), np.uint8), r"1 or 3 channels, not \(2, 4, 8, 8\)"),
            (np.array([{"a": 1}], dtype=object), "cannot be read as a .npy file"),
        ],
    )
    def test_a_bad_npy_is_named_with_what_is_wrong(self, tmp_path: Path, array: np.ndarray, message: str) -> None:
        np.save(tmp_path / "bad.npy", array, allow_pickle=True)
        for call in (generate, read_images):
            with pytest.raises(ValueError, match=r"bad\.npy.*" + message):
                call(tmp_path / "bad.npy")

    def test_a_file_that_is_no_npy(self, tmp_path: Path) -> None:
        (tmp_path / "images.npy").write_bytes(b"not numpy")
        with pytest.raises(ValueError, match=r"images\.npy cannot be read as a \.npy file"):
            generate(tmp_path / "images.npy")
        (tmp_path / "images.zip").write_bytes(b"")
        with pytest.raises(ValueError, match=r"images\.zip is neither a folder nor a \.npy file"):
            generate(tmp_path / "images.zip")
