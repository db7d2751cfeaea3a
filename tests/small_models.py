"""Small denoisers for the tests of what losses give away."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ret_fl.config import DiffusionConfig, ModelConfig
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.objective import Objective, make_scheduler

Prediction = Literal["epsilon", "v_prediction"]
PREDICTIONS = ("epsilon", "v_prediction")
EPSILON = DiffusionConfig(prediction="epsilon")


def make_objective(prediction: Prediction = "epsilon", fold: int = 1, timesteps: int = 1000) -> Objective:
    return Objective(
        make_scheduler(DiffusionConfig(prediction=prediction, timesteps=timesteps)), torch.device("cpu"), fold=fold
    )


def tiny(fold: int = 1, classes: int = 0) -> UNet2DModel:
    config = ModelConfig(preset="tiny", pixel_unshuffle=fold, class_conditional=classes > 0)
    return build_unet(config, (1, 8, 8), classes, 0)


def trained(store: SampleStore, steps: int) -> UNet2DModel:
    """A small U-Net after some steps on a store's images."""
    unet = build_unet(ModelConfig(preset="tiny", pixel_unshuffle=1), store.image_shape, 0, 0).train()
    objective = Objective(make_scheduler(EPSILON), torch.device("cpu"))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        x0, _ = store.fetch(torch.randint(len(store), (32,)))
        t, noise = objective.draw(x0)
        optimizer.zero_grad()
        objective.losses(unet, x0, t, noise, None).mean().backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    return unet


class Pointwise(nn.Module):
    """Works on every value alone, so folding cannot matter to it."""

    class config:  # noqa: N801, as diffusers names it
        num_class_embeds = None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
        return (torch.tanh(x) * (1 + t[:, None, None, None] / 1000),)
