"""Losses of a model on given images at fixed timesteps and noise: comparable between images, models and rounds."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import Objective
from ret_fl.diffusion.sampling import start_noise


@torch.no_grad()
def fixed_losses(
    unet: UNet2DModel,
    objective: Objective,
    store: SampleStore,
    ids: Tensor,
    *,
    timesteps: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Loss of each image averaged over evenly spaced timesteps, with the same noise for every image: float32 [n].

    ids: int64 [n]. One noise tensor a timestep serves all images, so differences between images are theirs.
    """
    unet.eval()
    device = objective.device
    total = objective.scheduler.config.num_train_timesteps
    grid = (torch.arange(timesteps) * 2 + 1) * total // (2 * timesteps)
    noises = objective.folded(start_noise(seed, 0, timesteps, store.image_shape).to(device))
    out = []
    for part in ids.split(batch_size):
        images, labels = store.fetch(part, device)
        x0 = objective.folded(images)
        labels = labels if unet.config.num_class_embeds else None
        losses = [
            objective.losses(unet, x0, torch.full((len(part),), int(t), device=device), noise.expand_as(x0), labels)
            for t, noise in zip(grid, noises, strict=True)
        ]
        out.append(torch.stack(losses).mean(dim=0).cpu())
    return torch.cat(out)
