"""Drawing images from a trained U-Net: DDIM (Song et al. 2021), noise fixed per image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, ModelMixin, UNet2DModel
from torch import Tensor

from ret_fl.diffusion.encoders import weight_files

FOLD_FILE = "pixel_unshuffle.json"


def start_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise of images first..first+count-1: float32 [count, *shape].

    Image i has its own generator, so it is the same image in every batch size, on every device and for every
    model: what differs between two models' samples is the models.
    """
    return noise_of(seed, range(first, first + count), shape)


def noise_of(seed: int, ids: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Starting noise of the images `ids`, as `start_noise` gives it: float32 [n, *shape]."""
    # Philox is keyed by both numbers; torch's CPU generator would keep only the low 32 bits of a seed
    images = [np.random.Generator(np.random.Philox(key=(seed, i))) for i in ids]
    return torch.from_numpy(np.stack([image.standard_normal(shape, np.float32) for image in images]))


def noise_shape(unet: ModelMixin) -> tuple[int, int, int]:
    """(C, H, W) of what a U-Net denoises. Raises `ValueError` if its config does not say."""
    side = unet.config.sample_size
    if side is None:
        raise ValueError("the U-Net's config.json has no sample_size: write the side of its images there")
    height, width = (side, side) if isinstance(side, int) else side
    return unet.config.in_channels, height, width


def image_shape(unet: ModelMixin, fold: int) -> tuple[int, int, int]:
    """(C, H, W) of the images of a U-Net that works on them folded by `fold`; raises as `noise_shape`."""
    channels, height, width = noise_shape(unet)
    return channels // fold**2, height * fold, width * fold


def draw_images(unet: UNet2DModel, scheduler: DDPMScheduler, count: int, *, first: int = 0, **drawing: Any) -> Tensor:
    """Images first..first+count-1 of a seed, as `draw_ids` draws them."""
    return draw_ids(unet, scheduler, range(first, first + count), **drawing)


@torch.no_grad()
def draw_ids(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    ids: Sequence[int],
    *,
    seed: int = 0,
    steps: int = 50,
    fold: int = 1,
    batch_size: int = 256,
    label: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Images `ids` of a seed, in that order: float32 [n, C, H, W] in [0, 1], on the CPU.

    A class-conditional U-Net gives image i the label i modulo its classes, or all of them `label`. `on_progress` is
    told how many are done. Raises `ValueError` for a label that the U-Net does not have.
    """
    total = scheduler.config.num_train_timesteps
    steps = min(steps, total - 1)
    # 'leading' (1, 21, ..., 981) starts too low where steps do not divide T: from pure noise it must start near T
    spacing = "leading" if total % steps == 0 else "trailing"
    ddim = DDIMScheduler.from_config(scheduler.config, steps_offset=1, timestep_spacing=spacing)
    unet = unet.to(device).eval()
    shape = noise_shape(unet)
    classes = unet.config.num_class_embeds
    if label is not None and not 0 <= label < (classes or 0):
        raise ValueError(f"no label {label}: the model has {f'labels 0 to {classes - 1}' if classes else 'no classes'}")
    done: list[Tensor] = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        x = noise_of(seed, part, shape).to(device)
        labels = torch.tensor(part, device=device) % classes if classes else None
        if labels is not None and label is not None:
            labels = torch.full_like(labels, label)
        ddim.set_timesteps(steps, device=device)
        for t in ddim.timesteps:
            predicted = unet(x, t, class_labels=labels, return_dict=False)[0]
            x = ddim.step(predicted, t, x, eta=0.0).prev_sample
        images = F.pixel_shuffle(x, fold) if fold > 1 else x
        done.append(((images.float() + 1) / 2).clamp(0, 1).cpu())
        if on_progress:
            on_progress(start + len(part))
    return torch.cat(done) if done else torch.empty(0, *image_shape(unet, fold))


def save_pipeline(folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler, fold: int) -> None:
    """Save as a folder that diffusers' `DDPMPipeline.from_pretrained` opens without ret-fl.

    A folded model makes folded images; `FOLD_FILE` tells by how much (torch.nn.functional.pixel_shuffle undoes it).
    """
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    if fold > 1:
        (folder / FOLD_FILE).write_text(json.dumps({"pixel_unshuffle": fold}) + "\n")


def load_pipeline(folder: Path) -> tuple[UNet2DModel, DDPMScheduler, int]:
    """U-Net, scheduler and fold factor of a folder written by `save_pipeline`, or of any DDPM/DDIM pipeline.

    Raises `FileNotFoundError` where there is none, and `ConfigError` for weights that are no safetensors.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    weight_files(folder / "unet")
    unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    return unet, scheduler, saved_fold(folder)


def saved_fold(folder: Path) -> int:
    """The fold factor of the model in a pipeline's folder."""
    note = folder / FOLD_FILE
    return int(json.loads(note.read_text())["pixel_unshuffle"]) if note.is_file() else 1
