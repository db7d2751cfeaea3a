"""An auditor: copies of parts, which distances between whole images miss.

python -m examples.auditor [FOLDER]        # in a clone: a tiny run, in one process
ret-fl audit runs/mine --auditor examples.auditor:Parts --auditor-options 'tiles = 2'
"""

import sys

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ret_fl.audit.distances import nearest
from ret_fl.audit.inputs import Evidence
from ret_fl.config import Scalar


class Parts:
    """Images of which some part is much closer to a training image than to any real image never trained on."""

    class Settings(BaseModel):
        tiles: int = Field(2, ge=1, description="An image is cut into so many parts along each side.")
        threshold: float = Field(0.3, gt=0, lt=1, description="Ratio of squared distances below which a part counts.")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, evidence: Evidence) -> dict[str, float]:
        data = evidence.data
        if data.reference is None:
            raise ValueError("copies of parts need reference images")
        train, reference = data.train.unit(), data.reference.unit()
        sets = {"samples with a copied part": evidence.images}
        if data.held_out is not None:
            sets["real held-out images with one"] = data.held_out.unit()
        return {name: self.share(images, train, reference) for name, images in sets.items()}

    def share(self, images: Tensor, train: Tensor, reference: Tensor) -> float:
        copied = torch.zeros(len(images), dtype=torch.bool)
        for own, trained, unseen in zip(*map(self.parts, (images, train, reference)), strict=True):
            copied |= (nearest(own, trained, 1)[0] < self.settings.threshold * nearest(own, unseen, 1)[0])[:, 0]
        return float(copied.double().mean())

    def parts(self, images: Tensor) -> list[Tensor]:
        count = self.settings.tiles
        return [part for row in images.tensor_split(count, 2) for part in row.tensor_split(count, 3)]


if __name__ == "__main__":
    from simulations.inline import run_here

    settings: dict[str, Scalar] = {
        "audit.auditors": "examples.auditor:Parts",
        "audit.options": "tiles = 2",
        "samples": 16,
        "sample-steps": 3,
        "data.limit": 32,
        "num-server-rounds": 1,
        "local-epochs": 1,
        "evaluate-every": 0,
    }
    print(run_here(settings, *sys.argv[1:]).summary.read_text())
