"""The copy rate by chance: an auditor that takes real images never trained on for the training images."""

from __future__ import annotations

from torch import Tensor

from ret_fl.audit.inputs import Evidence, distinct_rows
from ret_fl.audit.replication import copy_report


def swapped(evidence: Evidence) -> dict[str, float]:
    """The copy rate where training and reference images have changed places: of a model that copies nothing, by chance.

    The floor is that of real images, which resemble a training image as often as any other; samples of a model are
    softer. Beside it the rate as it is. Raises `ValueError` without reference images.
    """
    data = evidence.data
    if data.reference is None:
        raise ValueError("the copy rate by chance needs reference images")
    train, reference = data.train.unit(distinct_rows(data.train)), data.reference.unit()

    def rate(known: Tensor, unknown: Tensor) -> float:
        options = evidence.options
        return copy_report(
            evidence.images, known, unknown, options.threshold, device=options.device, memory_mb=options.memory_mb
        ).rate

    return {"copy rate": rate(train, reference), "with both sets in each other's place": rate(reference, train)}
