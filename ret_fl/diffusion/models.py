"""Which U-Net a run trains: diffusers' UNet2DModel in a few sizes, from random weights or a pretrained folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ret_fl.config import ConfigError, DiffusionConfig, ModelConfig
from ret_fl.diffusion.encoders import weight_files
from ret_fl.diffusion.sampling import saved_fold
from ret_fl.diffusion.text_to_image import is_stable_diffusion


def _blocks(kind: str, attention_at: set[int], levels: int) -> tuple[str, ...]:
    names = [f"Attn{kind}Block2D" if i in attention_at else f"{kind}Block2D" for i in range(levels)]
    return tuple(names if kind == "Down" else reversed(names))


def _preset(
    channels: tuple[int, ...], layers: int, attention_at: set[int], groups: int, mid_attention: bool
) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": _blocks("Down", attention_at, len(channels)),
        "up_block_types": _blocks("Up", attention_at, len(channels)),
        "norm_num_groups": groups,
        "add_attention": mid_attention,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # 8x8 and folded 16x16 images on a CPU: 0.63 M parameters
    "tiny": _preset((32, 64), 1, set(), 8, False),
    # 16x16 and 32x32 images on a CPU or a small GPU
    "small": _preset((32, 64, 64), 1, {2}, 8, True),
    "base": _preset((64, 128, 128), 2, {1}, 32, True),
    # the U-Net of DDPM for CIFAR-10, which the paper trains (35.7 M parameters, attention at 16x16)
    "ddpm-cifar": _preset((128, 256, 256, 256), 2, {1}, 32, True),
    # the same with one level more, for 64x64 images (AFHQ-DOG)
    "ddpm-64": _preset((128, 256, 256, 256, 512), 2, {2}, 32, True),
}


def fold_factor(config: ModelConfig, image_shape: tuple[int, int, int]) -> int:
    """Side of the pixel blocks folded into channels (pixel_unshuffle) before the U-Net; 1 folds nothing."""
    if config.pixel_unshuffle:
        return config.pixel_unshuffle
    if config.init_from:
        return saved_fold(Path(config.init_from))
    return 2 if image_shape[1] == 16 and config.preset in ("tiny", "small") else 1


def build_unet(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> UNet2DModel:
    """A UNet2DModel for images of `image_shape` = (C, H, W), with weights drawn from `seed`, or pretrained ones.

    Raises `ConfigError` where the image size does not fit the preset or the pretrained folder.
    """
    channels, height, width = image_shape
    fold = fold_factor(config, image_shape)
    if height != width:
        raise ConfigError(f"images must be square (got {height}x{width}): set data.image-size to crop them")
    if height % fold:
        raise ConfigError(f"model.pixel-unshuffle={fold} must divide the image side {height}")
    if config.class_conditional and not num_classes:
        raise ConfigError("model.class-conditional needs labels, and this data has none")
    folded = (channels * fold**2, height // fold)
    if config.init_from:
        return _pretrained(Path(config.init_from), folded, num_classes if config.class_conditional else 0)
    levels = len(PRESETS[config.preset]["block_out_channels"])
    if folded[1] % 2 ** (levels - 1) or folded[1] < 2**levels:
        raise ConfigError(
            f"model.preset={config.preset} halves the image {levels - 1} times, which does not fit a side of "
            f"{folded[1]}: choose a smaller preset, or a data.image-size that is a multiple of "
            f"{2 ** (levels - 1) * fold} and at least {2**levels * fold}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=folded[1],
            in_channels=folded[0],
            out_channels=folded[0],
            dropout=config.dropout,
            num_class_embeds=num_classes if config.class_conditional else None,
            **PRESETS[config.preset],
        )


def check_pretrained_schedule(model: ModelConfig, diffusion: DiffusionConfig) -> None:
    """Raise `ConfigError` if `model.init-from` was trained under another noise schedule than `diffusion.*` says.

    A text-to-image model goes by its own (ret_fl/diffusion/text_to_image.py).
    """
    file = Path(model.init_from) / "scheduler" / "scheduler_config.json"
    if not model.init_from or not file.is_file() or is_stable_diffusion(model.init_from):
        return
    theirs = json.loads(file.read_text())
    ours = {
        "prediction_type": ("prediction", diffusion.prediction),
        "num_train_timesteps": ("timesteps", diffusion.timesteps),
        "beta_start": ("beta-start", diffusion.beta_start),
        "beta_end": ("beta-end", diffusion.beta_end),
        "beta_schedule": ("beta-schedule", diffusion.beta_schedule),
    }
    other = [f"diffusion.{key}={theirs[k]}" for k, (key, value) in ours.items() if theirs.get(k, value) != value]
    if other:
        raise ConfigError(f"model.init-from: the folder was trained with another schedule: set {', '.join(other)}")


def _pretrained(folder: Path, folded: tuple[int, int], num_classes: int) -> UNet2DModel:
    where = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (where / "config.json").is_file():
        raise ConfigError(f"model.init-from: {folder} holds no diffusers model (config.json, or unet/config.json)")
    kind = json.loads((where / "config.json").read_text()).get("_class_name")
    if kind != "UNet2DModel":
        raise ConfigError(f"model.init-from: {folder} holds a {kind}, and ret-fl trains a UNet2DModel")
    weight_files(where, "model.init-from")
    unet = UNet2DModel.from_pretrained(where, use_safetensors=True, low_cpu_mem_usage=False)
    found = (unet.config.in_channels, unet.config.sample_size, unet.config.num_class_embeds or 0)
    if found != (*folded, num_classes):
        raise ConfigError(
            f"model.init-from: the model in {folder} takes {found[0]} channels of side {found[1]} and {found[2]} "
            f"classes, the data gives {folded[0]}, {folded[1]} and {num_classes}: set data.image-size, "
            "data.channels, model.pixel-unshuffle or model.class-conditional to match"
        )
    return unet
