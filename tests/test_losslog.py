"""The loss log adds up what a phase saw as a plain loop would, and finds what was memorized."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ret_fl.mitigation.losslog import BINS, LossLog

SAMPLES, T = 6, 100
draw = st.tuples(st.integers(0, SAMPLES - 1), st.integers(0, T - 1), st.floats(2**-20, 8, width=32), st.booleans())
phases = st.lists(st.lists(draw, min_size=1, max_size=12), min_size=1, max_size=6)
Phase = list[list[tuple[int, int, float, bool]]]


def logged(phase: Phase, samples: int = SAMPLES, timesteps: int = T) -> LossLog:
    log = LossLog(samples, timesteps)
    for batch in phase:
        position, t, loss, keep = zip(*batch, strict=True)
        log.record(torch.tensor(position), torch.tensor(t), torch.tensor(loss), torch.tensor(keep))
    return log


@settings(deadline=None)
@given(phases)
def test_the_summary_equals_a_plain_loop_over_all_draws(phase: Phase) -> None:
    summary = logged(phase).summary()
    draws = [d for batch in phase for d in batch]
    by_bin: dict[int, list[float]] = defaultdict(list)
    for _, t, loss, _ in draws:
        if t < 0.4 * T:
            by_bin[t * BINS // T].append(math.log(loss))
    mean = {cell: sum(logs) / len(logs) for cell, logs in by_bin.items()}
    visits, skips, low = [0] * SAMPLES, [0] * SAMPLES, [0] * SAMPLES
    ratios: list[tuple[int, float]] = []
    for sample, t, loss, keep in draws:
        visits[sample] += 1
        skips[sample] += not keep
        if t < 0.4 * T:
            low[sample] += 1
            ratios.append((sample, math.log(loss) - mean[t * BINS // T]))
    assert summary.visits.tolist() == visits
    assert summary.skips.tolist() == skips
    assert summary.draws.tolist() == low
    sums = [sum(r for s, r in ratios if s == sample) for sample in range(SAMPLES)]
    assert summary.log_ratio_sum.tolist() == pytest.approx(sums, abs=1e-5)
    assert summary.bin_count.tolist() == [len(by_bin[cell]) for cell in range(BINS)]
    assert summary.bin_mean.tolist() == pytest.approx([mean.get(cell, 0.0) for cell in range(BINS)], abs=1e-5)
    assert summary.loss == pytest.approx(sum(d[2] for d in draws) / len(draws), rel=1e-6)
    assert summary.skip_rate == pytest.approx(sum(skips) / len(draws))
    if len(ratios) > 1:
        variance = sum(r**2 for _, r in ratios) / (len(ratios) - 1)  # their mean is 0
        assert summary.spread == pytest.approx(variance**0.5, abs=1e-5)
    else:
        assert summary.spread == 0


@settings(deadline=None)
@given(phases)
def test_columns_have_the_types_the_wire_carries(phase: Phase) -> None:
    summary = logged(phase).summary()
    for column in (summary.visits, summary.skips, summary.draws):
        assert column.shape == (SAMPLES,) and column.dtype == torch.int64
    assert summary.log_ratio_sum.dtype == summary.bin_mean.dtype == torch.float64
    assert summary.bin_mean.shape == summary.bin_count.shape == (BINS,)


def test_the_timestep_that_bounds_low_noise_is_outside() -> None:
    summary = logged([[(0, 399, 1.0, True), (1, 400, 1.0, True)]], timesteps=1000).summary()
    assert summary.draws.tolist() == [1, 0, 0, 0, 0, 0]


def test_a_loss_of_zero_gives_a_finite_log_ratio() -> None:
    summary = logged([[(0, 0, 0.0, True), (1, 0, 1.0, True)]]).summary()
    assert summary.log_ratio_sum.isfinite().all()
    assert summary.log_ratio_sum[0] < summary.log_ratio_sum[1]


def test_a_loss_that_is_no_number_shows_in_the_mean() -> None:
    assert math.isnan(logged([[(0, 0, float("nan"), False), (1, 90, 1.0, True)]]).summary().loss)


def test_recording_keeps_no_graph_alive() -> None:
    log = LossLog(1, T)
    loss = torch.ones(1, requires_grad=True) * 2
    log.record(torch.tensor([0]), torch.tensor([3]), loss, torch.tensor([True]))
    assert not log.steps[0][2].requires_grad


def test_samples_drawn_ten_times_as_often_with_lower_loss_end_at_the_bottom() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, duplicated, steps = 200, 5, 1000
    # a copied sample is drawn ten times as often as the others; its loss is .7 lower in logs, a draw varies by .5
    rows = torch.arange(samples).repeat_interleave(torch.where(torch.arange(samples) < duplicated, 10, 1))
    log = LossLog(samples, steps)
    for _ in range(50):
        for position in rows[torch.randperm(len(rows), generator=generator)].split(35):
            t = torch.randint(steps, (len(position),), generator=generator)
            noise = 0.5 * torch.randn(len(position), generator=generator)
            log_loss = -6 * t / steps - 0.7 * (position < duplicated) + noise
            log.record(position, t, log_loss.exp(), torch.ones(len(position), dtype=torch.bool))
    summary = log.summary()
    mean = summary.log_ratio_sum / summary.draws.clamp(min=1)
    assert set(mean.argsort()[:duplicated].tolist()) == set(range(duplicated))
    # without the comparison by noise level the spread would be that of the schedule, about 1
    assert summary.spread < 0.7
