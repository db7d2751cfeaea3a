"""Images to audit: drawn from a run or a diffusers pipeline, or read from a folder or a .npy file.

Image i of a seed has noise of its own (`ret_fl.diffusion.sampling.start_noise`), so it does not depend on the batch
size, and drawing can stop and go on: every batch goes to disk, and only what is missing is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from ret_fl.audit.pipelines import (
    Kind,
    asked_at_once,
    is_text_to_image,
    load_pixels,
    locate,
    pixel_sampler,
    text_sampler,
)
from ret_fl.audit.ready import Channels, fitted, read_some
from ret_fl.audit.shelf import draw_missing, open_shelf
from ret_fl.diffusion.ensemble import How, is_ensemble, read_ensemble

Denoiser = tuple[UNet2DModel, DDPMScheduler, int]
"""A U-Net, its noise schedule and fold factor (`ret_fl.diffusion.models.fold_factor`)."""
# Raise when the same settings would draw other images, so that cached ones are not taken for them.
DRAWING_VERSION = 1


@dataclass(frozen=True)
class Generated:
    """Images to audit and where they come from.

    images: float32 [N, C, H, W] in [0, 1], on the CPU.
    kind: a ret-fl run, a diffusers pipeline, or images that were ready.
    name: the folder's or file's name.
    seed, steps, parameters: of the model; None for ready images.
    left_out: ready images beyond those asked for.
    prompts, guidance: of text-to-image. image_size (0: their own), channels: what the images were brought to.
    ensemble: how they were drawn from the K proxies of a run that averaged nothing; None for one model.
    """

    images: Tensor
    kind: Kind
    name: str
    seed: int | None
    steps: int | None
    parameters: int | None
    left_out: int = 0
    prompts: tuple[str, ...] = ()
    guidance: float | None = None
    image_size: int = 0
    channels: Channels = "auto"
    ensemble: How | None = None


def generate(
    model: Path,
    *,
    samples: int = 1000,
    seed: int = 0,
    steps: int = 50,
    prompts: Sequence[str] = (),
    batch_size: int = 64,
    guidance: float = 7.5,
    image_size: int = 0,
    channels: Channels = "auto",
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Images of `model`: a run's folder, a diffusers pipeline folder, a folder of images, or a .npy file.

    Pixel U-Nets (UNet2DModel) are sampled with DDIM (Song et al. 2021), eta 0, and all their classes in turn;
    text-to-image pipelines with their own scheduler. Of proxies that were never averaged the folder says how images are
    drawn (`ret_fl.diffusion.ensemble`). Images kept by a run are not used: they are drawn anew.

    Args:
        samples: how many images; of ready images so many, evenly spread, or all if there are fewer.
        seed: image i of a seed starts from the same noise for every model, batch size and device.
        steps: denoising steps.
        prompts: for text-to-image; image i gets prompt i modulo their number.
        batch_size: images drawn at once; it changes them by rounding only.
        guidance: scale of classifier-free guidance, for text-to-image.
        image_size: side to which images are resized and centre-cropped; 0 keeps their size.
        channels: 'grey' or 'rgb' converts the images.
        cache: folder that keeps drawn images (float32), by the model's content, seed, steps, prompts and guidance.
            A later call with the same of these draws only what is missing. None keeps nothing.
        on_progress: told how many images of how many are there.

    Raises:
        FileNotFoundError: nothing at `model`, or it is half of a run or pipeline.
        ValueError: the model is none that can be drawn from, text-to-image without prompts, a number out of range,
            or as in `read_images`.
    """
    settings = {"samples": (samples, 1), "seed": (seed, 0), "steps": (steps, 1), "batch_size": (batch_size, 1)}
    for setting, (value, least) in settings.items():
        if value < least:
            raise ValueError(f"{setting} must be >= {least}, got {value}")
    kind, folder = locate(model)
    name = model.resolve().name
    if kind == "images":
        images, count = read_some(model, samples, image_size, channels)
        return Generated(
            images,
            kind,
            name,
            None,
            None,
            None,
            left_out=count - len(images),
            image_size=image_size,
            channels=channels,
        )
    key: dict[str, Any] = {"version": DRAWING_VERSION, "seed": seed, "steps": steps}
    by_text = is_text_to_image(folder)
    if by_text:
        draw, parameters = text_sampler(folder, prompts, guidance, seed, steps, device)
        key |= {"prompts": list(prompts), "guidance": guidance}
    else:
        draw, parameters = pixel_sampler(folder, seed, steps, device)
    shelf = open_shelf(cache, folder, key) if cache else None
    images = draw_missing(draw, samples, asked_at_once(folder, batch_size), shelf, on_progress)
    return Generated(
        fitted(images, image_size, channels),
        kind,
        name,
        seed,
        steps,
        parameters,
        prompts=tuple(prompts) if by_text else (),
        guidance=guidance if by_text else None,
        image_size=image_size,
        channels=channels,
        ensemble=read_ensemble(folder).how if is_ensemble(folder) else None,
    )


def load_denoiser(model: Path, device: torch.device | str) -> Denoiser | None:
    """U-Net (on `device`, in eval mode), noise schedule and fold factor, for attacks that need losses.

    Of proxies that were never averaged the U-Net is all of them, and predicts the mean of what they predict. None for
    ready images; with a warning for text-to-image, and for models that predict neither the noise nor the
    velocity. Raises as `generate`.
    """
    kind, folder = locate(model)
    if kind == "images":
        return None
    if is_text_to_image(folder):
        warnings.warn("leakage left out: losses of text-to-image models need the captions", stacklevel=2)
        return None
    unet, scheduler, fold = load_pixels(folder)
    if (predicted := scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        warnings.warn(f"leakage left out: no attack is known here for a model that predicts {predicted}", stacklevel=2)
        return None
    return unet.to(device).eval(), scheduler, fold
