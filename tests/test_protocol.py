"""Orders and reports cross Flower's wire unchanged, and malformed ones are refused by name."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import TINY
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.clientapp.client_app import ClientAppException
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from ret_fl.config import RunConfig
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    ORDER,
    REPORT,
    SAMPLES,
    Hello,
    ProtocolError,
    TrainOrder,
    TrainReport,
    payload_bytes,
    reason_of,
)

rng = np.random.default_rng(0)
STATE = {
    "raw.conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "raw.scalar": np.float32(3.5).reshape(()),
    "ema.conv.weight": np.asfortranarray(rng.normal(size=(5, 6)).astype(np.float32)),
}


def over_the_wire(record: RecordDict) -> RecordDict:
    """Through protobuf bytes, as Flower sends it."""
    sent = recorddict_to_proto(record).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(sent))


def an_order() -> TrainOrder:
    n, cells = 7, 20
    return TrainOrder(
        config=RunConfig.from_flat(TINY | {"name": "Ünïcode 'quoted' \"name\"", "optimizer.lr": 1 / 3}),
        run_key="abc",
        fingerprint="f" * 64,
        shard=3,
        round=12,
        proxy_round=11,
        start="proxy",
        upload=False,
        ids=np.array([2**40, 0, 5, 9, 11, 12, 1], np.int64),
        probability=rng.random(n).astype(np.float32),
        strength=rng.random(n).astype(np.float32),
        log_ratio=np.array([np.nan, -1.5, 0, 2, np.nan, 1e-30, -0.0], np.float32),
        usual=np.array([0, np.nan, 1.5, -2, 1e30, np.nan, -0.0], np.float32),
        bank_values=rng.random(cells).astype(np.float32),
        bank_visits=rng.integers(0, 2**40, cells),
    )


def a_report() -> TrainReport:
    n, cells, bins = 5, 20, 50
    return TrainReport(
        shard=1,
        round=4,
        num_examples=7,
        images=70,
        seconds=0.1,
        loss=1 / 3,
        skip_rate=0.25,
        spread=0.7,
        start="proxy",
        moments="carried",
        ids=np.array([2**40, 3, 4, 6, 8], np.int64),
        visits=rng.integers(1, 9, n),
        skips=np.zeros(n, np.int64),
        draws=rng.integers(0, 9, n),
        log_ratio_sum=rng.normal(size=n),
        strength=rng.random(n).astype(np.float32),
        memorized=np.array([3], np.int64),
        memorized_score=np.array([0.5], np.float32),
        high_loss=np.empty(0, np.int64),
        high_loss_score=np.empty(0, np.float32),
        bank_values=rng.random(cells).astype(np.float32),
        bank_visits=rng.integers(0, 9, cells),
        bin_mean=rng.normal(size=bins),
        bin_count=rng.integers(0, 9, bins),
        level_draws=rng.integers(5, 9, bins),
        level_skips=rng.integers(0, 5, bins),
    )


def assert_same(left: object, right: object) -> None:
    for f in fields(left):  # type: ignore[arg-type]
        mine, theirs = getattr(left, f.name), getattr(right, f.name)
        if isinstance(mine, np.ndarray):
            assert theirs.dtype == mine.dtype, f.name
            assert theirs.shape == mine.shape, f.name
            assert theirs.tobytes() == mine.tobytes(), f.name
        else:
            assert (type(theirs), theirs) == (type(mine), mine), f.name


def assert_same_state(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert right[name].dtype == value.dtype
        np.testing.assert_array_equal(right[name], value)


def test_an_order_arrives_as_it_was_sent() -> None:
    order = an_order()
    received, weights = TrainOrder.unpack(over_the_wire(order.pack(pack_state(STATE))))
    assert_same(order, received)
    assert_same_state(STATE, weights)


def test_a_report_arrives_as_it_was_sent() -> None:
    report = a_report()
    received, weights = TrainReport.unpack(over_the_wire(report.pack(STATE)))
    assert_same(report, received)
    assert weights is not None
    assert_same_state(STATE, unpack_state(weights))


def test_a_report_without_weights_says_so() -> None:
    assert TrainReport.unpack(over_the_wire(a_report().pack(None)))[1] is None


def test_orders_of_a_round_share_one_copy_of_the_weights() -> None:
    weights = pack_state(STATE)
    first, second = an_order().pack(weights), an_order().pack(weights)
    assert first[ARRAYS] is second[ARRAYS] is weights


def test_what_flower_averages_holds_no_number_of_a_single_sample() -> None:
    """A MetricRecord is averaged over clients: a list of any length in it would be one a sample, or a tail."""
    metrics = over_the_wire(a_report().pack(None))[METRICS]
    assert set(metrics) == {NUM_EXAMPLES, "images", "seconds", "loss", "skip-rate", "spread"}
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_payload_counts_weights_and_samples() -> None:
    with_weights, without = payload_bytes(a_report().pack(STATE)), payload_bytes(a_report().pack(None))
    size = sum(v.nbytes for v in STATE.values())
    assert size <= with_weights - without <= size + 200 * len(STATE)  # a NumPy header an array
    assert payload_bytes(over_the_wire(a_report().pack(STATE))) == with_weights


# --- malformed messages -----------------------------------------------------------------------------------------


def with_metric(name: str, value: float) -> Callable[[RecordDict], None]:
    def spoil(record: RecordDict) -> None:
        record[METRICS] = MetricRecord(dict(record[METRICS]) | {name: value})

    return spoil


def with_array(key: str, name: str, value: np.ndarray) -> Callable[[RecordDict], None]:
    def spoil(record: RecordDict) -> None:
        record[key] = pack_state({**unpack_state(record[key]), name: value})

    return spoil


def without(key: str, name: str | None = None) -> Callable[[RecordDict], None]:
    def spoil(record: RecordDict) -> None:
        if name is None:
            del record[key]
        else:
            columns = isinstance(record[key], ArrayRecord)
            items = unpack_state(record[key]) if columns else record[key]
            left = {k: v for k, v in items.items() if k != name}
            record[key] = pack_state(left) if columns else type(record[key])(left)

    return spoil


BAD_REPORTS = {
    "no arrays": (without(REPORT), "'report'"),
    "no scalars": (without(ORDER), "not a training report"),
    "no metrics": (without(METRICS), "not a training report"),
    "no ids": (without(REPORT, "ids"), "lacks ids"),
    "no bank": (without(REPORT, "bank_values"), "lacks bank_values"),
    "no shard": (without(ORDER, "shard"), "lacks shard"),
    "no loss": (without(METRICS, "loss"), "lacks loss"),
    "no examples": (without(METRICS, NUM_EXAMPLES), "lacks num-examples"),
    "unequal columns": (with_array(REPORT, "visits", np.ones(3, np.int64)), "unequal length"),
    "a column that is a number": (with_array(REPORT, "visits", np.array(3)), "visits"),
    "NaN loss": (with_metric("loss", float("nan")), "not finite"),
    "infinite spread": (with_metric("spread", float("inf")), "not finite"),
    "zero examples": (with_metric(NUM_EXAMPLES, 0), "0 examples"),
    "negative examples": (with_metric(NUM_EXAMPLES, -3), "-3 examples"),
    "NaN examples": (with_metric(NUM_EXAMPLES, float("nan")), "nan examples"),
    "infinite examples": (with_metric(NUM_EXAMPLES, float("inf")), "inf examples"),
    "ids that are not integers": (with_array(REPORT, "ids", np.arange(5.0)), "ids"),
    "visits that are not integers": (with_array(REPORT, "visits", np.ones(5)), "visits"),
    "losses that are text": (with_array(REPORT, "log_ratio_sum", np.array(list("abcde"))), "log_ratio_sum"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
def test_a_malformed_report_is_refused_by_name(spoil: Callable[[RecordDict], None], said: str) -> None:
    record = a_report().pack(STATE)
    spoil(record)
    with pytest.raises(ProtocolError, match=said):
        TrainReport.unpack(over_the_wire(record))


def with_scalar(name: str, value: object) -> Callable[[RecordDict], None]:
    def spoil(record: RecordDict) -> None:
        record[ORDER] = ConfigRecord(dict(record[ORDER]) | {name: value})  # type: ignore[dict-item]

    return spoil


NO_RUN_KEYS = (
    "",
    ".",
    "..",
    "../../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "~",
    "-x",
    "x\n",
    "a" * 65,
    "\0",
    b"abc",
    7.5,
    ["abc"],
)

BAD_ORDERS = {
    **{f"run key {key!r:.9}": (with_scalar("run_key", key), "run_key.*is not the key") for key in NO_RUN_KEYS},
    "no weights": (without(ARRAYS), "'arrays'"),
    "no scalars": (without(ORDER), "'order'"),
    "no samples": (without(SAMPLES), "'samples'"),
    "no config": (without(ORDER, "config"), "lacks config"),
    "no fingerprint": (without(ORDER, "fingerprint"), "lacks fingerprint"),
    "no ids": (without(SAMPLES, "ids"), "lacks ids"),
    "unequal columns": (with_array(SAMPLES, "strength", np.zeros(3, np.float32)), "shard 3.*unequal length"),
    "no sample": (with_array(SAMPLES, "ids", np.empty(0, np.int64)), "shard 3.*empty"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD_ORDERS.values(), ids=BAD_ORDERS.keys())
def test_a_malformed_order_is_refused_by_name(spoil: Callable[[RecordDict], None], said: str) -> None:
    record = an_order().pack(pack_state(STATE))
    spoil(record)
    with pytest.raises(ProtocolError, match=said):
        TrainOrder.unpack(over_the_wire(record))


def test_the_key_of_every_run_is_one_that_orders_may_have() -> None:
    for _ in range(20):
        order = replace(an_order(), run_key=uuid.uuid4().hex)  # as server/app.py makes it
        assert TrainOrder.unpack(order.pack(pack_state(STATE)))[0].run_key == order.run_key


def test_a_hello_arrives_as_it_was_sent() -> None:
    hello = Hello(partition=2, device="cuda:1", fingerprint="e" * 64, samples=2**33, images_per_second=812.5)
    assert Hello.unpack(over_the_wire(hello.pack())) == hello
    config = RunConfig.from_flat(TINY)
    assert Hello.requested(over_the_wire(Hello.request(config))) == config


def test_a_hello_that_is_none_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not a hello"):
        Hello.unpack(RecordDict())
    with pytest.raises(ProtocolError, match="not a hello request"):
        Hello.requested(RecordDict({ORDER: ConfigRecord({})}))
    with pytest.raises(ProtocolError, match="not a hello"):
        Hello.unpack(RecordDict({ORDER: ConfigRecord({"partition": 1})}))


def test_an_error_reply_is_told_in_the_words_of_the_client() -> None:
    try:
        raise ClientAppException("shard 0: the loss is nan.\nLower optimizer.lr")
    except ClientAppException as error:  # as flwr.supernode and, with a traceback before it, Ray's backend word it
        words = f"{type(error)}:<'{error}'>"
        assert reason_of(Error(0, words)) == r"shard 0: the loss is nan.\nLower optimizer.lr"
        ray = f"<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'{traceback.format_exc()}'>"
        assert reason_of(Error(0, ray)) == r"shard 0: the loss is nan.\nLower optimizer.lr"
    assert reason_of(Error(3, "the node is unavailable")) == "the node is unavailable"
    assert "3" in reason_of(Error(3))


NASTY = "\x1b[2J\x1b]0;owned\x07\x7f\u202e\r\nINFO: all is well, " + 10**6 * "x" + "é, the end"


def assert_fit_for_a_terminal(text: str, most: int) -> None:
    assert text.isprintable() and text.startswith(r"\x1b[2J\x1b]0;owned\x07\x7f\u202e\r\nINFO") and len(text) < most
    assert text.endswith("é, the end")


def test_what_a_node_says_went_wrong_is_cut_and_holds_no_control_codes() -> None:
    assert_fit_for_a_terminal(reason_of(Error(0, NASTY)), 2100)
    try:
        raise ClientAppException(NASTY)
    except ClientAppException as error:
        assert_fit_for_a_terminal(reason_of(Error(0, f"{type(error)}:<'{error}'>")), 2100)
    assert_fit_for_a_terminal(str(ProtocolError(NASTY)), 2100)
    with pytest.raises(ProtocolError) as refused:
        TrainReport.unpack(over_the_wire(RecordDict({NASTY: ConfigRecord({})})))
    assert len(str(refused.value)) < 2100 and str(refused.value).isprintable()


def test_what_a_node_says_of_itself_is_cut_and_holds_no_control_codes() -> None:
    hello = Hello(partition=2, device=NASTY, fingerprint=NASTY, samples=1, images_per_second=0.0)
    heard = Hello.unpack(over_the_wire(hello.pack()))
    for text in (heard.device, heard.fingerprint):
        assert_fit_for_a_terminal(text, 200)
