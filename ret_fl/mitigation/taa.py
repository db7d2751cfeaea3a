"""Threshold-Aware Augmentation: images close to being skipped are augmented, the closer the stronger.

RET (arXiv 2502.09434). With the ratio r = mem_ratio * loss / bank[t] (below 1 AGC skips), the strength is
a = exp(-kappa (r - 1)) for r >= 1 and 1 for a skipped sample. The paper applies RandAugment at magnitude 5a to a
whole batch; here every image has its own, continuous strength, and operations that change an image even at
strength 0 or recolour it outright (solarize, posterize, equalize, autocontrast) are left out: a generator
would learn to draw them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ret_fl.config import ConfigError, TaaConfig
from ret_fl.loading import load
from ret_fl.plugins import AUGMENTERS

GEOMETRIC = ("shift-x", "shift-y", "rotate", "shear-x", "shear-y")
PHOTOMETRIC = ("brightness", "contrast", "colour", "sharpness")
LARGEST = {"shift": 0.45, "rotate": math.radians(30), "shear": 0.3, "photometric": 0.9}
"""What RandAugment's magnitude 30 means: share of the side, radians, slope, share of the blend."""


def threshold_ratio(loss: Tensor, bank_value: Tensor, mem_ratio: float) -> Tensor:
    """r = mem_ratio * loss / bank: float [B]; below 1 the sample is skipped."""
    return mem_ratio * loss / bank_value.clamp(min=1e-12)


def strength(ratio: Tensor, kappa: float) -> Tensor:
    """Augmentation strength in (0, 1] of each ratio: 1 at or below the threshold, falling above it."""
    return torch.exp(-kappa * (ratio - 1).clamp(min=0))


class RandAugment:
    """Random operations on a batch of images, each image with its own strength.

    policy 'glyph' moves shapes only (shift, rotate, shear: never a flip, which would turn characters into
    non-characters); 'photo' adds a mirror image, brightness, contrast, colour and sharpness.
    """

    def __init__(self, policy: Literal["glyph", "photo"], ops: int = 2, magnitude: float = 5.0) -> None:
        self.policy = policy
        self.operations = GEOMETRIC if policy == "glyph" else GEOMETRIC + PHOTOMETRIC
        self.ops = ops
        self.magnitude = magnitude

    def __call__(self, images: Tensor, strength: Tensor) -> Tensor:
        """images: float [B, C, H, W] in [-1, 1]; strength: float [B] in [0, 1], 0 leaves an image untouched."""
        batch = len(images)
        scale = strength * (self.magnitude / 30)
        theta = torch.eye(3, device=images.device).repeat(batch, 1, 1)
        amounts = images.new_zeros(len(PHOTOMETRIC), batch)
        for _ in range(self.ops):
            chosen = torch.randint(len(self.operations), (batch,), device=images.device)
            signed = scale * torch.where(torch.rand(batch, device=images.device) < 0.5, -1.0, 1.0)
            theta = theta @ self._transform(chosen, signed)
            for i in range(len(self.operations) - len(GEOMETRIC)):
                amounts[i] += torch.where(chosen == len(GEOMETRIC) + i, signed * LARGEST["photometric"], 0.0)
        if self.policy == "photo":
            mirror = torch.rand(batch, device=images.device) < strength / 2
            theta[:, 0] = torch.where(mirror[:, None], -theta[:, 0], theta[:, 0])
        grid = F.affine_grid(theta[:, :2], list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        recoloured = _recolour(moved, amounts) if self.policy == "photo" else moved
        return torch.where((strength > 0)[:, None, None, None], recoloured, images).to(images.dtype)

    def _transform(self, chosen: Tensor, signed: Tensor) -> Tensor:
        """Affine matrices float [B, 3, 3] of the chosen operations; identity for photometric ones."""

        def amount(name: str, largest: str) -> Tensor:
            return torch.where(chosen == self.operations.index(name), signed * LARGEST[largest], 0.0)

        angle = amount("rotate", "rotate")
        matrix = torch.zeros(len(chosen), 3, 3, device=chosen.device)
        matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle)
        matrix[:, 0, 1] = torch.sin(angle) + amount("shear-x", "shear")
        matrix[:, 1, 0] = -torch.sin(angle) + amount("shear-y", "shear")
        # affine_grid's coordinates run from -1 to 1: a shift by the whole side is 2
        matrix[:, 0, 2] = 2 * amount("shift-x", "shift")
        matrix[:, 1, 2] = 2 * amount("shift-y", "shift")
        matrix[:, 2, 2] = 1.0
        return matrix


def _recolour(images: Tensor, amounts: Tensor) -> Tensor:
    """Blend each image with a degenerate one, as PIL's ImageEnhance does: black, its mean grey, grey, blurred."""
    brightness, contrast, colour, sharpness = amounts[:, :, None, None, None]
    x = (images + 1) / 2
    x = x * (1 + brightness)
    grey = x.mean(dim=1, keepdim=True)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + contrast)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (1 + colour)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = blurred + (x - blurred) * (1 + sharpness)
    return (x.clamp(0, 1) * 2) - 1


def glyph(images: Tensor, strength: Tensor, config: TaaConfig) -> Tensor:
    """Random shifts, rotations and shears: nothing that turns one character into another."""
    return RandAugment("glyph", config.ops, config.magnitude)(images, strength)


def photo(images: Tensor, strength: Tensor, config: TaaConfig) -> Tensor:
    """As glyph, and mirror images, brightness, contrast, colour and sharpness."""
    return RandAugment("photo", config.ops, config.magnitude)(images, strength)


def make_augmenter(config: TaaConfig, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, strength) -> changed images, by what `taa.policy` names; kind: what 'auto' means.

    Raises `ConfigError` as `ret_fl.loading.load`; so does the augmenter for images of another shape or type.
    """
    (plugin,) = load(AUGMENTERS, kind if config.policy == "auto" else config.policy, config.options)

    def augment(images: Tensor, strength: Tensor) -> Tensor:
        changed = plugin.call(images, strength, config)
        if not isinstance(changed, Tensor) or changed.shape != images.shape or changed.dtype != images.dtype:
            told = (tuple(changed.shape), changed.dtype) if isinstance(changed, Tensor) else type(changed).__name__
            raise ConfigError(
                f"taa.policy={config.policy}: the augmenter must give images as it got them, {images.dtype} "
                f"{tuple(images.shape)}, not {told}"
            )
        return changed

    return augment


class AugmentQueue:
    """Samples waiting for their augmented re-draw in the two-pass modes: filled unevenly, emptied a batch at a time."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def push(self, position: Tensor, strength: Tensor) -> None:
        """position int64 [m] on the CPU, strength float [m]."""
        self.waiting.append((position, strength))

    def batches(self, *, flush: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Whole batches of (position, strength); with `flush` what is left over too."""
        if not self.waiting:
            return []
        position, strength = (torch.cat(column) for column in zip(*self.waiting, strict=True))
        whole = len(position) if flush else len(position) // self.batch_size * self.batch_size
        self.waiting = [(position[whole:], strength[whole:])]
        if not whole:
            return []
        pieces = (column[:whole].split(self.batch_size) for column in (position, strength))
        return list(zip(*pieces, strict=True))
