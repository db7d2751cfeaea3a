"""The presets of Stable Diffusion on LAION, on a small stand-in of their data."""

from __future__ import annotations

from pathlib import Path

import pytest
from captioned import text_settings
from conftest import ROOT, run_server
from diffusers import StableDiffusionPipeline
from outcomes import Outcome, assert_same_outcome, killed_at

from ret_fl.audit.folder import load_audit
from ret_fl.config import RunConfig
from ret_fl.redistribution import is_due
from ret_fl.settings import read_preset

pytest.importorskip("transformers")

PRESETS = {name: read_preset(ROOT / "simulations" / "presets" / f"{name}.toml") for name in
           ("laion-10k-sd21", "laion-10k-sd21-central")}  # fmt: skip


def test_the_presets_see_equally_many_images_and_one_data_set() -> None:
    ours, central = (RunConfig.from_flat(preset) for preset in PRESETS.values())
    seen = [c.shards * c.num_server_rounds * c.visits(10_000 // c.shards) for c in (ours, central)]
    assert seen == [1_600_000, 1_600_000]
    assert ours.data.flip  # as in the paper
    assert ours.data == central.data and ours.model == central.model and ours.samples == central.samples
    assert ours.num_server_rounds // ours.aggregate_every == 25
    assert [is_due(ours, round) for round in (1, 2, 3, 4)] == [True, False, True, False]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_a_small_stand_in_of_its_data(tmp_path: Path, name: str) -> None:
    """The same layout on disk, the same classes of networks, two phases, killed in the second and resumed."""
    settings = text_settings(tmp_path)
    small = {key: settings[key] for key in ("data.path", "data.cache-dir", "model.init-from", "diffusion.timesteps")}
    small |= {"data.image-size": 16, "batch-size": 3, "local-steps": 2, "num-server-rounds": 2, "samples": 5,
              "sample-steps": 1, "shards": min(2, int(PRESETS[name]["shards"])), "device": "cpu", "threads": 1,
              "wait-seconds": 1}  # fmt: skip
    config = RunConfig.from_flat(PRESETS[name] | small)
    killed_at(config, tmp_path / "run", round=2, shard=0)
    run = run_server(config, tmp_path / "run", resume=True)
    assert_same_outcome(Outcome.of(run), Outcome.of(run_server(config, tmp_path / "whole")))
    assert [row["aggregated"] for row in run.rows()] == ([False, True] if "central" not in name else [True, True])
    kept = [path for path in (tmp_path / "cache" / "encodings").rglob("*") if path.is_file()]
    assert len({path.stem for path in kept}) == 3, kept  # latents, those of mirrored images, embeddings
    assert load_audit(run.path)[0].model.samples == 5
    pipeline = StableDiffusionPipeline.from_pretrained(run.final)
    assert pipeline("b green", num_inference_steps=1, output_type="np").images[0].shape == (16, 16, 3)
