"""The denoising objective of DDPM (Ho et al. 2020) with one loss a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, ModelMixin
from torch import Tensor

from ret_fl.config import DiffusionConfig
from ret_fl.data.store import Samples
from ret_fl.diffusion.sampling import start_noise

Change = Callable[[Tensor], Tensor]
"""What is done to images float [B, C, H, W] in [-1, 1] before they are trained on."""


def as_seen(images: Tensor, change: Change | None, mirrored: Tensor | None) -> Tensor:
    """Images float [B, C, H, W], some mirrored left to right (bool [B]), all changed, where they are."""
    if mirrored is not None:
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return change(images) if change else images


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

    What is denoised, x0, are images, folded by `fold` (pixel_unshuffle); the condition are their classes. Folding
    permutes values, so noise and losses are the same as on the unfolded image. Objectives of other models
    (ret_fl/diffusion/text_to_image.py) denoise something else under another condition.

    half: what autocast computes in; None: float32.
    """

    def __init__(
        self, scheduler: DDPMScheduler, device: torch.device, *, fold: int = 1, half: torch.dtype | None = None
    ) -> None:
        self.scheduler = scheduler
        self.device = device
        self.fold = fold
        self.half = half
        self.channels_last = device.type in ("cpu", "cuda")

    def prepare(self, store: Samples, ids: Tensor, *, mirrored: bool = False) -> None:
        """Get ready for batches of these samples: int64 [n]; mirrored: of some mirrored, too."""

    def batch(
        self, store: Samples, ids: Tensor, change: Change | None = None, mirrored: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x0 and condition of the samples `ids` (int64 [B]) as training sees them once.

        Those `mirrored` (bool [B], on the device) are mirrored left to right, and all go through `change`.
        """
        images, labels = store.fetch(ids, self.device)
        return self.folded(as_seen(images, change, mirrored)), labels

    def fixed(self, store: Samples, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `batch`, but the same every time."""
        return self.batch(store, ids)

    def imagined(self, count: int, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
        """x0 and condition of as many random samples, to measure speed and memory by."""
        images = torch.rand(count, *image_shape, device=self.device) * 2 - 1
        return self.folded(images), torch.zeros(count, dtype=torch.int64, device=self.device)

    def fixed_noise(self, seed: int, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        """`count` noises for x0 of images of `image_shape` (C, H, W), the same for every model: float32, on device."""
        return self.folded(start_noise(seed, 0, count, image_shape).to(self.device))

    def folded(self, images: Tensor) -> Tensor:
        """float [B, C, H, W] -> [B, C f^2, H/f, W/f], in the memory format the U-Net is fastest with."""
        return self.formatted(F.pixel_unshuffle(images, self.fold) if self.fold > 1 else images)

    def formatted(self, x: Tensor) -> Tensor:
        """float [B, C, H, W] in the memory format the U-Net is fastest with."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def draw(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh timesteps int64 [B], uniform over [0, T), and standard normal noise shaped like `x0`."""
        steps = self.scheduler.config.num_train_timesteps
        return torch.randint(steps, (len(x0),), device=x0.device), torch.randn_like(x0)

    def losses(self, unet: ModelMixin, x0: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        """Mean squared error of the prediction over each sample's values: float32 [B].

        x0, noise: float32; t: int64 [B]; condition: as `batch` gives it.
        """
        x_t = self.scheduler.add_noise(x0, noise, t)
        v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(x0, noise, t) if v else noise
        return (self.predicted(unet, x_t, t, condition) - target).square().flatten(1).mean(dim=1)

    def predicted(self, unet: ModelMixin, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """What the U-Net makes of x_t, float32 of its shape; arguments as in `losses`."""
        with torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None):
            return self._called(unet, x_t, t, condition).float()

    def _called(self, unet: ModelMixin, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """labels: int64 [B], told to a class-conditional U-Net only."""
        told = labels if labels is not None and unet.config.num_class_embeds else None
        return unet(x_t, t, class_labels=told, return_dict=False)[0]
