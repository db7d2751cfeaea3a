"""What fine-tuning a text-to-image model sends and keeps in memory, whole and by LoRA.

    python -m benchmarks.text_to_image --run         # a real federated round of a small random model: bytes it sent
    python -m benchmarks.text_to_image               # the U-Net of SD 2.1 at 256 px, random weights (needs 10 GB)
    python -m benchmarks.text_to_image --size sd15 --side 512

Bytes of `--run` are those of metrics.jsonl. The others: parameters are counted; activations are what autograd keeps of
one sample in float32 on the CPU (`ret_fl.doctor.client_memory`). Operations are counted by benchmarks.recipes.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from clients.app import app as client_app
from ret_fl.config import RunConfig, Scalar
from ret_fl.diffusion.proxymodel import open_model, trained_parameters
from ret_fl.doctor import client_memory
from ret_fl.rundir import RunDir
from server.app import app as server_app
from simulations.inline import run_inline

SIZES: dict[str, dict[str, Any]] = {
    "sd21": {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "small": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
    },
}
RANKS = (4, 16, 64)
MB = 1e6


def make_pipeline(folder: Path, size: str, side: int) -> Path:
    """A StableDiffusionPipeline folder with a random U-Net of this size; VAE and text encoder are tiny."""
    folder.mkdir(parents=True)
    tokens = [*"abcdefghijklmnopqrstuvwxyz", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    width = SIZES[size]["cross_attention_dim"]
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    blocks = 4
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8,) * blocks, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        unet=UNet2DConditionModel(sample_size=side // 8, **SIZES[size]),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def estimate(size: str, side: int, place: Path) -> None:
    """Parameters, bytes, activations and operations of one model."""
    folder = make_pipeline(place / "model", size, side)
    print(f"{size}, {side} px\n\n| trained | parameters | a client sends a round, MB |\n|---|---:|---:|")
    for rank in (0, *RANKS):
        model = open_model(_config(folder, {"lora.rank": rank}), (3, side, side), 0)
        count = sum(p.numel() for p in trained_parameters(model.unet).values())
        print(f"| {f'LoRA, rank {rank}' if rank else 'whole U-Net'} | {count:,} | {4 * count / MB:,.1f} |")
        del model
    print("\n| on the client, batch-size=1 and float32 | GB |\n|---|---:|")
    cases: dict[str, dict[str, Any]] = {
        "whole U-Net": {},
        "whole U-Net, gradient checkpointing": {"model.gradient-checkpointing": True},
        "whole U-Net, gradient checkpointing, 8-bit AdamW": {
            "model.gradient-checkpointing": True, "optimizer.kind": "adamw-8bit",
        },
        "LoRA of rank 16, gradient checkpointing": {"model.gradient-checkpointing": True, "lora.rank": 16},
    }  # fmt: skip
    for name, changes in cases.items():
        one, two = (_config(folder, changes | {"batch-size": size, "device": "cpu"}) for size in (1, 2))
        model = open_model(one, (3, side, side), 0)
        memory = client_memory(one, model, (3, side, side))
        further = client_memory(two, model, (3, side, side)) - memory
        print(f"| {name} | {memory / 1e9:.1f}, and {further / 1e9:.2f} for each further image |", flush=True)
        del model


def measured(place: Path) -> None:
    """Two shards, one round each of a small model: what metrics.jsonl says was sent."""
    folder = make_pipeline(place / "model", "small", 64)
    images = place / "images"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            images / f"{i}.png"
        )
    (images / "captions.json").write_text(json.dumps({f"{i}.png": f"a {'abcdefgh'[i]}" for i in range(8)}))
    data: dict[str, Scalar] = {"data.source": "image-folder", "data.path": str(images), "data.reference": False}
    short: dict[str, Scalar] = {"num-server-rounds": 1, "local-steps": 1, "batch-size": 2, "samples": 0}
    print("| trained | parameters | from both clients, MB | to both, MB |\n|---|---:|---:|---:|")
    for rank in (0, 4):
        out = place / f"run-{rank}"
        config = _config(folder, data | short | {"lora.rank": rank, "data.cache-dir": str(place / "cache")})
        count = sum(p.numel() for p in trained_parameters(open_model(config, (3, 64, 64), 0).unet).values())
        run_inline(server_app, client_app, config.to_flat() | {"out": str(out), "state-dir": str(out / "state")}, 2)
        (row,) = RunDir(out).rows()
        name = f"LoRA, rank {rank}" if rank else "whole U-Net"
        print(f"| {name} | {count:,} | {row['bytes_up'] / MB:,.2f} | {row['bytes_down'] / MB:,.2f} |")


def _config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    settings: dict[str, Scalar] = {"model.init-from": str(folder), "ema.decay": 0.0, "evaluate-every": 0}
    return RunConfig.from_flat(settings | changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd21")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--run", action="store_true", help="train a small model and read what was sent")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        if chosen.run:
            measured(Path(place))
        else:
            estimate(chosen.size, chosen.side, Path(place))


if __name__ == "__main__":
    main()
