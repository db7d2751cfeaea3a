"""Fine-tuning goes on from a pretrained pipeline: its weights, its fold, a bank that knows what it knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_trainer, run_server
from diffusers import DDPMPipeline
from orders import ALL_T, make_order, train
from PIL import Image
from sklearn.datasets import load_digits

from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.proxy import Round
from ret_fl.rundir import RunDir
from ret_fl.settings import change_run, read_preset

Tiny = Callable[..., RunConfig]
WARM: dict[str, Scalar] = ALL_T | {"agc.warm-passes": 3}
EPSILON: dict[str, Scalar] = {"diffusion.prediction": "epsilon", "diffusion.beta-schedule": "linear"}


def test_a_warm_bank_holds_the_losses_of_the_model_that_is_given(tiny: Tiny) -> None:
    cold, warm = tiny(ALL_T), tiny(WARM)
    n = len(make_order(cold).ids)
    before = train(cold).report.bank_visits.sum()
    report = train(warm).report
    assert report.bank_visits.sum() - before == 3 * n
    assert report.images == train(cold).report.images  # what fills the bank is not trained on
    assert report.visits.sum() == n and report.bank_values.max() > 0


def test_a_bank_is_warmed_in_parts_of_micro_batch_to_the_same_end(tiny: Tiny) -> None:
    banks, most = [], []
    for micro_batch in (0, 3):
        config = tiny(WARM, {"micro-batch": micro_batch})
        data, trainer = load_splits(config.data), make_trainer(config)
        losses, sizes = trainer.objective.losses, list[int]()

        def watched(*arguments: Any, losses: Any = losses, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(arguments[1]))
            return losses(*arguments)

        trainer.objective.losses = watched  # type: ignore[method-assign]
        torch.manual_seed(0)
        round_ = Round(trainer, make_order(config), data.train, data.kind)
        round_.warm_bank(np.random.default_rng(0))
        banks.append(round_.bank)
        most.append(max(sizes))
    assert most[0] > 3 and most[1] == 3
    torch.testing.assert_close(banks[0].values, banks[1].values)
    assert torch.equal(banks[0].visits, banks[1].visits)


def test_only_an_empty_bank_is_warmed(tiny: Tiny) -> None:
    config = tiny(WARM)
    order = make_order(config, bank=1e-6)
    assert train(config, order).report.bank_visits.sum() == order.bank_visits.sum() + len(order.ids)


def test_a_warm_bank_skips_in_the_first_round_where_a_cold_one_cannot(tiny: Tiny) -> None:
    # 50 passes fill all of 4 timesteps; then what is far below the usual is skipped from the first batch on
    few: dict[str, Scalar] = {"diffusion.timesteps": 4, "agc.mem-ratio": 1.05, "batch-size": 20}
    cold, warm = tiny(ALL_T, few), tiny(ALL_T, few, {"agc.warm-passes": 50})
    assert train(cold).report.skips.sum() == 0  # a single batch, and the bank is read before it is filled
    assert train(warm).report.skips.sum() > 3


def test_training_images_are_mirrored_half_of_the_time_where_asked(tiny: Tiny) -> None:
    config = tiny({"data.flip": True, "local-epochs": 20})
    data = load_splits(config.data)
    trainer, order = make_trainer(config), make_order(config)
    seen: list[torch.Tensor] = []
    folded = trainer.objective.folded
    trainer.objective.folded = lambda images: seen.append(images.clone()) or folded(images)  # type: ignore[func-returns-value, method-assign]
    round_ = Round(trainer, order, data.train, data.kind)
    position = torch.arange(20).repeat(20)
    torch.manual_seed(0)
    for part in position.split(40):
        round_.batch(part)
    images = data.train.fetch(torch.from_numpy(order.ids))[0][position]
    shown = torch.cat(seen)
    same, mirrored = (shown == images).flatten(1).all(1), (shown == images.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 0.4 < mirrored.double().mean() < 0.6


def test_training_images_get_the_noise_that_is_asked_for(tiny: Tiny) -> None:
    """After mirroring, so that an image differs by noise alone from itself or from its mirror image."""
    config = tiny({"data.noise": 0.25, "data.flip": True, "local-epochs": 20})
    data = load_splits(config.data)
    order = make_order(config)
    round_ = Round(make_trainer(config), order, data.train, data.kind)
    torch.manual_seed(0)
    positions = torch.arange(len(order.ids)).repeat(40)
    shown = round_._draw(positions, None).x0
    images = data.train.fetch(torch.from_numpy(order.ids))[0].repeat(40, 1, 1, 1)
    residue = torch.stack([shown - images, shown - images.flip(-1)])
    nearest = residue.square().flatten(2).mean(2).argmin(0)
    noise = residue[nearest, torch.arange(len(images))]
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02) and abs(float(noise.mean())) < 0.01
    assert 0.3 < float(nearest.double().mean()) < 0.7
    pixels = noise.flatten(1)
    assert float(pixels.std(0).min()) > 0.2  # every pixel, anew each time
    assert float(torch.corrcoef(pixels.T[:8]).fill_diagonal_(0).abs().max()) < 0.15
    quiet = Round(make_trainer(tiny()), order, data.train, data.kind)._draw(positions, None).x0
    assert torch.equal(quiet, images)


def test_noise_on_inputs_changes_what_is_learned(tiny: Tiny) -> None:
    plain, noisy = (train(tiny({"data.noise": noise})) for noise in (0.0, 0.3))
    assert noisy.report.loss != plain.report.loss and np.isfinite(noisy.report.loss)
    assert noisy.report.images == plain.report.images


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of folded pixels, trained for some rounds on half of the digits."""
    flat = TINY | {
        "data.image-size": 16,
        "data.limit": 150,
        "num-server-rounds": 3,
        "local-epochs": 8,
        "batch-size": 32,
    }
    flat |= EPSILON | {"agc.mode": "off", "data.seed": 1, "optimizer.lr": 0.002}
    return run_server(RunConfig.from_flat(flat), tmp_path_factory.mktemp("pretrained") / "run").final


@pytest.mark.parametrize("name", ["fine-tune", "fine-tune-central"])
def test_fine_tuning_from_end_to_end(pretrained: Path, tmp_path: Path, name: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, digit in enumerate(load_digits().images[:40]):
        Image.fromarray(np.uint8(digit * 15.9)).save(photos / f"{i}.png")
    flat = read_preset(ROOT / f"simulations/presets/{name}.toml")
    small: dict[str, Scalar] = {
        "data.path": str(photos), "data.limit": 0, "data.image-size": 16, "data.held-out": 0.2,
        "model.init-from": str(pretrained), "num-server-rounds": 2, "local-epochs": 2, "batch-size": 8,
        "optimizer.warmup-steps": 3, "shards": 1 if name.endswith("central") else 2,
    }  # fmt: skip
    method = {key: value for key, value in flat.items() if key.startswith(("agc.", "taa.", "redistribution."))}
    flat |= TINY | small | method | {"aggregate-every": flat["aggregate-every"]}
    run = run_server(RunConfig.from_flat(flat), tmp_path / "tuned")
    _, longer = change_run(run.path, {"num-server-rounds": 4, "samples": 8, "sample-steps": 2})
    run_server(longer, run.path, resume=True)
    whole = run_server(RunConfig.from_flat(flat | {"num-server-rounds": 4}), tmp_path / "whole")
    assert [row["round"] for row in run.rows()] == [1, 2, 3, 4]
    ours, theirs = (load_latest(r.checkpoints).weights for r in (run, whole))
    assert [key for key in theirs if not np.array_equal(ours[key], theirs[key])] == []
    scratch = run_server(
        RunConfig.from_flat(flat | {"model.init-from": "", "model.preset": "tiny", "agc.warm-passes": 0}),
        tmp_path / "from-scratch",
    )
    assert run.rows()[0]["loss"] < 0.8 * scratch.rows()[0]["loss"]  # it starts from what was learned
    before = DDPMPipeline.from_pretrained(pretrained, local_files_only=True)
    pipeline = DDPMPipeline.from_pretrained(run.final, local_files_only=True)
    assert pipeline.unet.config.in_channels == before.unet.config.in_channels == 4  # folded as the pretrained one is
    changed = [not torch.equal(a, b) for a, b in zip(pipeline.unet.parameters(), before.unet.parameters(), strict=True)]
    assert any(changed)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 4) and np.isfinite(images).all()
    assert np.load(run.samples).shape == (8, 1, 16, 16)


def test_a_resumed_fine_tuning_does_not_warm_its_bank_again(pretrained: Path, tmp_path: Path) -> None:
    flat = TINY | WARM | EPSILON | {"model.init-from": str(pretrained), "data.image-size": 16}
    whole = run_server(RunConfig.from_flat(flat), tmp_path / "whole")
    run_server(RunConfig.from_flat(flat | {"num-server-rounds": 1}), tmp_path / "part")
    part = RunDir(tmp_path / "part")
    part.write_config(part.read_config().model_copy(update={"num_server_rounds": 2}))
    run_server(part.read_config(), part.path, resume=True)
    visits = [load_latest(run.checkpoints).shards for run in (whole, part)]
    assert [s.bank_visits.sum() for s in visits[0]] == [s.bank_visits.sum() for s in visits[1]] == [12 * 3 + 24] * 2
