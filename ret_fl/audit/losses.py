"""Histograms of losses, for audit.json and for the report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ret_fl.audit.schema import LossHistogram

BINS = 30


def loss_histograms(losses: Mapping[str, np.ndarray]) -> list[LossHistogram]:
    """Of the finite losses of each group, all in the same bins; groups without any are left out.

    Bins are equally wide, in the logarithm where losses differ by more than a factor of ten.
    """
    groups = {name: values[np.isfinite(values)] for name, values in losses.items()}
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups:
        return []
    everything = np.concatenate(list(groups.values()))
    low, high = float(everything.min()), float(everything.max())
    if spans_decades(low, high):
        edges = np.geomspace(low, high, BINS + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    edges[0], edges[-1] = min(low, edges[0]), max(high, edges[-1])  # rounding must leave none out
    return [
        LossHistogram(
            group=name,
            median=float(np.median(values)),
            edges=edges.tolist(),
            counts=np.histogram(values, edges)[0].tolist(),
        )
        for name, values in groups.items()
    ]


def spans_decades(low: float, high: float) -> bool:
    """Whether losses between these are told apart by their logarithms."""
    return 0 < 10 * low < high
