"""Each recipe runs from files of its data's own form to a pipeline that diffusers opens, and says truly what it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from cifars import archive, pixels, write_cifar10, write_cifar100
from conftest import ROOT, ret_fl, run_server
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

from benchmarks.recipes import KNOWN, Cost, cost_of, flops_of_samples, images_seen, size_text
from ret_fl.audit.schema import Audit
from ret_fl.checkpoint import load_latest
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.diffusion.models import PRESETS as SIZES
from ret_fl.presets import FOLDER, Preset, all_presets
from ret_fl.rundir import RunDir
from ret_fl.settings import change_run, read_preset

PRESETS = {preset.name: preset for preset in all_presets(ROOT)}
RECIPES = [name for name in PRESETS if name.removesuffix("-central") in KNOWN]

SMALL: dict[str, Scalar] = {
    "num-server-rounds": 2,
    "local-epochs": 1,
    "batch-size": 8,
    "optimizer.warmup-steps": 2,
    "samples": 0,
    "sample-steps": 2,
    "evaluate-every": 0,
    "keep-checkpoints": 9,
    "model.preset": "tiny",
    "data.image-size": 16,
    "device": "cpu",
    "threads": 1,
    "wait-seconds": 0.1,
}
"""A recipe in seconds: its data and model are small, and its method is as it is."""


def config_of(name: str, **changes: Scalar) -> RunConfig:
    return RunConfig.from_flat(read_preset(ROOT / FOLDER / f"{name}.toml") | changes)


# --- what the files say -----------------------------------------------------------------------------------------------


def test_every_preset_is_valid_and_tells_its_command_data_and_size() -> None:
    listed = ret_fl("presets", "--app", ROOT).output
    told = " ".join(ret_fl("presets", *PRESETS, "--app", ROOT).output.split())
    for name, preset in PRESETS.items():
        config_of(name)
        assert f"--preset {FOLDER}/{name}.toml" in preset.command
        assert f"{preset.name} " in listed and preset.command not in listed
        for text in (preset.command, preset.title, preset.data, preset.size):
            assert " ".join(text.split()) in told


def test_a_preset_that_is_not_there_is_refused_with_those_that_are() -> None:
    result = ret_fl("presets", "cifar11", "--app", ROOT)
    assert result.exit_code == 1
    assert "no preset is called cifar11" in result.output and "cifar10," in result.output


def test_a_header_of_another_form_is_refused(tmp_path: Path) -> None:
    no_size, no_command = "# ret-fl run\n#\n# Title.\n# Data: none\n", "# A title.\n#\n# Data: x\n# Size: y\n"
    for text in ("", 'name = "x"\n', no_size, no_command):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"x\.toml: its first comment must be the command"):
            Preset.read(tmp_path / "x.toml")


@pytest.mark.parametrize("name", RECIPES)
def test_the_size_in_a_header_is_the_one_computed(name: str) -> None:
    config, facts = config_of(name), KNOWN[name.removesuffix("-central")]
    assert PRESETS[name].size == size_text(config, facts, cost_of(config, facts))


def test_the_cost_is_that_of_a_real_step() -> None:
    """On the meta device it must come out as with real tensors, of whose activations each is counted once."""
    config = config_of("cifar10", **{"model.preset": "small", "model.dropout": 0.0})
    cost = cost_of(config, KNOWN["cifar10"])
    twice = config_of("cifar10", **{"model.preset": "small", "num-server-rounds": 40})
    assert images_seen(twice, KNOWN["cifar10"]) == 2 * images_seen(config, KNOWN["cifar10"]) == 100_000_000
    unet = UNet2DModel(sample_size=32, in_channels=3, out_channels=3, **SIZES["small"])
    assert cost.parameters == unet.num_parameters()
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)).sample.square().mean().backward()
    assert cost.saved == pytest.approx(sum(kept.values()), rel=0.1)  # attention keeps other things on a CPU


def test_what_stable_diffusion_costs_beside_training_is_counted() -> None:
    config, facts = config_of("laion-10k-sd21"), KNOWN["laion-10k-sd21"]
    cost = cost_of(config, facts)
    assert cost.parameters == 865_910_724
    assert 2.5 < cost.flops / cost.forward < 3 and cost.decoding > cost.encoding > cost.forward
    assert images_seen(config, facts) == images_seen(config_of("laion-10k-sd21-central"), facts) == 1_600_000
    whole = flops_of_samples(config, cost)
    assert whole == 4000 * (50 * 2 * cost.forward + cost.decoding)
    unguided = config_of("laion-10k-sd21", **{"text.guidance": 1.0})
    assert flops_of_samples(unguided, cost) == whole - 4000 * 50 * cost.forward
    pixels = Cost(parameters=1, flops=30, saved=1, forward=10)
    cifar = config_of("cifar10", **{"samples": 7, "sample-steps": 3})
    assert flops_of_samples(cifar, pixels) == 7 * 3 * 10
    mirrored = size_text(config, facts, cost)
    plain = size_text(config_of("laion-10k-sd21", **{"data.flip": False, "taa.mode": "off"}), facts, cost)
    assert "for 20,000 latents" in mirrored and "for 10,000 latents" in plain
    assert "more if TAA augments" in mirrored and "more if TAA augments" not in plain
    assert "EMA" not in mirrored and "EMA" in size_text(config_of("laion-10k-sd21", **{"ema.decay": 0.9}), facts, cost)


PAIRS = [name for name in RECIPES if f"{name}-central" in PRESETS and not name.startswith("laion")]
"""LAION's baseline has the values of its authors, and a test of its own."""


@pytest.mark.parametrize("name", PAIRS)
def test_the_baseline_sees_as_many_images_and_is_else_the_same(name: str) -> None:
    ours, central = config_of(name), config_of(f"{name}-central")
    assert images_seen(ours, KNOWN[name]) == images_seen(central, KNOWN[name])
    pairs = zip(ours.to_flat().items(), central.to_flat().values(), strict=True)
    differ = {key for (key, value), other in pairs if value != other}
    expected = {"name", "shards", "aggregate-every", "agc.mode", "taa.mode", "redistribution.policy",
                "optimizer.warmup-steps"}  # fmt: skip
    assert differ == expected | ({"agc.warm-passes"} if name == "fine-tune" else set())
    assert (central.shards, central.agc.mode, central.redistribution.policy) == (1, "off", "none")


@pytest.mark.parametrize("name", PAIRS)
def test_warm_up_is_the_same_share_of_either_s_steps(name: str) -> None:
    """To a step: a shard has a tenth of the images."""
    ours, central = config_of(name), config_of(f"{name}-central")
    assert ours.shards == 10 and "fine-tune" in PAIRS
    assert central.optimizer.warmup_steps == pytest.approx(10 * ours.optimizer.warmup_steps, rel=0.015)
    if name == "fine-tune":  # 5 % of what 4,739 images give
        steps = images_seen(central, KNOWN[name]) / central.batch_size
        assert central.optimizer.warmup_steps == pytest.approx(0.05 * steps, abs=1)


def test_a_preset_may_extend_another_but_not_itself(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\nshards = 4\n[agc]\nmode = "agc"\nmem-ratio = 3.0\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.toml").write_text('extends = "../base.toml"\nname = "own"\n[agc]\nmode = "off"\n')
    assert read_preset(tmp_path / "sub" / "own.toml") == {
        "name": "own", "shards": 4, "agc.mode": "off", "agc.mem-ratio": 3.0
    }  # fmt: skip
    (tmp_path / "base.toml").write_text('extends = "sub/own.toml"\n')
    with pytest.raises(ConfigError, match="extends itself"):
        read_preset(tmp_path / "base.toml")
    (tmp_path / "base.toml").write_text('extends = "gone.toml"\n')
    with pytest.raises(ConfigError, match=r"--preset: .*gone\.toml"):
        read_preset(tmp_path / "base.toml")


# --- what they do -----------------------------------------------------------------------------------------------------


def cifar10(root: Path) -> dict[str, Scalar]:
    return {"data.path": str(archive(write_cifar10(root, each=5, test=8)))}


def cifar100(root: Path) -> dict[str, Scalar]:
    return {"data.path": str(write_cifar100(root, train=25, test=8))}


def afhq(root: Path) -> dict[str, Scalar]:
    """train/dog and val/dog of PNGs larger than the model's images."""
    for split, count, seed in (("train", 25, 0), ("val", 8, 1)):
        folder = root / "afhq" / split / "dog"
        folder.mkdir(parents=True)
        for i, image in enumerate(pixels(count, seed).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)):
            Image.fromarray(image).resize((80, 72)).save(folder / f"flickr_dog_{i:06}.png")
    return {f"data.{k}": str(root / f"afhq/{s}/dog") for k, s in (("path", "train"), ("held-out-path", "val"))}


DATA = {"cifar10": cifar10, "cifar100": cifar100, "afhq-dog": afhq}


def code_of(summary: str) -> str:
    """The lines that draw images without ret-fl, with fewer steps."""
    (code,) = re.findall(r"```python\n(.*?)```", summary, re.DOTALL)
    shorter, found = re.subn(r"(num_inference_steps=|set_timesteps\()100", r"\g<1>2", code)
    assert found == 1
    return shorter


@pytest.mark.parametrize("name", [name for name in RECIPES if name.removesuffix("-central") in DATA])
def test_a_recipe_runs_two_phases_is_resumed_and_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = SMALL | {"shards": 1 if name.endswith("-central") else 2, "data.cache-dir": str(tmp_path / "cache")}
    config = config_of(name, **here, **DATA[name.removesuffix("-central")](tmp_path))
    part = run_server(config, tmp_path / "part")
    _, longer = change_run(part.path, {"num-server-rounds": 4, "samples": 8})
    run_server(longer, part.path, resume=True)
    whole = run_server(config.model_copy(update={"num_server_rounds": 4}), tmp_path / "whole")

    rows, every = part.rows(), config.aggregate_every
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert [row["aggregated"] for row in rows] == [r % every == 0 for r in (1, 2, 3, 4)]
    assert all(row["images"] == 25 and row["failures"] == 0 for row in rows)
    ours, theirs = (load_latest(run.checkpoints).weights for run in (part, whole))
    assert [key for key in ours if not np.array_equal(ours[key], theirs[key])] == []

    data = load_splits(config.data)
    assert (len(data.train), len(data.held_out)) == (25, 8)
    audit = Audit.model_validate_json((part.audit / "audit.json").read_text())
    assert (audit.model.samples, audit.data.held_out) == (8, 8)
    assert {m.tau for m in audit.replication.memorized} >= {0.15, 0.5}
    monkeypatch.chdir(part.path)
    namespace: dict[str, Any] = {}
    exec(code_of(part.summary.read_text()), namespace)
    images = namespace["images"]
    assert images.shape == (16, 3, 16, 16) and bool(torch.isfinite(images).all())
    assert 0 <= float(images.min()) <= float(images.max()) <= 1 and float(images.std()) > 0
    unet = DDPMPipeline.from_pretrained(part.final, local_files_only=True).unet
    assert unet.config.num_class_embeds == (100 if config.model.class_conditional else None)
    assert unet.config.dropout == 0.1


def test_one_class_is_drawn_where_asked(tmp_path: Path) -> None:
    config = config_of("cifar100-central", **SMALL | cifar100(tmp_path))
    run: RunDir = run_server(config, tmp_path / "run")
    drawn = {}
    for label in (None, 0, 3):
        more = [] if label is None else ["--label", label]
        out = tmp_path / f"{label}.npy"
        assert ret_fl("sample", run.path, "--count", 5, "--steps", 2, "--out", out, *more).exit_code == 0
        drawn[label] = np.load(out)
    assert np.array_equal(drawn[None][0], drawn[0][0]) and np.array_equal(drawn[None][3], drawn[3][3])
    assert not np.array_equal(drawn[0][3], drawn[3][3])
    refused = ret_fl("sample", run.path, "--label", 100, "--out", tmp_path / "x.npy")
    assert refused.exit_code == 1 and "labels 0 to 99" in refused.output


@pytest.mark.parametrize(("name", "column"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_cifar_as_parquet_is_the_same_data(name: str, column: str, tmp_path: Path) -> None:
    """By the settings that the preset's header names."""
    pickled = load_splits(config_of(name, **DATA[name](tmp_path), **{"data.cache-dir": str(tmp_path / "a")}).data)
    counts = {"cifar10": ([5] * 5, 8), "cifar100": ([25], 8)}[name]
    first = 0 if name == "cifar10" else 100
    classes = KNOWN[name].classes
    kinds = {"img": datasets.Image(), column: datasets.ClassLabel(num_classes=classes)}
    features = datasets.Features(kinds | {"coarse_label": datasets.Value("int64")})
    seeds = list(range(first, first + len(counts[0]) + 1))
    rows = [(pixels(n, seed), list(range(n))) for n, seed in zip([*counts[0], counts[1]], seeds, strict=True)]
    for split, parts in (("train", rows[:-1]), ("test", rows[-1:])):
        images = [Image.fromarray(x.reshape(3, 32, 32).transpose(1, 2, 0)) for part, _ in parts for x in part]
        labels = [label % classes for _, own in parts for label in own]
        table = {"img": images, column: labels, "coarse_label": [0] * len(labels)}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    told = dict(re.findall(r"(data\.[a-z-]+)=(\S+)", PRESETS[name].data))
    told = {key: value.strip("'").replace("data/", f"{tmp_path}/") for key, value in told.items()}
    assert told["data.source"] == "hf" and told["data.path"].endswith("train-*.parquet")
    splits = load_splits(config_of(name, **told, **{"data.cache-dir": str(tmp_path / "b")}).data)
    assert splits.train.fingerprint == pickled.train.fingerprint
    assert splits.held_out.fingerprint == pickled.held_out.fingerprint
