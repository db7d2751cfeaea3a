"""An ensemble on disk: a folder with a pipeline for each of K proxies, and how images are drawn from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn

ENSEMBLE_FILE = "ensemble.json"
How = Literal["choose", "average"]
"""Each image from one proxy, or from the mean of all their predictions at every denoising step."""


@dataclass(frozen=True)
class Ensemble:
    """What `ENSEMBLE_FILE` in `folder` says. samples: of each proxy's shard, by which proxies weigh."""

    folder: Path
    how: How
    samples: tuple[int, ...]

    @property
    def members(self) -> list[Path]:
        """The pipelines, by shard."""
        return [member_folder(self.folder, shard) for shard in range(len(self.samples))]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of the samples that each proxy was trained on: float64 [K], 1 in all."""
        return np.array(self.samples) / sum(self.samples)

    def chosen(self, seed: int, ids: Sequence[int]) -> NDArray[np.int64]:
        """Which proxy draws each image of a seed: int64, the same however images are batched."""
        count, shares = len(self.samples), self.shares
        return np.array([np.random.default_rng((seed, i, count)).choice(count, p=shares) for i in ids], np.int64)


def member_folder(folder: Path, shard: int) -> Path:
    """Where the pipeline of a shard's proxy lies in an ensemble's folder."""
    return folder / f"shard-{shard}"


def is_ensemble(folder: Path) -> bool:
    """Whether a folder holds proxies that were never averaged."""
    return (folder / ENSEMBLE_FILE).is_file()


def write_ensemble(folder: Path, how: How, samples: Sequence[int]) -> None:
    """Say how images are drawn from the pipelines in `folder`."""
    told = {"ensemble": how, "samples": [int(n) for n in samples]}
    (folder / ENSEMBLE_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")


def read_ensemble(folder: Path) -> Ensemble:
    """What `write_ensemble` wrote. Raises `ValueError` if it is damaged, or a proxy is missing."""
    path = folder / ENSEMBLE_FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        ensemble = Ensemble(folder, told["ensemble"], tuple(int(n) for n in told["samples"]))
        if ensemble.how not in get_args(How) or min(ensemble.samples) < 1:
            raise ValueError(f"it says {told}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if missing := [member for member in ensemble.members if not (member / "model_index.json").is_file()]:
        raise ValueError(f"{folder} is an ensemble without {missing[0].name}: let the run finish, or resume it")
    return ensemble


class AveragedUNet(nn.Module):
    """K U-Nets of one kind as one, whose prediction is the weighted mean of theirs. shares: K weights, 1 in all."""

    def __init__(self, unets: Sequence[UNet2DModel], shares: Sequence[float]) -> None:
        super().__init__()
        self.unets = nn.ModuleList(unets)
        self.shares = tuple(map(float, shares))
        self.config = unets[0].config

    def forward(self, sample: Tensor, timestep: Tensor, **told: Any) -> tuple[Tensor]:
        """As a UNet2DModel that is called with return_dict=False."""
        predicted = torch.zeros_like(sample)
        for share, unet in zip(self.shares, self.unets, strict=True):
            predicted = predicted + share * unet(sample, timestep, **told)[0]
        return (predicted,)

    def num_parameters(self) -> int:
        """Of all K."""
        return sum(p.numel() for p in self.parameters())
