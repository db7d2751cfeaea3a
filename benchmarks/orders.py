"""The order of a first round, by hand: what the benchmarks train on or fetch by."""

from __future__ import annotations

import numpy as np

from ret_fl.config import RunConfig
from ret_fl.protocol import TrainOrder


def first_order(config: RunConfig, fingerprint: str, ids: np.ndarray) -> TrainOrder:
    """An order of samples `ids` (int64 [n]) of which nothing is known yet."""
    n, cells = len(ids), config.agc.bins or config.diffusion.timesteps
    return TrainOrder(
        config=config,
        run_key="benchmark",
        fingerprint=fingerprint,
        shard=0,
        round=1,
        proxy_round=0,
        start="global",
        upload=True,
        ids=ids,
        probability=np.ones(n, np.float32),
        strength=np.zeros(n, np.float32),
        log_ratio=np.full(n, np.nan, np.float32),
        usual=np.full(n, np.nan, np.float32),
        bank_values=np.zeros(cells, np.float32),
        bank_visits=np.zeros(cells, np.int64),
    )
