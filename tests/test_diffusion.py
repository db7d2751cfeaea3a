"""The diffusion parts are diffusers' own: same noise, same losses, and models that open without ret_fl."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ret_fl.config import ConfigError, DiffusionConfig, ModelConfig
from ret_fl.diffusion.models import PRESETS, build_unet, check_pretrained_schedule, fold_factor
from ret_fl.diffusion.objective import Objective, make_scheduler
from ret_fl.diffusion.sampling import draw_images, load_pipeline, save_pipeline, start_noise

torch.set_num_threads(1)
CPU = torch.device("cpu")
Prediction = Literal["epsilon", "v_prediction"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(channels: int = 1, side: int = 8, *, classes: int = 0, seed: int = 0) -> UNet2DModel:
    config = ModelConfig(preset="tiny", pixel_unshuffle=1, class_conditional=classes > 0)
    return build_unet(config, (channels, side, side), classes, seed).eval()


class Pointwise(nn.Module):
    """Works on every value alone, so folding cannot matter to it."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
        return (torch.tanh(x) * (1 + t[:, None, None, None] / 1000),)


class TestObjective:
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_losses_are_the_mean_squared_error_of_each_sample_to_diffusers_target(self, prediction: Prediction) -> None:
        scheduler = make_scheduler(DiffusionConfig(prediction=prediction, beta_schedule="scaled_linear"))
        unet, x0, noise = tiny(3), rand(5, 3, 8, 8), rand(5, 3, 8, 8, seed=1)
        t = torch.tensor([0, 1, 500, 998, 999])
        losses = Objective(scheduler, CPU).losses(unet, x0, t, noise, None)
        reference = DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
        )
        assert losses.shape == (5,) and losses.dtype == torch.float32
        for i in range(5):
            one = slice(i, i + 1)
            x_t = reference.add_noise(x0[one], noise[one], t[one])
            target = noise if prediction == "epsilon" else reference.get_velocity(x0, noise, t)
            with torch.no_grad():
                expected = F.mse_loss(unet(x_t, t[one]).sample, target[one])
            assert losses[i].item() == pytest.approx(expected.item(), rel=1e-4)

    def test_a_perfect_epsilon_prediction_has_loss_zero(self) -> None:
        noise = rand(4, 1, 8, 8)

        class Oracle(nn.Module):
            def forward(self, *_: Any, **__: Any) -> tuple[Tensor]:
                return (noise,)

        objective = Objective(make_scheduler(DiffusionConfig(prediction="epsilon")), CPU)
        losses = objective.losses(Oracle(), rand(4, 1, 8, 8, seed=1), torch.arange(4), noise, None)
        assert losses.tolist() == [0] * 4

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("fold", [2, 4])
    def test_folding_changes_no_loss(self, prediction: Prediction, fold: int) -> None:
        scheduler = make_scheduler(DiffusionConfig(prediction=prediction))
        x0, noise, t = rand(4, 3, 8, 8), rand(4, 3, 8, 8, seed=1), torch.tensor([0, 10, 400, 999])
        plain = Objective(scheduler, CPU)
        folding = Objective(scheduler, CPU, fold=fold)
        assert folding.folded(x0).shape == (4, 3 * fold**2, 8 // fold, 8 // fold)
        torch.testing.assert_close(
            folding.losses(Pointwise(), folding.folded(x0), t, folding.folded(noise), None),
            plain.losses(Pointwise(), x0, t, noise, None),
        )

    def test_folding_is_undone_by_pixel_shuffle(self) -> None:
        x = rand(2, 3, 8, 8)
        folded = Objective(make_scheduler(DiffusionConfig()), CPU, fold=2).folded(x)
        assert torch.equal(F.pixel_shuffle(folded, 2), x)

    def test_drawn_timesteps_are_uniform_over_the_whole_chain_and_noise_is_standard_normal(self) -> None:
        torch.manual_seed(0)
        objective = Objective(make_scheduler(DiffusionConfig(timesteps=10)), CPU)
        t, noise = objective.draw(torch.zeros(20_000, 1, 2, 2))
        counts = torch.bincount(t, minlength=10)
        assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * (20_000 * 0.09) ** 0.5
        assert noise.shape == (20_000, 1, 2, 2)
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02

    def test_labels_reach_a_class_conditional_unet(self) -> None:
        unet = tiny(classes=3)
        objective = Objective(make_scheduler(DiffusionConfig()), CPU)
        x0, noise, t = (
            rand(1, 1, 8, 8).repeat(3, 1, 1, 1),
            rand(1, 1, 8, 8, seed=1).repeat(3, 1, 1, 1),
            torch.ones(3).long(),
        )
        losses = objective.losses(unet, x0, t, noise, torch.tensor([0, 1, 1]))
        assert losses[1].item() == pytest.approx(losses[2].item(), rel=1e-5)
        assert losses[0].item() != pytest.approx(losses[1].item(), rel=1e-5)

    def test_bf16_losses_come_in_float32_and_close_to_those_of_float32(self) -> None:
        scheduler = make_scheduler(DiffusionConfig())
        x0, noise, t = rand(2, 1, 8, 8), rand(2, 1, 8, 8, seed=1), torch.tensor([10, 500])
        half, full = (
            Objective(scheduler, CPU, half=h).losses(tiny(), x0, t, noise, None) for h in (torch.bfloat16, None)
        )
        assert half.dtype == torch.float32 and not torch.equal(half, full)
        torch.testing.assert_close(half, full, rtol=0.05, atol=0)


class TestSampling:
    def test_an_image_starts_from_the_same_noise_wherever_its_batch_begins(self) -> None:
        shape = (1, 4, 4)
        whole = start_noise(5, 0, 10, shape)
        for first, count in ((0, 1), (3, 4), (9, 1)):
            assert torch.equal(start_noise(5, first, count, shape), whole[first : first + count])
        assert len({tuple(image.flatten().tolist()) for image in whole}) == 10

    @pytest.mark.parametrize("seed", [1, 2**32, 2**63 - 1])
    def test_other_seeds_start_from_other_noise(self, seed: int) -> None:
        images = torch.cat([start_noise(s, 0, 5, (1, 4, 4)) for s in (0, seed)])
        assert len({tuple(image.flatten().tolist()) for image in images}) == 10

    def test_starting_noise_is_standard_normal(self) -> None:
        noise = start_noise(0, 0, 200, (1, 10, 10))
        assert noise.dtype == torch.float32 and abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
        assert abs(torch.corrcoef(noise.flatten(1))[~torch.eye(200, dtype=torch.bool)].mean()) < 0.01

    @pytest.mark.parametrize("classes", [0, 3])
    def test_drawn_images_do_not_depend_on_the_batch_size(self, classes: int) -> None:
        unet, scheduler = tiny(classes=classes), make_scheduler(DiffusionConfig())
        drawn = [draw_images(unet, scheduler, 5, steps=4, batch_size=size) for size in (1, 2, 5, 256)]
        assert drawn[0].shape == (5, 1, 8, 8) and drawn[0].min() >= 0 and drawn[0].max() <= 1
        for other in drawn[1:]:
            torch.testing.assert_close(other, drawn[0], atol=1e-5, rtol=0)

    def test_progress_counts_finished_images(self) -> None:
        told: list[int] = []
        draw_images(tiny(), make_scheduler(DiffusionConfig()), 5, steps=1, batch_size=2, on_progress=told.append)
        assert told == [2, 4, 5]

    def test_no_images_have_the_shape_of_images(self) -> None:
        unet = tiny(channels=4, side=4)
        assert draw_images(unet, make_scheduler(DiffusionConfig()), 0, fold=2).shape == (0, 1, 8, 8)

    @pytest.mark.parametrize("timesteps", [2, 7, 1000])
    def test_more_steps_than_the_chain_has_are_no_error(self, timesteps: int) -> None:
        scheduler = make_scheduler(DiffusionConfig(timesteps=timesteps))
        steps = 50 if timesteps < 50 else 3
        assert draw_images(tiny(), scheduler, 1, steps=steps).isfinite().all()

    def test_a_model_that_knows_the_noise_gives_back_its_image(self) -> None:
        """DDIM with exact epsilon ends at x0, unfolded: an end-to-end oracle of schedule, range and folding."""
        image = rand(1, 1, 8, 8).clamp(-1, 1)
        x0 = F.pixel_unshuffle(image, 2)
        scheduler = make_scheduler(DiffusionConfig())

        class Knowing(UNet2DModel):
            def forward(self, sample: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
                alpha_bar = scheduler.alphas_cumprod[timestep]
                return ((sample - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt(),)

        unet = Knowing(sample_size=4, in_channels=4, out_channels=4, norm_num_groups=8, **SMALLEST)
        drawn = draw_images(unet, scheduler, 2, steps=50, fold=2)
        torch.testing.assert_close(drawn, ((image + 1) / 2).expand(2, -1, -1, -1), atol=2e-3, rtol=0)


SMALLEST: dict[str, Any] = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}

STRANGER = """
import sys
sys.modules["ret_fl"] = None  # importing it raises
import json, torch
from diffusers import DDPMPipeline
torch.set_num_threads(1)
out = {}
for folder in sys.argv[1:]:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
    weight = float(sum(p.double().abs().sum() for p in pipeline.unet.parameters()))
    out[folder] = [images.shape, pipeline.scheduler.config.prediction_type, weight]
try:
    import ret_fl
except ImportError:
    print(json.dumps(out))
"""


class TestPipelineFolder:
    def test_diffusers_alone_opens_a_saved_model_and_draws_from_it(self, tmp_path: Path) -> None:
        cases: dict[str, tuple[UNet2DModel, Prediction, int, list[int]]] = {
            "plain": (tiny(), "epsilon", 1, [2, 8, 8, 1]),
            "v-rgb": (tiny(3), "v_prediction", 1, [2, 8, 8, 3]),
            "folded": (tiny(4, 4), "epsilon", 2, [2, 4, 4, 4]),
        }
        for name, (unet, prediction, fold, _) in cases.items():
            save_pipeline(tmp_path / name, unet, make_scheduler(DiffusionConfig(prediction=prediction)), fold)
        ran = subprocess.run(
            [sys.executable, "-I", "-c", STRANGER, *map(str, map(tmp_path.joinpath, cases))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        told = json.loads(ran.stdout)
        for name, (unet, prediction, _, shape) in cases.items():
            found_shape, found_prediction, weight = told[str(tmp_path / name)]
            assert (found_shape, found_prediction) == (shape, prediction)
            assert weight == pytest.approx(sum(p.detach().double().abs().sum().item() for p in unet.parameters()))

    def test_it_holds_no_pickle(self, tmp_path: Path) -> None:
        save_pipeline(tmp_path, tiny(), make_scheduler(DiffusionConfig()), 2)
        assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}

    @pytest.mark.parametrize("fold", [1, 2])
    def test_loading_it_draws_the_same_images(self, tmp_path: Path, fold: int) -> None:
        unet, scheduler = tiny(4, 4), make_scheduler(DiffusionConfig(timesteps=200))
        save_pipeline(tmp_path, unet, scheduler, fold)
        again, its_scheduler, its_fold = load_pipeline(tmp_path)
        assert its_fold == fold and its_scheduler.config.num_train_timesteps == 200
        before = draw_images(unet, scheduler, 2, steps=3, fold=fold)
        assert torch.equal(draw_images(again, its_scheduler, 2, steps=3, fold=its_fold), before)

    def test_a_folder_without_a_model_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"not a diffusers pipeline: it has no model_index\.json"):
            load_pipeline(tmp_path)


class TestModels:
    FITTING = (("tiny", 8, 4), ("small", 16, 6), ("base", 32, 4), ("ddpm-cifar", 32, 8), ("ddpm-64", 64, 16))

    @pytest.mark.parametrize(("preset", "side", "step"), [(p, s, d) for p, s, d in FITTING])
    def test_every_preset_builds_for_its_size_and_explains_a_size_that_does_not_fit(
        self, preset: Any, side: int, step: int
    ) -> None:
        config = ModelConfig(preset=preset, pixel_unshuffle=1)
        with torch.device("meta"):
            unet = build_unet(config, (3, side, side), 0, 0)
            out = unet(torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.int64)).sample
        assert out.shape == (2, 3, side, side)
        levels = len(PRESETS[preset]["block_out_channels"])
        for unfit in (side + 1, side + 2 ** (levels - 1) // 2, 2 ** (levels - 1)):
            with pytest.raises(ConfigError, match=f"model.preset={preset} .* a side of {unfit}: .* data.image-size"):
                build_unet(config, (3, unfit, unfit), 0, 0)

    def test_every_preset_of_the_settings_exists(self) -> None:
        assert (
            {p for p, _, _ in self.FITTING}
            == set(PRESETS)
            == set(ModelConfig.model_fields["preset"].annotation.__args__)
        )

    def test_the_papers_cifar_unet_has_its_size(self) -> None:
        with torch.device("meta"):
            unet = build_unet(ModelConfig(preset="ddpm-cifar"), (3, 32, 32), 0, 0)
        assert sum(p.numel() for p in unet.parameters()) == pytest.approx(35.7e6, rel=0.01)

    def test_images_of_sixteen_pixels_are_folded_by_the_small_presets_unless_told_otherwise(self) -> None:
        for preset, expected in (("tiny", 2), ("small", 2), ("base", 1)):
            assert fold_factor(ModelConfig(preset=preset), (1, 16, 16)) == expected  # type: ignore[arg-type]
        assert fold_factor(ModelConfig(pixel_unshuffle=1), (1, 16, 16)) == 1
        assert fold_factor(ModelConfig(), (1, 32, 32)) == 1
        unet = build_unet(ModelConfig(), (3, 16, 16), 0, 0)
        assert (unet.config.in_channels, unet.config.sample_size) == (12, 8)

    def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        a, b, c = (tiny(seed=s).state_dict() for s in (7, 7, 8))
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(not torch.equal(a[k], c[k]) for k in a)

    @pytest.mark.parametrize(
        ("settings", "shape", "message"),
        [
            ({}, (1, 8, 10), r"square \(got 8x10\): set data\.image-size"),
            ({"pixel_unshuffle": 3}, (1, 8, 8), r"model\.pixel-unshuffle=3 must divide the image side 8"),
            ({"class_conditional": True}, (1, 8, 8), r"model\.class-conditional needs labels"),
            ({"pixel_unshuffle": 8}, (1, 8, 8), r"a side of 1"),
        ],
    )
    def test_a_model_that_cannot_be_is_refused_with_the_setting(
        self, settings: dict[str, Any], shape: tuple[int, int, int], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            build_unet(ModelConfig(**settings), shape, 0, 0)

    def test_a_class_conditional_unet_embeds_every_class(self) -> None:
        unet = tiny(classes=5)
        with torch.no_grad():
            out = [unet(rand(1, 1, 8, 8), torch.tensor([10]), class_labels=torch.tensor([c])).sample for c in range(5)]
        assert all(not torch.allclose(out[0], other) for other in out[1:])


class TestInitFrom:
    def config(self, folder: Path, **settings: Any) -> ModelConfig:
        return ModelConfig(init_from=str(folder), pixel_unshuffle=1, **settings)

    @pytest.mark.parametrize("whole_pipeline", [True, False])
    def test_pretrained_weights_are_taken_over(self, tmp_path: Path, whole_pipeline: bool) -> None:
        pretrained = tiny(seed=42)
        if whole_pipeline:
            save_pipeline(tmp_path, pretrained, make_scheduler(DiffusionConfig()), 1)
        else:
            pretrained.save_pretrained(tmp_path)
        unet = build_unet(self.config(tmp_path, preset="base"), (1, 8, 8), 10, 0)
        found, expected = unet.state_dict(), pretrained.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)

    @pytest.mark.parametrize(
        ("shape", "classes", "settings"),
        [((3, 8, 8), 0, {}), ((1, 16, 16), 0, {}), ((1, 8, 8), 10, {"class_conditional": True})],
    )
    def test_a_model_of_another_size_is_refused_naming_the_settings(
        self, tmp_path: Path, shape: tuple[int, int, int], classes: int, settings: dict[str, Any]
    ) -> None:
        tiny().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"takes 1 channels of side 8") as refusal:
            build_unet(self.config(tmp_path, **settings), shape, classes, 0)
        for setting in ("data.image-size", "data.channels", "model.pixel-unshuffle", "model.class-conditional"):
            assert setting in str(refusal.value)

    def test_a_folder_without_a_unet2dmodel_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"model\.init-from: .* holds no diffusers model"):
            build_unet(self.config(tmp_path / "missing"), (1, 8, 8), 0, 0)
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        with pytest.raises(ConfigError, match="holds a UNet2DConditionModel"):
            build_unet(self.config(tmp_path), (1, 8, 8), 0, 0)


@pytest.mark.parametrize("steps", [50, 7, 150, 501, 600, 5000])
def test_drawing_starts_near_pure_noise_for_any_number_of_steps(steps: int) -> None:
    """A model that removes all the noise at once shows the first timestep it was asked about."""
    asked: list[int] = []
    unet = tiny()
    forward = unet.forward

    def listening(x: torch.Tensor, t: torch.Tensor, **kwargs: object) -> object:
        asked.append(int(t))
        if len(asked) > 3:
            raise StopIteration
        return forward(x, t, **kwargs)

    unet.forward = listening
    with contextlib.suppress(StopIteration, RuntimeError):
        draw_images(unet, make_scheduler(DiffusionConfig()), 1, steps=steps)
    assert asked[0] >= 850
    assert asked == sorted(asked, reverse=True)


def test_a_pretrained_folder_with_another_schedule_is_refused(tmp_path: Path) -> None:
    theirs = make_scheduler(DiffusionConfig(prediction="epsilon"))
    save_pipeline(tmp_path, tiny(), theirs, 1)
    model = ModelConfig(init_from=str(tmp_path))
    with pytest.raises(ConfigError, match=r"set diffusion\.prediction=epsilon"):
        check_pretrained_schedule(model, DiffusionConfig())
    check_pretrained_schedule(model, DiffusionConfig(prediction="epsilon"))
