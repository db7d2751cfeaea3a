"""Images, settings and tiny networks for the tests of image models."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
CLIP_SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
}


def pictures(count: int, channels: int = 3, height: int = 48, width: int = 40, seed: int = 0) -> Tensor:
    """uint8 images with sharp edges, gradients, some noise, and parts that are black or white."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    tilt = torch.rand(count, channels, 1, 1, generator=generator)
    smooth = tilt * x + (1 - tilt) * y + 0.1 * torch.rand(count, channels, height, width, generator=generator)
    edge = (x > torch.rand(count, 1, 1, 1, generator=generator)).float()
    return (255 * (0.8 * smooth + 0.8 * edge - 0.3).clamp(0, 1)).to(torch.uint8)


def write_settings(folder: Path, **changes: Any) -> Path:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(CLIP_SETTINGS | changes))
    return path


def save_script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.script(module).save(path)
    return path


class FakeInception(nn.Module):
    """Called as the real file is; fed the real file's input, its features are pixel values of 4x4 patches."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        patches = nn.functional.adaptive_avg_pool2d(img.to(torch.float32), [4, 4]).flatten(1)
        if return_features:
            return patches
        logits = patches / 50
        if not no_output_bias:
            logits = logits + torch.arange(patches.shape[1])
        return logits.softmax(1)
