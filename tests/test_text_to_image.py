"""A Stable Diffusion folder is fine-tuned as plain diffusers would, by the same federation, and comes out usable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioned import captioned_folder, text_config, text_settings, training_set
from conftest import PLAIN, fresh_weights, make_federation, make_trainer, opened_model, ret_fl, run_server
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from orders import differ, make_order
from outcomes import Outcome, assert_same_outcome, killed_at
from safetensors.torch import load_file
from tiny_pipelines import text_pipeline
from torch import nn

from ret_fl.audit.folder import load_audit
from ret_fl.audit.shelf import open_shelf
from ret_fl.auditing import own_drawing, training_prompts
from ret_fl.checkpoint import load_latest
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.diffusion.encoders import fingerprint
from ret_fl.diffusion.proxymodel import load_trained, trained_parameters
from ret_fl.proxy import round_seed, train_proxy, visit_plan
from ret_fl.recorder import ema_state
from ret_fl.settings import change_run
from ret_fl.speed import images_per_second
from ret_fl.strategy import FederationError

transformers = pytest.importorskip("transformers")
LORA: dict[str, Scalar] = {"lora.rank": 2}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "epsilon": lambda: PNDMScheduler(num_train_timesteps=100, skip_prk_steps=True, steps_offset=1),
    "v_prediction": lambda: DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction", clip_sample=False),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images and a cache that tests share."""
    folder = tmp_path_factory.mktemp("sd")
    text_settings(folder)
    return folder


# --- the same as plain diffusers --------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_round_equals_a_plain_diffusers_training_loop(tmp_path: Path, prediction: str) -> None:
    settings = text_settings(tmp_path, SCHEDULERS[prediction]())
    config = RunConfig.from_flat(settings | PLAIN | {"local-steps": 3, "ema.decay": 0.0})
    columns = {"probability": np.ones(6, np.float32), "strength": np.zeros(6, np.float32)}
    order = make_order(
        config,
        ids=np.arange(6),
        log_ratio=np.full(6, np.nan, np.float32),
        usual=np.full(6, np.nan, np.float32),
        **columns,
    )
    store = training_set(config)
    trained = train_proxy(make_trainer(config), order, fresh_weights(config), store, "photo", None).weights
    folder = tmp_path / "model"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(memory_format=torch.channels_last).train()
    noising = DDPMScheduler.from_pretrained(folder / "scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=config.optimizer.weight_decay, fused=True)
    seed = round_seed(config.seed, order.round, order.shard)
    plan = visit_plan(order.probability, 3 * config.batch_size, np.random.default_rng(seed))
    torch.manual_seed(seed)
    assert store.captions is not None
    for step, ids in enumerate(np.split(plan, 3), start=1):
        images, _ = store.fetch(torch.from_numpy(ids))
        captions = [store.captions[i][0] for i in ids]
        tokens = tokenizer(
            captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            z = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            told = text_encoder(tokens)[0]
        t = torch.randint(100, (len(ids),))
        noise = torch.randn_like(z)
        target = noise if prediction == "epsilon" else noising.get_velocity(z, noise, t)
        loss = (unet(noising.add_noise(z, noise, t), t, told).sample - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), config.optimizer.grad_clip)
        optimizer.param_groups[0]["lr"] = config.optimizer.lr * min(1.0, step / config.optimizer.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
    assert trained.keys() == {f"raw.{name}" for name in unet.state_dict()}
    start = fresh_weights(config)
    moved = max(float(np.abs(trained[name] - start[name]).max()) for name in start)
    assert moved > 1e-4
    for name, value in unet.state_dict().items():
        np.testing.assert_allclose(trained[f"raw.{name}"], value.numpy(), atol=1e-5, rtol=0, err_msg=name)


def test_only_adapters_train_and_travel_under_lora(place: Path) -> None:
    config = text_config(place, **LORA)
    names = list(trained_parameters(opened_model(config).unet))
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    whole, adapters = (make_federation(c) for c in (text_config(place), config))
    whole.run(1)
    assert set(adapters.run(1)) == {f"{part}.{name}" for part in ("raw", "ema") for name in names}
    assert adapters.rounds[0].bytes_up < whole.rounds[0].bytes_up / 4


# --- what saves memory ------------------------------------------------------------------------------------------

SAVERS: dict[str, tuple[dict[str, Scalar], float]] = {
    "checkpointing": ({"model.gradient-checkpointing": True}, 1e-5),
    "fp16": ({"precision": "fp16"}, 0.05),
    "micro-batches": ({"micro-batch": 3}, 1e-4),
}
"""What saves memory, and how far it may move the gradients, as a share of them."""


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("saver", SAVERS)
def test_what_saves_memory_changes_no_result(place: Path, saver: str, lora: int) -> None:
    """Whole and by LoRA, gated and clipped by nothing: Adam's first moments are gradients."""
    changes, most = SAVERS[saver]
    same: dict[str, Scalar] = {"lora.rank": lora, "local-steps": 4, "agc.mem-ratio": 1.05, "precision": "fp32"}
    same |= {"optimizer.grad-clip": 0.0, "optimizer.warmup-steps": 0, "optimizer.lr": 1e-3}
    trained = []
    for config in (text_config(place, **same), text_config(place, **same | changes)):
        known = np.full(6, np.nan, np.float32)
        columns = {"probability": np.ones(6, np.float32), "strength": np.zeros(6, np.float32)}
        order = make_order(config, bank=1.1, ids=np.arange(6), log_ratio=known, usual=known, **columns)
        trainer = make_trainer(config)
        assert trainer.unet.is_gradient_checkpointing == (saver == "checkpointing" and len(trained) == 1)
        trained.append(train_proxy(trainer, order, fresh_weights(config), training_set(config), "photo", None))
    whole, saved = trained
    ours, theirs = (torch.cat([m.flatten() for m in t.state.moments.first.values()]) for t in trained)
    assert ours.norm() > 0
    assert (ours - theirs).norm() <= most * ours.norm()
    assert (saver == "fp16") <= bool((ours != theirs).any())
    assert 0 < whole.report.skips.sum() < whole.report.visits.sum() == 16
    assert saved.report.loss == pytest.approx(whole.report.loss, rel=most)
    assert saved.state.moments.updates == whole.state.moments.updates == 4
    assert differ(saved.weights, fresh_weights(config))


# --- whole runs -------------------------------------------------------------------------------------------------

MITIGATED: dict[str, Scalar] = {
    "aggregate-every": 2,
    "local-steps": 3,
    "agc.mem-ratio": 1.01,
    "agc.bias-correct": True,
    "agc.bins": 4,
    "redistribution.policy": "memorized+quarantine",
    "redistribution.fraction": 0.25,
    "quarantine.share": 0.2,
    "quarantine.min-draws": 1,
    "evaluate-every": 1,
    "num-server-rounds": 4,
}


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_killed_between_averages_goes_on_and_its_result_draws_in_plain_diffusers(
    place: Path, tmp_path: Path, lora: int
) -> None:
    config = text_config(place, **MITIGATED, **{"lora.rank": lora, "text.noise": 0.1, "text.captions": "random"})
    whole = run_server(config, tmp_path / "whole")
    killed_at(config, tmp_path / "killed", round=4, shard=1)
    resumed = run_server(config, tmp_path / "killed", resume=True)
    if lora:
        assert (whole.final / "pytorch_lora_weights.safetensors").read_bytes() == (
            resumed.final / "pytorch_lora_weights.safetensors"
        ).read_bytes()
    else:
        assert_same_outcome(Outcome.of(resumed), Outcome.of(whole))
    rows = whole.rows()
    assert any(0 < row["skip_rate"] < 1 for row in rows)
    assert rows[-1]["train_loss"] > 0 and rows[-1]["held_out_loss"] > 0
    assert rows[1]["bytes_up"] > rows[0]["bytes_up"]
    base = place / "model"
    pipeline = StableDiffusionPipeline.from_pretrained(base if lora else resumed.final)
    before = StableDiffusionPipeline.from_pretrained(base)
    if lora:
        pipeline.load_lora_weights(resumed.final)
    image, other = (
        p("a red one", num_inference_steps=2, height=16, width=16, generator=torch.Generator().manual_seed(0),
          output_type="np").images[0] for p in (pipeline, before)
    )  # fmt: skip
    assert image.shape == (16, 16, 3) and np.isfinite(image).all()
    assert np.abs(image - other).max() > 1e-4


def test_the_frozen_parts_of_the_result_are_those_of_the_folder(place: Path, tmp_path: Path) -> None:
    run = run_server(text_config(place, **{"num-server-rounds": 1, "local-steps": 1}), tmp_path / "run")
    for part in ("vae", "text_encoder"):
        (weights,) = (place / "model" / part).glob("*.safetensors")
        assert (run.final / part / weights.name).read_bytes() == weights.read_bytes()
    ours, theirs = (load_file(next((f / "unet").glob("*.safetensors"))) for f in (run.final, place / "model"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((run.final / "unet" / "config.json").read_text())["sample_size"] == 8


def test_the_adapters_in_the_result_are_the_averaged_ones(place: Path, tmp_path: Path) -> None:
    config = text_config(place, **LORA, **{"num-server-rounds": 1, "local-steps": 4, "optimizer.lr": 0.05})
    run = run_server(config, tmp_path / "run")
    model = opened_model(config)
    load_trained(model.unet, ema_state(load_latest(run.checkpoints).weights))
    pipeline = StableDiffusionPipeline.from_pretrained(place / "model")
    x, t, told = torch.randn(2, 4, 8, 8), torch.tensor([3, 50]), torch.randn(2, 16, 16)
    with torch.no_grad():
        plain = pipeline.unet(x, t, told).sample
        pipeline.load_lora_weights(run.final)
        adapted, ours = pipeline.unet(x, t, told).sample, model.unet.eval()(x, t, told).sample
    assert (adapted - plain).abs().max() > 1e-4
    torch.testing.assert_close(adapted, ours, atol=1e-5, rtol=1e-4)
    summary = run.summary.read_text()
    assert "load_lora_weights" in summary and "pytorch_lora_weights.safetensors" in summary


def test_a_node_measures_its_speed_for_a_text_to_image_model(place: Path) -> None:
    config = text_config(place, **{"micro-batch": 2})
    before = fresh_weights(config)
    trainer = make_trainer(config)
    assert images_per_second(trainer, (3, 16, 16)) > 0
    assert differ(trainer.weights(), before)


# --- what a run leaves can be audited and drawn from ------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_ends_with_its_audit_and_more_images_can_be_drawn(place: Path, tmp_path: Path, lora: int) -> None:
    brief: dict[str, Scalar] = {"num-server-rounds": 1, "samples": 5, "sample-steps": 2, "text.guidance": 2.0}
    config = text_config(place, **brief, **{"lora.rank": lora})
    run = run_server(config, tmp_path / "run")
    audit, _ = load_audit(run.path)
    captions = {own[0] for own in training_set(config).captions or ()}
    assert (audit.model.kind, audit.model.samples, audit.model.guidance) == ("run", 5, 2.0)
    assert len(audit.model.prompts) == 5 and set(audit.model.prompts) <= captions
    assert np.load(run.samples).shape == (5, 3, 16, 16)
    again = ret_fl("audit", run.path, "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert load_audit(run.path)[0].replication == audit.replication
    out = tmp_path / "more.npy"

    def drawn(*more: object) -> np.ndarray:
        options = ["--prompt", "a dog", "--count", 3, "--steps", 2, "--out", out, "--device", "cpu"]
        done = ret_fl("sample", run.path, *options, *more)
        assert done.exit_code == 0, done.output
        return np.load(out)

    as_the_run_draws = drawn()
    assert as_the_run_draws.shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(as_the_run_draws, drawn("--guidance", 2.0))
    assert (as_the_run_draws != drawn("--guidance", 7.5)).any()
    untold = ret_fl("sample", run.path, "--count", 1, "--device", "cpu")
    assert untold.exit_code == 1 and "--prompt" in untold.output


def test_prompts_are_the_same_for_every_run_on_the_data_and_drawn_with_replacement(place: Path) -> None:
    prompts = training_prompts(text_config(place), 40)
    assert prompts == training_prompts(text_config(place, seed=3, **LORA), 40)
    assert prompts[:7] == training_prompts(text_config(place), 7)
    assert len(prompts) > len(set(prompts)) > 3
    assert training_prompts(RunConfig(), 5) == ()


def test_adapters_whose_pipeline_is_another_or_gone_are_told(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "base")
    config = text_config(
        place, **LORA, **{"num-server-rounds": 1, "local-steps": 1, "model.init-from": str(tmp_path / "base")}
    )
    run = run_server(config, tmp_path / "run")
    assert own_drawing(run.path).prompts
    before = open_shelf(tmp_path / "shelves", run.final, {})
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet")
    with torch.no_grad():
        unet.conv_in.bias += 0.1
    unet.save_pretrained(tmp_path / "base" / "unet")
    assert open_shelf(tmp_path / "shelves", run.final, {}) != before
    fingerprint.cache_clear()  # a new process
    answer = ret_fl("sample", run.path, "--prompt", "a", "--device", "cpu")
    assert answer.exit_code == 1 and "were trained on another pipeline" in answer.output.replace("\n", " ")
    shutil.rmtree(tmp_path / "base")
    answer = ret_fl("sample", run.path, "--prompt", "a", "--device", "cpu")
    assert answer.exit_code == 1 and "base, which is gone: correct 'base' in lora_base.json" in answer.output


# --- refused plainly --------------------------------------------------------------------------------------------


def test_a_node_with_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    """Its latents would not be those of the others."""
    shutil.copytree(place / "model", tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(tmp_path / "other" / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias += 0.1
    vae.save_pretrained(tmp_path / "other" / "vae")
    federation = make_federation(text_config(place, **{"model.init-from": str(tmp_path / "other")}))
    federation.strategy.frozen = opened_model(text_config(place)).frozen
    with pytest.raises(FederationError, match="are not those of the server: copy the same folder"):
        federation.run(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion.timesteps": 1000}, r"has 100 timesteps: set diffusion\.timesteps=100"),
        ({"data.channels": "grey"}, r"set data\.channels=rgb"),
        ({"data.image-size": 15}, r"set data\.image-size to a multiple of 2"),
        ({"lora.rank": 2, "lora.targets": "nothing"}, r"lora\.targets='nothing'"),
        ({"data.captions": ""}, r"draws from text, and the data has no captions"),
        ({"model.init-from": "nowhere"}, r"nowhere is no folder here"),
        ({"model.init-from": "", "lora.rank": 2}, r"lora\.rank adapts a pretrained text-to-image model"),
        ({"service.address": "localhost:1"}, r"a sample service serves no captions"),
        ({"aggregate-every": 0}, r"set aggregate-every=1 or more"),
    ],
)
def test_what_does_not_fit_is_said_with_the_setting(
    place: Path, tmp_path: Path, changes: dict[str, Scalar], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_server(text_config(place, **changes), tmp_path / "run")


def test_weights_that_are_pickles_are_not_read(tmp_path: Path) -> None:
    settings = text_settings(tmp_path)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"unet has no \*\.safetensors"):
        opened_model(RunConfig.from_flat(settings))


def test_a_tokenizer_without_words_is_not_made_up(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    for file in (tmp_path / "model" / "tokenizer").glob("*.json"):
        file.unlink()
    objective = opened_model(config).objective(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"tokenizer has no vocab\.json or tokenizer\.json"):
        objective.prepare(training_set(config), torch.arange(2))


def test_eight_bit_adam_needs_a_gpu(place: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"optimizer\.kind=adamw-8bit needs a CUDA GPU, this is cpu"):
        make_trainer(text_config(place, **{"optimizer.kind": "adamw-8bit"}))


def test_a_model_without_a_scheduler_it_can_follow_is_refused(tmp_path: Path) -> None:
    text_pipeline(tmp_path / "model", DDPMScheduler(num_train_timesteps=100, prediction_type="sample"))
    captioned_folder(tmp_path / "images")
    with pytest.raises(ConfigError, match="predicts sample; only epsilon and v_prediction train"):
        opened_model(text_config(tmp_path))


# --- augmentation and the switch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["next-visit", "two-pass-band"])
def test_augmented_images_are_trained_on_and_the_run_resumes(place: Path, tmp_path: Path, mode: str) -> None:
    """Threshold-aware augmentation is of images, so their latents are computed anew in the middle of a round."""
    settings = {"agc.mem-ratio": 1.3, "agc.bins": 2, "agc.bias-correct": True, "local-steps": 6, "taa.mode": mode}
    config = text_config(place, **settings)
    whole = run_server(config, tmp_path / "whole")
    killed_at(config, tmp_path / "killed", round=2, shard=1)
    assert_same_outcome(Outcome.of(run_server(config, tmp_path / "killed", resume=True)), Outcome.of(whole))
    plain = run_server(text_config(place, **settings | {"taa.mode": "off"}), tmp_path / "plain")
    assert Outcome.of(whole).final != Outcome.of(plain).final
    # what is still to be augmented at the end of a round is a batch at most
    assert max(abs(a["images"] - b["images"]) for a, b in zip(whole.rows(), plain.rows(), strict=True)) <= 12


def test_without_a_cache_a_run_resumes_and_writes_none(tmp_path: Path) -> None:
    config = text_config(tmp_path, **{"text.cache": False, "local-steps": 2})
    whole = run_server(config, tmp_path / "whole")
    killed_at(config, tmp_path / "killed", round=2, shard=1)
    assert_same_outcome(Outcome.of(run_server(config, tmp_path / "killed", resume=True)), Outcome.of(whole))
    assert not (tmp_path / "cache" / "encodings").exists()


def test_a_folder_elsewhere_may_be_named_on_resuming_but_not_another_model(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "here")
    config = text_config(place, **{"model.init-from": str(tmp_path / "here"), "local-steps": 1})
    killed_at(config, tmp_path / "run", round=2, shard=0)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    change_run(tmp_path / "run", {"model.init-from": str(moved)})
    vae = moved / "vae" / "config.json"
    before = vae.read_text()
    vae.write_text(before.replace('"scaling_factor": 0.18215', '"scaling_factor": 0.13025'))
    fingerprint.cache_clear()
    with pytest.raises(ConfigError, match="holds other weights than those the run was begun with"):
        run_server(config, tmp_path / "run", resume=True)
    vae.write_text(before)
    fingerprint.cache_clear()
    run_server(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "final" / "vae").is_dir()
