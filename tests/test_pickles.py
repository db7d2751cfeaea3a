"""Networks are opened from safetensors only: whatever a folder holds, torch unpickles nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_models import write_settings
from safetensors.torch import load_file
from tiny_pipelines import drawn, small_pipeline, small_unet, text_pipeline

from ret_fl.audit.features import load_features
from ret_fl.config import ConfigError, ModelConfig
from ret_fl.diffusion.encoders import Encoders, weight_files
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.sampling import load_pipeline


def pickled(network: Path, *, index: bool) -> None:
    """Put the weights of a folder into a pickle, as diffusers and transformers wrote them before safetensors.

    index: some safetensors stay, but their index says that all weights are in the pickle.
    """
    weights = next(network.glob("*.safetensors"))
    pickle = "pytorch_model.bin" if weights.name == "model.safetensors" else weights.with_suffix(".bin").name
    state = load_file(weights)
    torch.save(state, network / pickle)
    if index:
        told = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, pickle)}
        weights.with_suffix(".safetensors.index.json").write_text(json.dumps(told))
        weights.rename(weights.with_name("part.safetensors"))
    else:
        weights.unlink()


Opened = tuple[Path, Callable[[], object]]
"""The network's folder, and what opens it."""


def pretrained(folder: Path) -> Opened:
    small_unet().save_pretrained(folder)
    config = ModelConfig(init_from=str(folder), pixel_unshuffle=1)
    return folder, lambda: build_unet(config, (1, 8, 8), 0, 0)


def pretrained_pipeline(folder: Path) -> Opened:
    small_pipeline(folder)
    config = ModelConfig(init_from=str(folder), pixel_unshuffle=1)
    return folder / "unet", lambda: build_unet(config, (1, 8, 8), 0, 0)


def pixels(folder: Path) -> Opened:
    small_pipeline(folder)
    return folder / "unet", lambda: load_pipeline(folder)


def text_part(name: str) -> Callable[[Path], Opened]:
    def opened(folder: Path) -> Opened:
        text_pipeline(folder)
        return folder / name, lambda: drawn(folder, 1, prompts=["a cat"], steps=1)

    return opened


def frozen_part(name: str) -> Callable[[Path], Opened]:
    """As training opens it."""

    def opened(folder: Path) -> Opened:
        text_pipeline(folder)
        return folder / name, lambda: getattr(Encoders(folder, torch.device("cpu")), name)

    return opened


def features(folder: Path) -> Opened:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.ViTModel(transformers.ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(folder)
    write_settings(folder)
    return folder, lambda: load_features(str(folder))


FOLDERS: dict[str, Callable[[Path], Opened]] = {
    "model.init-from": pretrained,
    "a pipeline in model.init-from": pretrained_pipeline,
    "a pipeline to draw from": pixels,
    "a text-to-image U-Net": text_part("unet"),
    "a VAE": text_part("vae"),
    "a text encoder": text_part("text_encoder"),
    "a VAE to train by": frozen_part("vae"),
    "a text encoder to train by": frozen_part("text_encoder"),
    "features": features,
}


@pytest.mark.parametrize("index", [False, True], ids=["alone", "by an index"])
@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS.keys())
def test_pickled_weights_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Opened], index: bool
) -> None:
    def unpickled(file: object, *_: object, **__: object) -> None:
        pytest.fail(f"{file} was unpickled")

    network, open_it = make(tmp_path / "model")
    open_it()
    pickled(network, index=index)
    monkeypatch.setattr(torch, "load", unpickled)
    with pytest.raises(ValueError, match=r"no \*\.safetensors: pickled weights are not read.* save_pretrained") as said:
        open_it()
    assert str(network) in str(said.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    small_unet().save_pretrained(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ConfigError, match=r"safetensors\.index\.json (cannot be read|names 3, no)"):
        weight_files(tmp_path)


def test_weights_in_several_safetensors_are_read(tmp_path: Path) -> None:
    network = small_unet()
    network.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(weight_files(tmp_path)) > 1
    again = build_unet(ModelConfig(init_from=str(tmp_path), pixel_unshuffle=1), (1, 8, 8), 0, 0)
    for (name, one), other in zip(network.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
