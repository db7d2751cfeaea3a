"""What saves memory changes nothing else: micro-batches, checkpointing, 16 bits, no EMA, 8-bit moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN, TINY, fresh_weights, make_federation, make_trainer, run_server
from federations import furthest
from orders import ALL_T, assert_equal_moments, differ, make_order, taa, train
from outcomes import killed_at

from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.proxystate import Moments, ProxyFiles, ProxyState
from ret_fl.settings import change_run
from ret_fl.trainer import part_of

Tiny = Callable[..., RunConfig]
GATED: dict[str, Scalar] = ALL_T | {"agc.mem-ratio": 1.05, "agc.max-rescale": 1.5, "local-epochs": 2}


@pytest.mark.parametrize("changes", [PLAIN, GATED, taa("two-pass-band"), taa("two-pass-all"), taa("next-visit")])
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_memory_and_not_the_result(tiny: Tiny, changes: dict[str, Scalar], size: int) -> None:
    """Gate, bank, log and step see the batch as one. Adam's first moments are gradients; clipping would hide them."""
    unclipped = {"optimizer.grad-clip": 0.0, "optimizer.lr": 1e-4}
    config, parted = tiny(changes, unclipped), tiny(changes, unclipped, {"micro-batch": size})
    whole, parts = (train(c, make_order(c, bank=0.9)) for c in (config, parted))
    ours, theirs = (torch.cat([m.flatten() for m in t.state.moments.first.values()]) for t in (whole, parts))
    assert (ours - theirs).norm() < 1e-4 * ours.norm()
    assert furthest(whole.weights, parts.weights) < 1e-4 and differ(whole.weights, fresh_weights(config))
    np.testing.assert_array_equal(whole.report.skips, parts.report.skips)
    np.testing.assert_allclose(whole.report.bank_values, parts.report.bank_values, atol=1e-5)
    assert (whole.report.images, whole.report.visits.sum()) == (parts.report.images, parts.report.visits.sum())


def test_gates_skip_where_the_two_were_compared(tiny: Tiny) -> None:
    skips = train(tiny(GATED), make_order(tiny(GATED), bank=0.9)).report.skips
    assert 0 < skips.sum() < 40


def test_gradient_checkpointing_computes_the_same(tiny: Tiny) -> None:
    config = tiny(PLAIN)
    again = tiny(PLAIN, {"model.gradient-checkpointing": True})
    trainer = make_trainer(again)
    assert trainer.unet.is_gradient_checkpointing
    assert furthest(train(config).weights, train(again).weights) < 1e-5


def test_steps_replace_epochs_where_they_are_asked_for(tiny: Tiny) -> None:
    trained = train(tiny(PLAIN, {"local-steps": 7, "local-epochs": 1}))
    assert trained.report.images == 7 * 8
    assert trained.state.moments.step == trained.state.moments.updates == 7


def test_fp16_trains_and_leaves_out_steps_that_overflow(tiny: Tiny) -> None:
    settings = PLAIN | {"local-steps": 4, "optimizer.lr": 0.004}
    config = tiny(settings, {"precision": "fp16"})
    trainer = make_trainer(config)
    trainer.load(fresh_weights(config), None)
    every = torch.ones((), dtype=torch.bool)
    before, scale = trainer.weights(), trainer.scaler.get_scale()
    trainer.backward(sum(p.sum() for p in trainer.parameters.values()) * torch.inf)
    trainer.step(every)
    assert not differ(before, trainer.weights())
    assert trainer.scaler.get_scale() < scale and trainer.moments().updates == 0
    trainer.backward(sum(p.square().sum() for p in trainer.parameters.values()))
    trainer.step(~every)
    assert not differ(before, trainer.weights())
    half, full = train(config), train(tiny(settings, {"precision": "fp32"}))
    assert 0 < furthest(half.weights, full.weights) < 0.05
    assert half.report.loss == pytest.approx(full.report.loss, rel=0.01)


def test_without_an_ema_only_raw_weights_travel_and_are_the_result(tiny: Tiny, tmp_path: Path) -> None:
    without, with_ema = tiny(PLAIN, {"ema.decay": 0.0}), tiny(PLAIN)
    federations = [make_federation(config) for config in (without, with_ema)]
    raw, both = (federation.run(1) for federation in federations)
    assert {name.partition(".")[0] for name in raw} == {"raw"}
    assert furthest(raw, {name: value for name, value in both.items() if name.startswith("raw.")}) == 0
    assert federations[0].rounds[0].bytes_up < 0.6 * federations[1].rounds[0].bytes_up
    result = part_of(raw, "ema.")
    assert all(torch.equal(result[name.removeprefix("raw.")], torch.from_numpy(value)) for name, value in raw.items())
    run = run_server(RunConfig.from_flat(TINY | PLAIN | {"ema.decay": 0.0, "evaluate-every": 1}), tmp_path / "run")
    assert run.final.is_dir() and run.rows()[-1]["train_loss"] > 0


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.9), (0.9, 0.0)])
def test_an_ema_may_be_turned_on_or_off_when_a_run_goes_on(
    tiny: Tiny, tmp_path: Path, before: float, after: float
) -> None:
    config = tiny(PLAIN, {"ema.decay": before})
    killed_at(config, tmp_path / "run", round=2, shard=1)
    change_run(tmp_path / "run", {"ema.decay": after})
    run_server(config, tmp_path / "run", resume=True)
    newest = load_latest(tmp_path / "run" / "checkpoints")
    assert newest.round == 2
    assert {name.partition(".")[0] for name in newest.weights} == ({"raw", "ema"} if after else {"raw"})


def test_eight_bit_moments_survive_their_file(tmp_path: Path) -> None:
    """As bitsandbytes keeps them: bytes with scales for large tensors, float32 for small ones."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    state = {
        "large": {
            "step": 5,
            "state1": torch.randint(256, large.shape, generator=generator).to(torch.uint8),
            "state2": torch.randint(256, large.shape, generator=generator).to(torch.uint8),
            "qmap1": torch.rand(256),
            "qmap2": torch.rand(256),
            "absmax1": torch.rand(1),
            "absmax2": torch.rand(1),
        },
        "small": {"step": 5, "state1": torch.rand(3), "state2": torch.rand(3)},
    }
    moments = Moments.gathered(7, state)
    files = ProxyFiles(tmp_path, "run")
    files.save(0, 1, ProxyState(moments, None), keep=1)
    loaded = files.load(0, 1)
    assert loaded is not None
    assert_equal_moments(loaded.moments, moments)
    for name, parameter in (("large", large), ("small", torch.rand(3))):
        placed = loaded.moments.of(name, parameter)
        assert placed.keys() == state[name].keys() and placed["step"] == 5
        assert all(torch.equal(placed[key], state[name][key]) for key in placed if key != "step")
        assert placed["state1"].stride() == parameter.stride()
