"""How far samples lie from each other: the auditor that comes along, and an example of one."""

from __future__ import annotations

import torch

from ret_fl.audit.distances import Images, nearest
from ret_fl.audit.inputs import Evidence, distinct_rows, evenly_spread


def variety(evidence: Evidence) -> dict[str, float]:
    """How far samples lie from each other, beside as many training images: one drawn again and again lies at 0."""
    train = torch.from_numpy(distinct_rows(evidence.data.train))
    count = min(len(evidence.images), len(train))
    samples = evidence.images[evenly_spread(len(evidence.images), count)]
    real = evidence.data.train.pixels(train[evenly_spread(len(train), count)].numpy())

    def apart(images: Images) -> float:
        squared, _ = nearest(
            images, images, 2, device=evidence.options.device, memory_mb=evidence.options.memory_mb
        )  # the nearest is the image itself
        return float(squared[:, 1].median())

    return {
        "squared distance to the nearest other sample, median": apart(samples),
        "of as many training images": apart(real),
    }
