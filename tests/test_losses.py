"""Histograms of losses leave no sample out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ret_fl.audit.losses import loss_histograms

values = st.integers(0, 40).flatmap(
    lambda n: arrays(np.float64, n, elements=st.floats(0, 1e6) | st.just(np.nan) | st.just(np.inf))
)


@given(values, values)
def test_every_finite_loss_is_in_one_bin(first: np.ndarray, second: np.ndarray) -> None:
    finite = {n: v[np.isfinite(v)] for n, v in (("first", first), ("second", second))}
    found = loss_histograms({"first": first, "second": second})
    assert {h.group: sum(h.counts) for h in found} == {n: len(v) for n, v in finite.items() if len(v)}
    assert len({tuple(h.edges) for h in found}) <= 1
    for h in found:
        assert h.median == np.median(finite[h.group])
        assert h.edges[0] <= finite[h.group].min() and finite[h.group].max() <= h.edges[-1]


def test_losses_of_different_sizes_are_told_apart_by_their_logarithms() -> None:
    (found,) = loss_histograms({"a": np.array([0.001, 1.0])})
    assert np.allclose(np.diff(np.log(found.edges)), np.log(1000) / 30)
    (narrow,) = loss_histograms({"a": np.array([0.2, 1.0])})
    assert np.allclose(np.diff(narrow.edges), 0.8 / 30)
