"""An augmenter: grain instead of moves and colours.

python -m examples.augmenter [FOLDER]        # in a clone: a tiny run, in one process
ret-fl run --set agc.mode=agc --set taa.mode=next-visit --set taa.policy=examples.augmenter:Grain
"""

import sys

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ret_fl.config import Scalar, TaaConfig


class Grain:
    """Gaussian noise on every image, the more the closer it is to being skipped."""

    class Settings(BaseModel):
        deviation: float = Field(0.1, gt=0, description="Standard deviation at full strength; images lie in [-1, 1].")

    def __init__(self, settings: Settings) -> None:
        self.deviation = settings.deviation

    def __call__(self, images: Tensor, strength: Tensor, config: TaaConfig) -> Tensor:
        grain = torch.randn_like(images) * self.deviation * strength[:, None, None, None]
        return (images + grain).clamp(-1, 1)


if __name__ == "__main__":
    from simulations.inline import run_here

    settings: dict[str, Scalar] = {
        "agc.mode": "agc",
        "taa.mode": "next-visit",
        "taa.policy": "examples.augmenter:Grain",
        "taa.options": "deviation = 0.2",
        "agc.bins": 5,
        "shards": 2,
        "batch-size": 4,
        "data.limit": 32,
        "num-server-rounds": 2,
        "local-epochs": 2,
        "evaluate-every": 0,
        "samples": 0,
    }
    print(run_here(settings, *sys.argv[1:]).summary.read_text())
