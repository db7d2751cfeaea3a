"""Images made up for the tests of copies, and the searches they are compared with."""

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gap = queries.double().flatten(1)[:, None] - points.double().flatten(1)[None]
    found, index = gap.square().sum(-1).sort(dim=1, stable=True)
    return found[:, :k], index[:, :k]


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Content moves down and right by up to a pixel; the edge is repeated, as `grid_sample` with border padding."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[2:]
    return padded[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
