"""Anti-Gradient Control does what the paper's sequential loop does, without the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ret_fl.config import AgcConfig
from ret_fl.mitigation.agc import LossBank, gated_mean, keep_mask, make_gate

T = 10
UNKNOWN = torch.full((5,), float("nan"))
visit = st.tuples(st.integers(0, T - 1), st.floats(0, 1, width=32))
batches = st.lists(st.lists(visit, min_size=1, max_size=40), min_size=1, max_size=4)


def tensors(batch: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    t, loss = zip(*batch, strict=True)
    return torch.tensor(t), torch.tensor(loss)


def always(gate: Any, loss: float, t: int, position: int = 0, draws: int = 1) -> Tensor:
    """What the gate says of the same sample, drawn again and again: bool [draws]."""
    return gate(torch.full((draws,), loss), torch.full((draws,), t), torch.full((draws,), position))


@settings(deadline=None, max_examples=150)
@given(batches, st.sampled_from([0.0, 0.5, 0.8, 0.99]), st.sampled_from([0, 1, 3, 10]), st.booleans())
def test_the_bank_equals_one_update_after_the_other(
    history: list[list[tuple[int, float]]], decay: float, bins: int, bias_correct: bool
) -> None:
    bank = LossBank(T, decay, bins=bins, bias_correct=bias_correct)
    cells = bins or T
    value, visits = np.zeros(cells), np.zeros(cells, int)
    for batch in history:
        bank.update(*tensors(batch))
        for t, loss in batch:
            cell = t * cells // T
            value[cell] = decay * value[cell] + (1 - decay) * loss
            visits[cell] += 1
        expected = value / np.where(visits > 0, 1 - decay ** np.maximum(visits, 1), 1) if bias_correct else value
        found = bank.value(torch.arange(T)).numpy()
        # the correction divides by as little as 1 - decay, and rounding grows by as much
        tolerance = 1e-6 if not bias_correct else 1e-6 / (1 - decay)
        np.testing.assert_allclose(found, expected[np.arange(T) * cells // T], atol=tolerance, rtol=0)
        assert bank.visits.tolist() == visits.tolist()


def test_the_order_of_a_batch_matters_as_in_the_loop() -> None:
    up, down = LossBank(T, 0.5), LossBank(T, 0.5)
    up.update(torch.tensor([3, 3]), torch.tensor([0.0, 1.0]))
    down.update(torch.tensor([3, 3]), torch.tensor([1.0, 0.0]))
    assert up.value(torch.tensor([3])).item() == 0.5
    assert down.value(torch.tensor([3])).item() == 0.25


def test_a_fresh_bank_is_zero_and_keeps_every_sample_of_the_first_batch() -> None:
    bank = LossBank(T)
    loss, t = torch.tensor([1.0, 1e-8, 0.0]), torch.tensor([4, 4, 4])
    assert bank.value(t).tolist() == [0, 0, 0]
    gate = make_gate(AgcConfig(mode="agc", mem_ratio=1.25), bank, torch.zeros(3), UNKNOWN)
    # the third loss is far below the first of its own batch: the bank does not know that one yet
    assert gate(loss, t, t).tolist() == [True, True, True]
    bank.update(t[:1], loss[:1])
    assert gate(loss, t, t).tolist() == [True, False, False]


def test_reading_the_bank_and_asking_the_gate_leave_it_as_it_is() -> None:
    bank = LossBank(T)
    bank.update(torch.tensor([1, 1, 2]), torch.tensor([0.5, 0.25, 0.75]))
    before = bank.values.clone(), bank.visits.clone()
    gate = make_gate(AgcConfig(), bank, torch.zeros(1), UNKNOWN)
    for _ in range(3):
        always(gate, 0.01, 1)
        bank.value(torch.arange(T))
    assert torch.equal(before[0], bank.values) and torch.equal(before[1], bank.visits)


def test_the_bank_carries_no_gradient() -> None:
    bank = LossBank(T)
    loss = torch.tensor([0.5], requires_grad=True)
    bank.update(torch.tensor([0]), loss * 2)
    assert not bank.values.requires_grad
    assert bank.value(torch.tensor([0])).item() == pytest.approx(0.2)


@pytest.mark.parametrize("decay", [0.0, 0.8, 0.95])
def test_bias_correction_makes_the_first_visits_a_weighted_mean(decay: float) -> None:
    bank = LossBank(T, decay, bias_correct=True)
    for _ in range(3):
        bank.update(torch.tensor([7]), torch.tensor([0.25]))
        assert bank.value(torch.tensor([7])).item() == pytest.approx(0.25, rel=1e-5)
    assert bank.value(torch.tensor([6])).item() == 0.0  # never visited: no 0/0


def test_bins_pool_neighbouring_timesteps_and_nothing_else() -> None:
    bank = LossBank(1000, 0.5, bins=100)
    bank.update(torch.tensor([10]), torch.tensor([1.0]))
    value = bank.value(torch.arange(1000))
    assert value[10:20].tolist() == [0.5] * 10
    assert value[:10].sum() + value[20:].sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 0}, "num_timesteps must be at least 1"),
        ({"num_timesteps": 10, "decay": 1.0}, "decay must be in"),
        ({"num_timesteps": 10, "bins": 11}, r"agc\.bins must be between 0 and the 10 timesteps \(got 11\)"),
    ],
)
def test_an_impossible_bank_is_refused_with_the_reason(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossBank(**settings)


def test_a_loss_at_the_threshold_is_kept_and_the_next_smaller_float_is_not() -> None:
    at = torch.tensor(0.5)
    below = torch.nextafter(at, torch.tensor(0.0))
    assert keep_mask(torch.stack([at, below]), torch.ones(2), 2.0).tolist() == [True, False]


@settings(deadline=None)
@given(st.lists(st.floats(2**-20, 10, width=32), min_size=1, max_size=20), st.floats(0, 1e4, width=32))
def test_a_huge_mem_ratio_keeps_every_sample(losses: list[float], bank: float) -> None:
    loss = torch.tensor(losses)
    assert keep_mask(loss, torch.full_like(loss, bank), 1e12).all()
    assert keep_mask(loss, torch.full_like(loss, bank), float("inf")).all()


def seen_bank(loss: float, visits: int = 1) -> LossBank:
    bank = LossBank(1000, 0.0)
    for _ in range(visits):
        bank.update(torch.arange(1000), torch.full((1000,), loss))
    return bank


def test_timesteps_from_t_max_on_are_never_skipped() -> None:
    gate = make_gate(AgcConfig(mode="agc", t_max=500), seen_bank(1.0), torch.zeros(1), UNKNOWN)
    kept = gate(torch.zeros(1000), torch.arange(1000), torch.zeros(1000, dtype=torch.int64))
    assert not kept[:500].any() and kept[500:].all()


def test_nothing_is_skipped_before_min_visits() -> None:
    for visits in (1, 4, 5, 6):
        gate = make_gate(AgcConfig(mode="agc", min_visits=5), seen_bank(1.0, visits), torch.zeros(1), UNKNOWN)
        assert always(gate, 0.0, 3).item() is (visits < 5)


def test_a_gate_follows_its_bank_as_it_is_updated() -> None:
    bank = LossBank(T, 0.0)
    gate = make_gate(AgcConfig(mode="agc", mem_ratio=2.0, t_max=T), bank, torch.zeros(1), UNKNOWN)
    assert always(gate, 0.4, 2).item()
    bank.update(torch.tensor([2]), torch.tensor([1.0]))
    assert not always(gate, 0.4, 2).item()
    assert always(gate, 0.4, 3).item()


def test_off_keeps_everything() -> None:
    gate = make_gate(AgcConfig(mode="off"), seen_bank(1e9), torch.full((1,), -1e9), UNKNOWN)
    assert always(gate, 0.0, 0, draws=100).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10, width=32), st.booleans()), min_size=1, max_size=30))
def test_the_gated_mean_is_the_mean_of_the_kept(samples: list[tuple[float, bool]]) -> None:
    losses, kept = zip(*samples, strict=True)
    loss = torch.tensor(losses, requires_grad=True)
    keep = torch.tensor(kept)
    mean = gated_mean(loss, keep)
    mean.backward()
    expected = np.mean(np.array(losses)[list(kept)]) if any(kept) else 0.0
    assert mean.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    weight = 1 / sum(kept) if any(kept) else 0.0
    assert loss.grad is not None
    assert loss.grad.tolist() == pytest.approx([weight * k for k in kept], rel=1e-6)


def test_when_all_are_skipped_loss_and_gradient_are_exactly_zero() -> None:
    loss = torch.tensor([3.0, 1e30], requires_grad=True)
    for cap in (0.0, 2.0):
        mean = gated_mean(loss, torch.zeros(2, dtype=torch.bool), cap)
        (gradient,) = torch.autograd.grad(mean, loss)
        assert mean.item() == 0.0 and gradient.tolist() == [0.0, 0.0]


@settings(deadline=None)
@given(st.integers(1, 12), st.data())
def test_max_rescale_caps_the_weight_of_a_kept_sample_exactly(kept: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(kept, 12))
    cap = data.draw(st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.0, 100.0]))
    loss = torch.rand(batch, requires_grad=True)
    keep = torch.arange(batch) < kept
    (weight,) = torch.autograd.grad(gated_mean(loss, keep, cap), loss)
    assert weight[:kept].tolist() == pytest.approx([min(1 / kept, cap / batch)] * kept, rel=1e-6)
    assert weight[kept:].tolist() == [0.0] * (batch - kept)


def test_the_random_control_skips_at_its_rate_whatever_the_loss() -> None:
    torch.manual_seed(0)
    draws, rate = 20_000, 0.3
    gate = make_gate(AgcConfig(mode="random", random_rate=rate, t_max=500), seen_bank(1.0), torch.zeros(1), UNKNOWN)
    sigma = (rate * (1 - rate) / draws) ** 0.5
    for loss in (0.0, 1e6):
        skipped = 1 - always(gate, loss, 499, draws=draws).float().mean().item()
        assert abs(skipped - rate) < 5 * sigma
    assert always(gate, 0.0, 500, draws=draws).all()


def test_the_sample_gate_spares_the_upper_half_and_thins_the_lower_as_stated() -> None:
    torch.manual_seed(0)
    ratio = torch.tensor([float("nan"), -1.0, -0.25, 0.0, 0.1, 5.0])  # median of the known: 0
    config = AgcConfig(mode="sample", sharpness=2.0, t_max=500)
    gate = make_gate(config, LossBank(1000), ratio, UNKNOWN)
    draws = 20_000
    for position, expected in enumerate([1, np.exp(-2.0), np.exp(-0.5), 1, 1, 1]):
        rate = always(gate, 0.0, 10, position, draws).float().mean().item()
        if expected == 1:
            assert rate == 1
        else:
            assert abs(rate - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5
        assert always(gate, 0.0, 500, position, draws).all()


def test_the_sample_gate_knowing_nothing_keeps_everything() -> None:
    gate = make_gate(AgcConfig(mode="sample"), LossBank(1000), torch.full((4,), float("nan")), UNKNOWN)
    assert always(gate, 0.0, 0, 3, draws=1000).all()


@settings(deadline=None)
@given(st.lists(visit, min_size=1, max_size=20), st.floats(1.05, 4))
def test_the_own_gate_is_the_papers_where_no_sample_is_unusual(batch: list[tuple[int, float]], ratio: float) -> None:
    t, loss = tensors([(t % 3, loss) for t, loss in batch])
    gates = [
        make_gate(AgcConfig(mode=mode, mem_ratio=ratio, t_max=2), seen_bank(0.5), torch.zeros(1), torch.zeros(1))
        for mode in ("agc", "own")
    ]
    papers, own = (gate(loss, t, torch.zeros_like(t)) for gate in gates)
    assert own.tolist() == papers.tolist()


def test_the_own_gate_holds_a_sample_against_its_own_usual_loss() -> None:
    easy, hard, unknown = 0, 1, 2
    config, bank = AgcConfig(mode="own", mem_ratio=1.25, t_max=500), seen_bank(1.0)
    gate = make_gate(config, bank, torch.zeros(3), torch.tensor([-1.0, 1.0, float("nan")]))
    papers = make_gate(config.model_copy(update={"mode": "agc"}), bank, torch.zeros(3), torch.zeros(3))
    # thresholds: .8 for the paper's gate, .8 / e for the easy sample, .8 * e for the hard one
    for loss, position, kept, kept_by_papers in (
        (0.30, easy, True, False),
        (0.29, easy, False, False),
        (2.18, hard, True, True),
        (2.17, hard, False, True),
        (1e-9, unknown, True, False),
    ):
        assert always(gate, loss, 10, position).item() is kept
        assert always(papers, loss, 10, position).item() is kept_by_papers
        assert always(gate, loss, 500, position).item() is True


class NoHostSync(TorchDispatchMode):
    """Fails on operations that make a GPU's host wait: values, or sizes that depend on values."""

    SYNCING = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.bincount,
        torch.ops.aten._unique2,
        torch.ops.aten._to_copy,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket
        waits = operation in self.SYNCING
        if operation is torch.ops.aten._to_copy:  # a cast waits for nothing, a copy to another device does
            waits = (kwargs or {}).get("device") is not None
        if operation in (torch.ops.aten.index, torch.ops.aten.index_put_):  # so many rows as a mask holds true
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_sync_detector_detects() -> None:
    values = torch.rand(4)
    for syncing in (
        lambda: values.sum().item(),
        lambda: bool(values.sum() > 0),
        lambda: values[values > 0.5],
        lambda: torch.bincount(values.long()),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
            syncing()


@pytest.mark.parametrize("bins", [0, 5])
@pytest.mark.parametrize("mode", ["off", "agc", "own", "sample", "random"])
def test_gate_loss_and_bank_never_wait_for_the_device(mode: Any, bins: int) -> None:
    bank = LossBank(T, bins=bins, bias_correct=True)
    gate = make_gate(AgcConfig(mode=mode, t_max=T, min_visits=1), bank, torch.rand(4), torch.rand(4))
    loss, t, position = torch.rand(8, requires_grad=True), torch.randint(T, (8,)), torch.randint(4, (8,))
    with NoHostSync():
        keep = gate(loss.detach(), t, position)
        gated_mean(loss, keep, max_rescale=2.0).backward()
        bank.update(t, loss)


def test_the_bank_runs_on_a_device_without_values() -> None:
    bank = LossBank(T, bias_correct=True, device="meta")
    t, loss = torch.zeros(8, dtype=torch.int64, device="meta"), torch.zeros(8, device="meta")
    keep = keep_mask(loss, bank.value(t), 1.25)
    assert gated_mean(loss, keep, 2.0).shape == () and keep.dtype == torch.bool
    bank.update(t, loss)
    assert bank.values.shape == (T,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["agc", "own"])
def test_a_step_of_agc_on_cuda_makes_no_synchronising_call(mode: Any) -> None:
    bank, known = LossBank(T, device="cuda"), torch.rand(4, device="cuda")
    gate = make_gate(AgcConfig(mode=mode), bank, known, known)
    loss, t = torch.rand(8, device="cuda"), torch.randint(T, (8,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gated_mean(loss, gate(loss, t, t % 4), 2.0)
        bank.update(t, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
