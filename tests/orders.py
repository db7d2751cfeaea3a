"""Orders to train by hand, and what came of them compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from conftest import fresh_weights, make_trainer

from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.packing import State
from ret_fl.protocol import TrainOrder
from ret_fl.proxy import TrainedProxy, train_proxy
from ret_fl.proxystate import Moments, ProxyState

Tiny = Callable[..., RunConfig]


ALL_T: dict[str, Scalar] = {"agc.t-max": 1000}
SKIP_ALL = 1e9
"""A bank value no loss comes near: AGC skips everything below t-max."""


def make_order(config: RunConfig, *, round: int = 1, bank: float = 0.0, **changes: object) -> TrainOrder:
    ids = np.arange(3, 3 + 20, dtype=np.int64)
    cells = config.agc.bins or config.diffusion.timesteps
    order = TrainOrder(
        config=config,
        run_key="test",
        fingerprint=load_splits(config.data).train.fingerprint,
        shard=1,
        round=round,
        proxy_round=round - 1,
        start="global",
        upload=True,
        ids=ids,
        probability=np.ones(len(ids), np.float32),
        strength=np.zeros(len(ids), np.float32),
        log_ratio=np.full(len(ids), np.nan, np.float32),
        usual=np.full(len(ids), np.nan, np.float32),
        bank_values=np.full(cells, bank, np.float32),
        bank_visits=np.full(cells, 100 if bank else 0, np.int64),
    )
    return replace(order, **changes)  # type: ignore[arg-type]


def train(
    config: RunConfig,
    order: TrainOrder | None = None,
    weights: State | None = None,
    state: ProxyState | None = None,
    device: str = "cpu",
) -> TrainedProxy:
    data = load_splits(config.data)
    start = fresh_weights(config) if weights is None else weights
    return train_proxy(make_trainer(config, device), order or make_order(config), start, data.train, data.kind, state)


def differ(left: State, right: State) -> bool:
    return any(not np.array_equal(left[name], right[name]) for name in left)


def assert_equal_moments(left: Moments, right: Moments) -> None:
    assert left.updates == right.updates
    for mine, theirs in ((left.first, right.first), (left.second, right.second)):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def taa(mode: str, **more: Scalar) -> Mapping[str, Scalar]:
    return ALL_T | {"taa.mode": mode} | {f"taa.{key}": value for key, value in more.items()}
