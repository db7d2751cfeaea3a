"""Replies that are wrong are dropped with the reason; below the quorum the run stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PLAIN, TINY, Federation, fresh_weights, make_federation
from federations import UNEQUAL, Recorder, furthest, spoiling
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from orders import SKIP_ALL, make_order, taa, train

from clients.app import app as client_app
from ret_fl.config import RunConfig, Scalar
from ret_fl.events import JOINED, as_text
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import ARRAYS, METRICS, NUM_EXAMPLES, ORDER, REPORT, ProtocolError, TrainOrder
from ret_fl.rounds import ShardState, check_reply
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
    def with_other(items: dict) -> dict:
        columns = unpack_state(ArrayRecord(items))
        return dict(pack_state(columns | {name: change(columns[name])}))

    return edited(key, with_other)


def first_weight(change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def with_other(items: dict) -> dict:
        name = next(iter(items))
        return items | {name: Array(change(items[name].numpy()))}

    return edited(ARRAYS, with_other)


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


def scalar(**changes: object) -> Callable[[Message, Message], None]:
    return edited(ORDER, lambda s: s | changes)


def metric(name: str, change: Callable[[float], float]) -> Callable[[Message, Message], None]:
    return edited(METRICS, lambda m: m | {name: change(m[name])})


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
    "a start that is bytes": (scalar(start=b"x"), "start is b'x'"),
    "a start that is no word of ours": (scalar(start="elsewhere"), "start is 'elsewhere'"),
    "a start that is a list": (scalar(start=["global"]), "start is ['global']"),
    "moments that are a number": (scalar(moments=1), "moments is 1"),
    "moments that are no word of ours": (scalar(moments="\x1b[31m"), "moments is"),
    "a shard that is a word": (scalar(shard="1"), "shard is '1'"),
    "a shard that is a truth": (scalar(shard=True), "shard is True"),
    "a round that is a fraction": (scalar(round=1.0), "round is 1.0"),
    "a round that is bytes": (scalar(round=b"1"), "round is b'1'"),
    "more images than asked for": (metric("images", lambda n: n + 1), "trained on"),
    "fewer images than asked for": (metric("images", lambda n: n - 1), "trained on"),
    "1e15 images": (metric("images", lambda _: 1e15), "trained on 1000000000000000 images, the order asked for"),
    "half an image": (metric("images", lambda n: n + 0.5), "images is"),
    "fewer than no images": (metric("images", lambda _: -1.0), "images is -1"),
    "less than no time": (metric("seconds", lambda _: -1.0), "seconds is -1"),
    "fewer than no skips": (metric("skip-rate", lambda _: -7.0), "skip_rate is -7"),
    "more skips than visits in all": (metric("skip-rate", lambda _: 1.5), "skip_rate is 1.5"),
    "a negative spread": (metric("spread", lambda _: -0.1), "spread is -0.1"),
    "a part of an example": (metric(NUM_EXAMPLES, lambda n: n + 0.5), "5 examples"),
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


BAD_HELLOS: dict[str, dict[str, object]] = {
    "partition": {"partition": "one"},
    "device": {"device": b"cpu"},
    "fingerprint": {"fingerprint": 7},
    "samples": {"samples": 24.5},
    "images_per_second": {"images_per_second": float("nan")},
}


@pytest.mark.parametrize(("key", "changed"), BAD_HELLOS.items(), ids=BAD_HELLOS.keys())
def test_a_node_with_a_malformed_hello_gets_no_work(
    tiny: Tiny, federate: Federate, flower_log: pytest.LogCaptureFixture, key: str, changed: dict[str, object]
) -> None:
    trained: set[int] = set()

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            trained.add(context.node_id)
        elif context.node_config["partition-id"] == 1:
            edited(ORDER, lambda told: told | changed)(message, reply)
        return reply

    fed = federate(tiny({"num-server-rounds": 1, "min-nodes": 1}), client)
    fed.run()
    assert not fed.rounds[0].failures
    assert len(trained) == 1
    assert f"not a hello: {key} is" in flower_log.text


@pytest.mark.parametrize("mode", ["off", "next-visit", "two-pass-band", "two-pass-all"])
@pytest.mark.parametrize("bank", [1e-6, 1.0, SKIP_ALL])
@pytest.mark.parametrize("changes", [{}, {"local-epochs": 5, "taa.bar": 1e12}, {"local-steps": 3, "taa.bar": 1.5}])
def test_however_many_images_real_training_takes_the_server_believes_it(
    tiny: Tiny, mode: str, bank: float, changes: Mapping[str, Scalar]
) -> None:
    config = tiny(taa(mode), changes)
    order, start = make_order(config, bank=bank), pack_state(fresh_weights(config))
    done = train(config, order)
    state = ShardState(order.bank_values, order.bank_visits)
    check_reply(done.report, pack_state(done.weights), order, state, start)
    most = 2 * config.visits(20) if mode == "two-pass-band" else config.visits(20)
    with pytest.raises(ProtocolError, match=r"trained on \d+ images, the order asked for"):
        check_reply(replace(done.report, images=most + 1), pack_state(done.weights), order, state, start)


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


HUGE = "this disk is full\nINFO: all is well \x1b[2J" + 10**6 * "x"


def test_an_error_of_a_megabyte_with_line_breaks_is_told_in_a_short_line(
    tiny: Tiny, federate: Federate, flower_log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def raising_it(request: Message, reply: Message) -> Message:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, HUGE), reply_to=request)

    fed = federate(tiny(ONE_ROUND), spoiling(1, raising_it))
    fed.strategy.journal.path = tmp_path / "events.jsonl"
    fed.run()
    assert r"this disk is full\nINFO: all is well \x1b[2J" in fed.rounds[0].failures[1]
    assert len(json.dumps(fed.rounds[0].row())) < 30_000
    assert max(len(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()) < 5000
    assert_told_in_short_lines(flower_log)


def test_a_node_that_does_not_say_who_it_is_forges_no_line_of_the_log(
    tiny: Tiny, federate: Federate, flower_log: pytest.LogCaptureFixture
) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN and context.node_config["partition-id"] == 1:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, HUGE), reply_to=message)
        return client_app(message, context)

    with pytest.raises(FederationError, match=r"Node \d+ answered: this disk is full") as stop:
        federate(tiny({"wait-seconds": 0.1, "min-nodes": 2}), client).run()
    assert "all is well" in str(stop.value) and len(str(stop.value)) < 3000 and str(stop.value).isprintable()
    assert "does not answer properly" in flower_log.text
    assert_told_in_short_lines(flower_log)


def assert_told_in_short_lines(log: pytest.LogCaptureFixture) -> None:
    told = [record.getMessage() for record in log.records if "this disk is full" in record.getMessage()]
    assert told and all(len(line) < 5000 and line.isprintable() for line in told)


def test_whatever_an_event_holds_is_one_printable_line() -> None:
    told = as_text(JOINED, {"node": 7, "device": "\x1b[2Jcpu", "why": "a\u2028b", "plain": "é/x"})
    assert told.startswith(r'node joined: node=7 device="\u001b[2Jcpu" why="a\u2028b" plain=é/x at=')
