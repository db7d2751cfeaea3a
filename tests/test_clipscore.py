"""The CLIP score is the mean cosine of images and their own prompts, as transformers computes both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import text_config, training_set
from conftest import ret_fl, run_server
from image_models import write_settings
from tiny_pipelines import text_pipeline

from ret_fl.audit.clipscore import clip_score
from ret_fl.audit.features import LoadedModel, load_features
from ret_fl.audit.folder import load_audit

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP that reads single letters."""
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(text_pipeline(folder.parent / "letters") / "tokenizer", folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    text = {
        "vocab_size": 54, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    write_settings(folder)
    return folder


def test_it_is_the_mean_cosine_that_transformers_gives(clip: Path) -> None:
    model = load_features(str(clip))
    assert isinstance(model, LoadedModel)
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    prompts, captions = ["a cat", "b", "zz zz zz zz zz zz zz zz zz zz zz zz"], ["k", "l"]
    network = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    expected = []
    for i in range(5):
        tokens = tokenizer([prompts[i % 3]], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = network(pixel_values=model.prepare(images[i : i + 1]), **tokens)  # type: ignore[attr-defined]
        expected.append(float((output.text_embeds * output.image_embeds).sum()))
    score = clip_score(model, images, prompts, images[:2], captions)
    assert score is not None and score.real is not None
    assert score.mean == pytest.approx(np.mean(expected), abs=1e-5)
    other = clip_score(model, images[:2], captions, images[:2], None)
    assert other is not None and other.real is None
    assert other.mean == pytest.approx(score.real, abs=1e-6)


def test_without_a_tokenizer_or_prompts_there_is_none(clip: Path, tmp_path: Path) -> None:
    model = load_features(str(clip))
    images = torch.rand(4, 3, 40, 40)
    assert isinstance(model, LoadedModel) and clip_score(model, images, (), images, None) is None
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(clip / name, tmp_path / name)
    silent = load_features(str(tmp_path))
    assert isinstance(silent, LoadedModel)
    with pytest.warns(UserWarning, match="no CLIP score: .* has no tokenizer"):
        assert clip_score(silent, images, ("a",), images, None) is None


def test_an_audit_with_clip_shows_the_score(clip: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, **{"num-server-rounds": 1, "local-steps": 1, "samples": 5, "sample-steps": 1})
    run = run_server(config, tmp_path / "run")
    out = tmp_path / "audit"
    result = ret_fl("audit", run.path, "--features", clip, "--out", out, "--device", "cpu", "--no-leakage")
    assert result.exit_code == 0, result.output
    audit, pictures = load_audit(out)
    (score,) = audit.clip
    captions = [own[0] for own in training_set(config).captions or ()]
    model = load_features(str(clip))
    assert isinstance(model, LoadedModel) and pictures.samples is not None
    expected = clip_score(model, torch.from_numpy(np.load(run.samples)), audit.model.prompts,
                          training_set(config).pixels(), captions)  # fmt: skip
    assert expected is not None
    assert (score.mean, score.real) == (pytest.approx(expected.mean, abs=0.01), pytest.approx(expected.real, abs=1e-6))
    assert [s.features for s in audit.similarity] == [f.features for f in audit.fidelity[1:]] == [score.features]
    assert "CLIP score" in (out / "report.html").read_text()
    assert json.loads((out / "audit.json").read_text())["clip"][0]["mean"] == score.mean
