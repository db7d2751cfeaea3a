"""Replies averaged as they arrive: what Flower makes of all of them at once, and only where that is enough."""

from __future__ import annotations

import copy
import gc
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, FedTrimmedAvg, Krum, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import report

from ret_fl.averaging import RunningMean, needs_the_mean_only
from ret_fl.packing import State, pack_state, unpack_state
from ret_fl.protocol import METRICS, TrainReport, base_content
from simulations.inline import InlineGrid


@pytest.fixture(autouse=True, scope="module")
def grid() -> InlineGrid:
    """Two nodes, and what Flower has to know of this process before a message can be made."""
    return InlineGrid(ClientApp(), 2, {})


def told(examples: int, loss: float) -> TrainReport:
    """A sound report of so many examples and this loss."""
    return report(0, [1], num_examples=examples, loss=loss, skip_rate=loss / 2)


def weights(seed: int) -> State:
    rng = np.random.default_rng(seed)
    return {"raw.a": rng.normal(size=(3, 4)).astype(np.float32), "ema.b": rng.normal(size=5).astype(np.float32)}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0.01, 10)), min_size=1, max_size=8))
def test_the_running_mean_is_flowers_mean_of_all_replies(replies: list[tuple[int, float]]) -> None:
    mean, messages = RunningMean(), []
    for i, (examples, loss) in enumerate(replies):
        mean.add(pack_state(weights(i)), told(examples, loss))
        messages.append(Message(base_content(pack_state(weights(i)), told(examples, loss)), 1, "train"))
    assert mean.content is not None
    arrays, metrics = FedAvg().aggregate_train(1, messages)
    assert mean.content[METRICS]["num-examples"] == sum(examples for examples, _ in replies)
    alone, alone_metrics = mean.through(FedAvg(), 1, Message(RecordDict(), 1, "train"))
    assert arrays is not None and alone is not None and metrics is not None and alone_metrics is not None
    expected, found = unpack_state(arrays), unpack_state(alone)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert dict(alone_metrics) == pytest.approx(dict(metrics))


@pytest.mark.parametrize(
    "base", [FedAvg(), FedProx(), FedAdam(), FedAvgM(server_momentum=0.5)], ids=lambda b: type(b).__name__
)
def test_the_mean_handed_on_is_to_the_bit_what_the_base_makes_of_it(base: FedAvg, grid: InlineGrid) -> None:
    mean, first = RunningMean(), pack_state(weights(9))
    for i, examples in enumerate((3, 5, 2)):
        mean.add(pack_state(weights(i)), told(examples, i + 1.0))
    bases = (base, copy.deepcopy(base))
    for each in bases:
        list(each.configure_train(1, first, ConfigRecord(), grid))
    expected, expected_metrics = bases[1].aggregate_train(1, [Message(copy.deepcopy(mean.content), 1, "train")])
    arrays, metrics = mean.through(bases[0], 1, Message(RecordDict(), 1, "train"))
    assert arrays is not None and expected is not None
    assert {k: v.data for k, v in arrays.items()} == {k: v.data for k, v in expected.items()}
    assert metrics == expected_metrics


def test_however_many_replies_memory_holds_their_mean_and_one_of_them() -> None:
    """Without help of the garbage collector, which comes by when it likes. What FedAvg hands on is the mean itself."""
    names = [f"raw.{i}" for i in range(32)]
    size = len(names) * 100_000 * 4
    mean, reply = RunningMean(), Message(RecordDict(), 1, "train")
    gc.disable()
    tracemalloc.start()
    try:
        for i in range(6):
            mean.add(ArrayRecord({name: Array(np.full(100_000, i, np.float32)) for name in names}), told(1, 1.0))
        arrays, _ = mean.through(FedAvg(), 1, reply)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert arrays is not None and arrays["raw.0"].numpy()[0] == pytest.approx(2.5)
    assert most < 2.3 * size


class MyFedAvg(FedAvg):
    """Somebody's own: who knows what it does to single replies."""


def by_own_metrics(records: list[RecordDict], key: str) -> MetricRecord:
    return MetricRecord({"replies": len(records)})


@pytest.mark.parametrize(
    ("base", "enough"),
    [(FedAvg(), True), (FedAvgM(), True), (FedAdam(), True), (FedMedian(), False), (FedTrimmedAvg(), False),
     (Krum(num_malicious_nodes=1), False), (MyFedAvg(), False), (FedAvg(weighted_by_key="loss"), False),
     (FedAvg(train_metrics_aggr_fn=by_own_metrics), False)],
    ids=["FedAvg", "FedAvgM", "FedAdam", "FedMedian", "FedTrimmedAvg", "Krum", "a subclass", "other weights",
         "other metrics"],
)  # fmt: skip
def test_only_strategies_that_average_first_are_given_the_mean(base: Strategy, enough: bool) -> None:
    assert needs_the_mean_only(base) is enough
