"""From images to a network's input, as a preprocessor_config.json says it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

SETTINGS_FILE = "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# PIL's numbers, as preprocessor_config.json has them.
RESAMPLING = {2: "bilinear", 3: "bicubic"}
UNKNOWN_STEPS = ("crop_pct", "rescale_offset", "do_pad", "do_flip_channel_order", "size_divisor")


@dataclass(frozen=True)
class Preprocessing:
    """From images to a network's input: resize, centre crop, normalise, as in a preprocessor_config.json.

    The defaults are the recipe that the authors of SSCD (arXiv 2202.10261) recommend for their descriptors.
    """

    size: int | tuple[int, int] | None = 288  # shorter side, or (height, width); None: not resized
    crop: tuple[int, int] | None = None  # (height, width)
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    scale: float = 1.0  # what 1.0 becomes before mean and std
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [N, 3, h, w] of float32 [N, 3, H, W] in [0, 1]; differs from PIL's by its rounding to 8 bits only.

        Raises:
            ValueError: images smaller than the crop.
        """
        if self.size is not None:
            height, width = _target_size(self.size, images.shape[2], images.shape[3])
            # As PIL: width first, and what bicubic filters overshoot is cut after each axis.
            for size in ((images.shape[2], width), (height, width)):
                images = F.interpolate(images, size, mode=self.resample, antialias=True).clamp(0, 1)
        if self.crop is not None:
            images = _centre_crop(images, *self.crop)
        mean, std = images.new_tensor(self.mean)[:, None, None], images.new_tensor(self.std)[:, None, None]
        return (self.scale * images - mean) / std

    @property
    def digest(self) -> str:
        """Six hex digits that tell it from others."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:6]

    @classmethod
    def from_file(cls, path: Path) -> Preprocessing:
        """Read a preprocessor_config.json as transformers writes it.

        An integer size is the shorter side where a crop follows, else both sides.

        Raises:
            ValueError: no JSON object, a value that makes no sense, or a step that is not known here.
        """
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold one JSON object")
        if unknown := [key for key in UNKNOWN_STEPS if values.get(key)]:
            raise ValueError(f"{path} asks for {', '.join(unknown)}, which is not supported: give size and crop_size")
        try:
            return cls(**_settings(values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing`."""
    crop = _pair(values["crop_size"], "crop_size") if _does(values, "do_center_crop", "crop_size") else None
    size = None
    if _does(values, "do_resize", "size"):
        size = _size(values["size"], shorter=crop is not None)
    resample = values.get("resample", 2)
    if size is not None and resample not in RESAMPLING:
        raise ValueError(f"resample must be 2 (bilinear) or 3 (bicubic), got {resample!r}")
    normalise = _does(values, "do_normalize", "image_mean")
    return {
        "size": size,
        "crop": crop,
        "resample": RESAMPLING.get(resample, "bilinear"),
        "scale": 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0,
        "mean": _channels(values, "image_mean") if normalise else (0.0,) * 3,
        "std": _channels(values, "image_std") if normalise else (1.0,) * 3,
    }


def _does(values: dict[str, Any], flag: str, setting: str) -> bool:
    does = values.get(flag, values.get(setting) is not None)
    if does and values.get(setting) is None:
        raise ValueError(f"{flag} is on, but {setting} is missing: give it")
    return bool(does)


def _size(value: Any, shorter: bool) -> int | tuple[int, int]:
    """Size as in `Preprocessing`; `shorter`: an integer means the shorter side."""
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        value, shorter = value["shortest_edge"], True
    pair = _pair(value, "size")
    return pair[0] if shorter and isinstance(value, int) else pair


def _pair(value: Any, name: str) -> tuple[int, int]:
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        value = (value["height"], value["width"])
    elif isinstance(value, int):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise ValueError(f"{name} must be a positive integer, height and width, or a shortest_edge, got {value!r}")
    return value[0], value[1]


def _channels(values: dict[str, Any], name: str) -> tuple[float, ...]:
    value = values.get(name)
    numbers = (value,) * 3 if isinstance(value, int | float) else tuple(value or ())
    if len(numbers) != 3 or (name == "image_std" and min(numbers) <= 0):
        raise ValueError(f"{name} must be 3 numbers (above 0 for image_std), got {value!r}")
    return numbers


def _target_size(size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    if isinstance(size, tuple):
        return size
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def _centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    if min(top, left) < 0:
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]} before the crop to {height}x{width}: "
            f"resize them, or turn do_resize on in {SETTINGS_FILE}"
        )
    return images[:, :, top : top + height, left : left + width]
