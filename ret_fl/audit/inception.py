"""What papers report of Inception-v3 beside each other: FID against the training images, and the Inception Score."""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = 10


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y|x) from p(y) (Salimans et al. 2016): mean and deviation over parts.

    Args:
        probabilities: [N, classes], rows that sum to 1; N >= splits. Parts are consecutive, as equal as can be.

    Raises:
        ValueError: fewer images than parts, or rows that are no probabilities.
    """
    p = probabilities.double()
    if p.ndim != 2 or len(p) < splits:
        raise ValueError(f"the Inception Score needs [N, classes] of {splits} images or more, got {tuple(p.shape)}")
    if bool((p < 0).any()) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-3):
        raise ValueError("the Inception Score needs probabilities: rows of numbers from 0 that sum to 1")
    scores = []
    for part in p.tensor_split(splits):
        entropy = -torch.special.entr(part).sum(1).mean()
        scores.append((entropy + torch.special.entr(part.mean(0)).sum()).exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))
