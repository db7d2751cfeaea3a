"""Tiny diffusers pipelines on disk, with random weights, for the tests of drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from ret_fl.audit.generate import generate

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


def text_pipeline(folder: Path, scheduler: Any = None, **model_index: Any) -> Path:
    """A random StableDiffusionPipeline: 8x8 latents, 16x16 images, a tokenizer of single letters.

    scheduler: its own; None: DDIM of 100 steps.
    """
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
        scheduler=scheduler or DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    edit_index(folder, **model_index)
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def drawn(model: Path, samples: int = 7, **more: Any) -> Tensor:
    return generate(model, samples=samples, **({"steps": 3} | more)).images


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
