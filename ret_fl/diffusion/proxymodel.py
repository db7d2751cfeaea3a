"""What a proxy is: the U-Net that is trained and averaged, what it denoises, and how it is handed over.

`open_model` is the one place that knows which kinds there are; training, recording and saving ask the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DDPMScheduler, ModelMixin
from torch import Tensor, nn

from ret_fl.config import RunConfig
from ret_fl.diffusion.models import build_unet, check_pretrained_schedule, fold_factor
from ret_fl.diffusion.objective import Objective, make_scheduler
from ret_fl.diffusion.sampling import save_pipeline
from ret_fl.diffusion.text_to_image import TextToImageModel, is_stable_diffusion


class ProxyModel(Protocol):
    """unet: on the CPU, in float32; those of its parameters that need gradients are trained, travel and are averaged.

    scheduler: the noise schedule it is trained under.
    """

    unet: ModelMixin
    scheduler: DDPMScheduler

    @property
    def frozen(self) -> str:
        """Fingerprint of pretrained weights that do not travel, which every machine must have alike; '' for none."""

    def objective(self, device: torch.device, half: torch.dtype | None = None) -> Objective:
        """The losses it is trained by."""

    def save(self, folder: Path) -> None:
        """Write the model, with the weights its U-Net has now, so that diffusers loads it without ret-fl."""


class PixelModel:
    """A UNet2DModel on the pixels themselves, with or without classes."""

    frozen = ""

    def __init__(self, config: RunConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        check_pretrained_schedule(config.model, config.diffusion)
        self.unet = build_unet(config.model, image_shape, num_classes, config.seed)
        self.scheduler = make_scheduler(config.diffusion)
        self.fold = fold_factor(config.model, image_shape)

    def objective(self, device: torch.device, half: torch.dtype | None = None) -> Objective:
        return Objective(self.scheduler, device, fold=self.fold, half=half)

    def save(self, folder: Path) -> None:
        save_pipeline(folder, self.unet, self.scheduler, self.fold)


def open_model(config: RunConfig, image_shape: tuple[int, int, int], num_classes: int) -> ProxyModel:
    """The model a run trains, at its start, for images of `image_shape` = (C, H, W). Raises `ConfigError`."""
    if is_stable_diffusion(config.model.init_from):
        return TextToImageModel(config, image_shape)
    return PixelModel(config, image_shape, num_classes)


def trained_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a U-Net, by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_trained(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the trained parameters other values. Raises `ValueError` for other names than theirs."""
    parameters = trained_parameters(unet)
    if odd := sorted(parameters.keys() ^ state.keys()):
        raise ValueError(f"weights of another model: {', '.join(odd[:3])} are on one side only")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
