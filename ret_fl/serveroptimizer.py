"""A server optimizer (FedAvgM, FedAdam, ...) that moves the raw weights, beside a plain mean of the averaged ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray

from ret_fl.packing import State, pack_state, unpack_state
from ret_fl.protocol import ARRAYS, METRICS, NUM_EXAMPLES

RAW = "raw."


class ServerOptimizer(Strategy):
    """Lets `strategy` make one of all replies, then `optimizer` take its step towards it, on the raw weights alone.

    The EMA stays what `strategy` makes of it. An optimizer's step is as long as its own rate says, whatever the proxies
    moved by, so an EMA that went through it would follow no trajectory that weights were on.

    strategy: FedAvg, or FedAvg inside differential privacy: the step is then taken after the noise.
    optimizer: Flower's; it is given one reply a round.
    """

    def __init__(self, strategy: Strategy, optimizer: FedOpt | FedAvgM) -> None:
        self.strategy, self.optimizer = strategy, optimizer

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        raw = pack_state(_raw(unpack_state(arrays)))
        if isinstance(self.optimizer, FedAvgM) and self.optimizer.momentum_vector:
            self.optimizer.momentum_vector = _divided_as(raw, self.optimizer.momentum_vector)
        list(self.optimizer.configure_train(server_round, raw, ConfigRecord(), grid))  # it keeps the weights
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is None:
            return None, metrics
        mean = unpack_state(arrays)
        content = RecordDict({ARRAYS: pack_state(_raw(mean)), METRICS: MetricRecord({NUM_EXAMPLES: 1})})
        replies[0].content = content
        stepped, _ = self.optimizer.aggregate_train(server_round, replies[:1])
        if stepped is None:
            return None, metrics
        # FedAdam's rate is a double, and so are the weights it makes
        raw = {name: value.astype(np.float32) for name, value in unpack_state(stepped).items()}
        return pack_state(mean | raw), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        self.optimizer.summary()
        self.strategy.summary()


def _divided_as(raw: ArrayRecord, momentum: list[NDArray]) -> list[NDArray]:
    """The same momentum, in arrays as large as those of `raw`: a checkpoint's may be of other sizes."""
    sizes = [math.prod(array.shape) for array in raw.values()]
    if [value.size for value in momentum] == sizes:
        return momentum
    return np.split(np.concatenate(momentum), np.cumsum(sizes)[:-1])


def _raw(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith(RAW)}
