"""Replies that are wrong are dropped with the reason; below the quorum the run stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from conftest import PLAIN, TINY, Federation, make_federation
from federations import UNEQUAL, Recorder, furthest, spoiling
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from clients.app import app as client_app
from ret_fl.config import RunConfig, Scalar
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import ARRAYS, METRICS, NUM_EXAMPLES, ORDER, REPORT, TrainOrder
from ret_fl.strategy import FederationError

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]


def edited(key: str, change: Callable[[dict], dict]) -> Callable[[Message, Message], None]:
    """Rebuild one record of the reply from its changed items."""

    def spoil(request: Message, reply: Message) -> None:
        record = reply.content[key]
        reply.content[key] = type(record)(change(dict(record)))

    return spoil


def array(name: str, change: Callable[[np.ndarray], np.ndarray], key: str = REPORT) -> Callable:
    def replace(items: dict) -> dict:
        columns = unpack_state(ArrayRecord(items))
        return dict(pack_state(columns | {name: change(columns[name])}))

    return edited(key, replace)


def first_weight(change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def replace(items: dict) -> dict:
        name = next(iter(items))
        return items | {name: Array(change(items[name].numpy()))}

    return edited(ARRAYS, replace)


def everyone_is_high_loss(request: Message, reply: Message) -> None:
    array("high_loss", lambda _: np.arange(24))(request, reply)
    array("high_loss_score", lambda _: np.zeros(24, np.float32))(request, reply)


def scrambled(items: dict) -> dict:
    """The first array's bytes are no array."""
    name, value = next(iter(items.items()))
    return items | {name: Array(value.dtype, value.shape, value.stype, b"not an array")}


def lying(items: dict) -> dict:
    """The first array says it has the right shape and holds another."""
    name, value = next(iter(items.items()))
    other = Array(np.zeros(3, np.float32))
    return items | {name: Array(value.dtype, value.shape, value.stype, other.data)}


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[-1] = np.nan
    return values


def raising(request: Message, reply: Message) -> Message:
    raise RuntimeError("this disk is full")


def of_another_shard(request: Message, reply: Message) -> None:
    edited(ORDER, lambda s: s | {"shard": 0})(request, reply)


FAULTS: dict[str, tuple[Callable[[Message, Message], Message | None], str]] = {
    "raises": (raising, "this disk is full"),
    "NaN weights": (first_weight(with_nan), "not finite"),
    "infinite weights": (first_weight(lambda w: np.full_like(w, np.inf)), "not finite"),
    "wrong shape": (first_weight(lambda w: w[..., :1]), "expected float32"),
    "weights of another type": (first_weight(lambda w: w.astype(np.float64)), "expected float32"),
    "weights that are words": (first_weight(lambda w: np.full(w.shape, "x")), "expected float32"),
    "weights that are noise": (edited(ARRAYS, scrambled), "cannot be decoded"),
    "weights that are not what they say": (edited(ARRAYS, lying), "expected float32"),
    "samples that are noise": (edited(REPORT, scrambled), "cannot be decoded"),
    "a metric that is a list": (edited(METRICS, lambda m: m | {"loss": [1.0, 2.0]}), "single numbers"),
    "negative draws": (array("bin_count", lambda b: b - 10**6), "fewer than no draws"),
    "more skips than draws": (array("level_skips", lambda b: b + 10**6), "skips more than it draws"),
    "scores of more samples than named": (array("high_loss_score", lambda s: np.append(s, s)), "unequal length"),
    "a layer less": (edited(ARRAYS, lambda a: dict(list(a.items())[1:])), "other names"),
    "a layer more": (edited(ARRAYS, lambda a: a | {"raw.extra": Array(np.zeros(2))}), "raw.extra"),
    "no weights": (lambda _, reply: reply.content.pop(ARRAYS) and None, "no weights"),
    "foreign samples": (array("ids", lambda ids: (ids + 1) % 24), "does not own"),
    "samples that do not exist": (array("ids", lambda ids: ids + 1000), "does not own"),
    "negative samples": (array("ids", lambda ids: -1 - ids), "does not own"),
    "a sample twice": (array("ids", lambda ids: np.repeat(ids[:1], len(ids))), "twice"),
    "foreign high-loss samples": (everyone_is_high_loss, "does not own"),
    "samples that are not numbers": (array("ids", lambda ids: ids.astype(float)), "ids"),
    "more skips than visits": (array("skips", lambda s: s + 100), "impossible"),
    "NaN losses": (array("log_ratio_sum", with_nan), "impossible"),
    "a NaN bank": (array("bank_values", with_nan), "bank_values"),
    "a short bank": (array("bank_visits", lambda b: b[1:]), "bank_visits"),
    "a noise bin less": (array("bin_mean", lambda b: b[1:]), "noise levels"),
    "NaN noise bins": (array("bin_mean", with_nan), "noise levels"),
    "an old round": (edited(ORDER, lambda s: s | {"round": 0}), "round 0"),
    "another shard": (of_another_shard, "about shard 0"),
    "zero examples": (edited(METRICS, lambda m: m | {NUM_EXAMPLES: 0}), "0 examples"),
    "too many examples": (edited(METRICS, lambda m: m | {NUM_EXAMPLES: 10**9}), "1000000000 examples"),
    "infinite examples": (edited(METRICS, lambda m: m | {NUM_EXAMPLES: float("inf")}), "inf examples"),
    "NaN metrics": (edited(METRICS, lambda m: m | {"loss": float("nan")}), "not finite"),
    "another program's reply": (lambda request, _: Message(RecordDict({"a": ConfigRecord({})}), reply_to=request),
                                "not a training report"),
}  # fmt: skip


ONE_ROUND: Mapping[str, Scalar] = UNEQUAL | {"num-server-rounds": 1, "redistribution.policy": "none"}


def from_bytes(sent: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(sent))


@pytest.fixture(scope="module")
def real_replies(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """What real clients answer in round 1, by shard, as Flower would send it: trained once for all faults."""
    replies: dict[int, bytes] = {}

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            replies[int(message.content[ORDER]["shard"])] = recorddict_to_proto(reply.content).SerializeToString()
        return reply

    state_dir: Mapping[str, Scalar] = {"state-dir": str(tmp_path_factory.mktemp("proxies"))}
    make_federation(RunConfig.from_flat(TINY | ONE_ROUND | state_dir), client).run()
    return replies


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_bad_reply_is_dropped_by_name_and_the_others_are_averaged(
    tiny: Tiny,
    federate: Federate,
    real_replies: dict[int, bytes],
    spoil: Callable[[Message, Message], Message | None],
    said: str,
) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return client_app(message, context)
        shard = int(message.content[ORDER]["shard"])
        reply = Message(from_bytes(real_replies[shard]), reply_to=message)
        return (spoil(message, reply) or reply) if shard == 1 else reply

    fed = federate(tiny(ONE_ROUND), client)
    sizes = fed.strategy.ledger.sizes()
    final = fed.run()
    (summary,) = fed.rounds
    assert list(summary.failures) == [1]
    assert said in summary.failures[1]
    assert said in summary.row()["failed_shards"]["1"]  # type: ignore[index]
    uploads = {shard: unpack_state(from_bytes(real_replies[shard])[ARRAYS]) for shard in (0, 2)}
    share = sizes[[0, 2]] / sizes[[0, 2]].sum()
    mean = {name: share[0] * uploads[0][name] + share[1] * uploads[2][name] for name in final}
    assert furthest(final, mean) < 1e-5
    ledger = fed.strategy.ledger
    ledger.check()
    np.testing.assert_array_equal(ledger.sizes(), sizes)
    assert not ledger.visits[ledger.shard == 1].any()
    assert fed.strategy.shards[1].proxy_round == 0
    assert not fed.strategy.shards[1].bank_visits.any()


def test_a_shard_that_failed_once_trains_again(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()

    def client(message: Message, context: Context) -> Message:
        train = message.metadata.message_type == MessageType.TRAIN
        order = TrainOrder.unpack(message.content)[0] if train else None
        if order and (order.shard, order.round) == (1, 2):
            raise RuntimeError("power cut")
        return seen(message, context)

    fed = federate(tiny({"shards": 3, "num-server-rounds": 4}), client)
    fed.run()
    assert [sorted(s.failures) for s in fed.rounds] == [[], [1], [], []]
    again = next(order for _, order in seen.orders if (order.shard, order.round) == (1, 3))
    assert again.proxy_round == 1  # Adam's moments are those of the round that counted
    for owners in fed.owners:
        assert len(owners) == 24
        assert set(owners) == {0, 1, 2}


def test_below_the_quorum_the_run_stops_and_says_why(tiny: Tiny, federate: Federate) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order = TrainOrder.unpack(message.content)[0]
            if order.shard and order.round == 2:
                raise RuntimeError(f"no memory for shard {order.shard}")
        return client_app(message, context)

    fed = federate(tiny({"shards": 3, "num-server-rounds": 3}), client)
    with pytest.raises(FederationError) as stop:
        fed.run()
    assert len(fed.rounds) == 1
    for words in ("round 2", "1 of 3", "quorum", "no memory for shard 1", "no memory for shard 2", "--resume"):
        assert words in str(stop.value)


def test_the_quorum_is_a_setting(tiny: Tiny, federate: Federate) -> None:
    config = tiny({"shards": 3, "num-server-rounds": 1, "quorum": 1.0})
    with pytest.raises(FederationError, match=r"2 of 3 shards.*needs 3"):
        federate(config, spoiling(1, raising)).run()


def test_a_silent_client_is_a_failed_shard(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny({"shards": 3, "num-server-rounds": 1, "round-timeout": 3}))
    real = fed.grid.pull_messages
    fed.grid.pull_messages = lambda ids: [r for r in real(ids) if not _is_of_shard(r, 2)]  # type: ignore[method-assign]
    fed.run()
    assert list(fed.rounds[0].failures) == [2]
    assert "round-timeout" in fed.rounds[0].failures[2]


def _is_of_shard(reply: Message, shard: int) -> bool:
    return reply.has_content() and REPORT in reply.content and reply.content[ORDER]["shard"] == shard


def test_a_huge_learning_rate_stops_the_run_with_its_remedy(tiny: Tiny, federate: Federate) -> None:
    config = tiny(PLAIN, {"optimizer.lr": 1e12, "optimizer.warmup-steps": 0, "local-epochs": 4})
    with pytest.raises(FederationError, match=r"ProxyDivergedError.*optimizer\.lr"):
        federate(config).run()


def test_a_report_with_more_than_is_known_is_read_all_the_same(
    tiny: Tiny, federate: Federate, real_replies: dict[int, bytes]
) -> None:
    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            edited(REPORT, lambda items: items | {"news:1": Array(np.zeros(1))})(message, reply)
        return reply

    fed = federate(tiny(ONE_ROUND), client)
    fed.run()
    assert not fed.rounds[0].failures
