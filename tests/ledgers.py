"""Ledgers and reports made up for tests of what the server does with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ret_fl.ledger import ShardLedger
from ret_fl.protocol import TrainReport


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ledger_of(*sizes: int) -> ShardLedger:
    """Shard 0 owns the first sizes[0] samples, and so on."""
    return ShardLedger.start(np.repeat(np.arange(len(sizes)), sizes).astype(np.int32), len(sizes))


def report(shard: int, ids: Any, log_loss: float = 0.0, *, losses: int = 5000, **changes: Any) -> TrainReport:
    """A report of a proxy whose mean log-loss is `log_loss` above a common schedule; spread of a draw 0.5."""
    ids = np.asarray(ids, np.int64)
    ones, none = np.ones(len(ids), np.int64), np.empty(0, np.int64)
    bins = np.arange(50) < 20
    values: dict[str, Any] = {
        "shard": shard,
        "round": 1,
        "num_examples": max(1, len(ids)),
        "images": 1,
        "seconds": 1.0,
        "loss": 1.0,
        "skip_rate": 0.5,
        "spread": 0.5,
        "start": "global",
        "moments": "fresh",
        "ids": ids,
        "visits": ones,
        "skips": 0 * ones,
        "draws": ones,
        "log_ratio_sum": 0.0 * ones,
        "strength": 0 * ones.astype(np.float32),
        "memorized": none,
        "memorized_score": none.astype(np.float32),
        "high_loss": none,
        "high_loss_score": none.astype(np.float32),
        "bank_values": np.zeros(10, np.float32),
        "bank_visits": np.zeros(10, np.int64),
        "bin_mean": np.where(bins, log_loss - np.arange(50) / 10, 0.0),
        "bin_count": np.where(bins, losses // 20, 0),
        "level_draws": np.zeros(50, np.int64),
        "level_skips": np.zeros(50, np.int64),
    }
    return TrainReport(**(values | changes))


def fits_of(ledger: ShardLedger, *log_losses: float, losses: int = 5000) -> list[TrainReport]:
    return [report(k, ledger.ids(k), loss, losses=losses) for k, loss in enumerate(log_losses)]


def with_ratios(ledger: ShardLedger, ratios: np.ndarray) -> ShardLedger:
    ledger.log_ratio_sum = 4.0 * ratios
    ledger.draws = np.full(len(ledger), 4)
    return ledger
