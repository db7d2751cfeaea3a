"""The denoising objective of DDPM (Ho et al. 2020) with one loss a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ret_fl.config import DiffusionConfig


def make_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The noise schedule, as diffusers saves it beside the model."""
    return DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction,
        clip_sample=True,
    )


class Objective:
    """Per-sample denoising losses of any diffusers U-Net under a diffusers scheduler.

    Images are folded by `fold` (pixel_unshuffle) first. Folding permutes values, so noise and losses are the same
    as on the unfolded image.
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device, *, fold: int = 1, bf16: bool = False) -> None:
        self.scheduler = scheduler
        self.device = device
        self.fold = fold
        self.bf16 = bf16
        self.channels_last = device.type in ("cpu", "cuda")

    def folded(self, images: Tensor) -> Tensor:
        """float [B, C, H, W] -> [B, C f^2, H/f, W/f], in the memory format the U-Net is fastest with."""
        x = F.pixel_unshuffle(images, self.fold) if self.fold > 1 else images
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh timesteps int64 [B], uniform over [0, T), and standard normal noise shaped like `images`."""
        steps = self.scheduler.config.num_train_timesteps
        return torch.randint(steps, (len(images),), device=images.device), torch.randn_like(images)

    def losses(self, unet: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Mean squared error of the prediction over each sample's values: float32 [B].

        x0, noise: float32 folded images; t: int64 [B]; labels: int64 [B] for a class-conditional U-Net.
        """
        x_t = self.scheduler.add_noise(x0, noise, t)
        v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(x0, noise, t) if v else noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = unet(x_t, t, class_labels=labels, return_dict=False)[0]
        return (predicted.float() - target).square().flatten(1).mean(dim=1)
