"""What a client keeps of a proxy between rounds."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import assert_equal_states
from orders import assert_equal_moments
from safetensors.torch import save_file

from ret_fl.proxystate import Moments, ProxyFiles, ProxyState


def a_state(*, weights: bool = True) -> ProxyState:
    g = torch.Generator().manual_seed(0)
    shape = (3, 2, 4, 4)
    strange = torch.randn(shape, generator=g).to(memory_format=torch.channels_last)
    moments = Moments(step=12, updates=9, first={"a.b": strange}, second={"a.b": torch.rand(shape, generator=g)})
    own = {"raw.a": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32), "ema.a": np.zeros((), np.float32)}
    return ProxyState(moments, own if weights else None)


@pytest.mark.parametrize("weights", [True, False])
def test_a_kept_proxy_comes_back_exactly(tmp_path: Path, weights: bool) -> None:
    state = a_state(weights=weights)
    ProxyFiles(tmp_path, "run").save(2, 7, state, keep=1)
    back = ProxyFiles(tmp_path, "run").load(2, 7)
    assert back is not None
    assert back.moments.step == 12
    assert_equal_moments(back.moments, state.moments)
    if weights:
        assert back.weights is not None
        assert_equal_states(back.weights, state.weights or {})
    else:
        assert back.weights is None


def test_a_kept_proxy_is_found_by_its_own_run_shard_and_round_alone(tmp_path: Path) -> None:
    ProxyFiles(tmp_path, "run").save(2, 7, a_state(), keep=1)
    found = [ProxyFiles(tmp_path, run).load(s, r) for run, s, r in (("other", 2, 7), ("run", 1, 7), ("run", 2, 6))]
    assert found == [None, None, None]


def test_old_rounds_are_dropped_by_shard(tmp_path: Path) -> None:
    files = ProxyFiles(tmp_path, "run")
    files.save(0, 1, a_state(), keep=2)
    for number in range(1, 6):
        files.save(1, number, a_state(), keep=2)
    assert [number for number in range(1, 6) if files.load(1, number)] == [3, 4, 5]
    assert files.load(0, 1) is not None
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".safetensors"] * 4


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other"])
def test_a_damaged_file_is_a_missing_one_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = ProxyFiles(tmp_path, "run")
    files.save(2, 7, a_state(), keep=1)
    path = next(tmp_path.rglob("*.safetensors"))
    content = path.read_bytes()
    if damage == "other":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": bytes(range(256))}[damage])
    with caplog.at_level(logging.WARNING):
        assert files.load(2, 7) is None
    assert "shard 2: no usable state of round 7" in caplog.text


def test_nothing_is_missed_before_the_first_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ProxyFiles(tmp_path, "run").load(0, 0) is None
    assert not caplog.text
