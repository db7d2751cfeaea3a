"""The strategy averages what it should, and no client can bend, empty or silently freeze a run."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN, TINY, Client, Federation, fresh_weights, make_federation, make_trainer
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from PIL import Image

from clients.app import app as client_app
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.partition import partition
from ret_fl.data.sources import load_splits
from ret_fl.protocol import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    ORDER,
    REPORT,
    State,
    TrainOrder,
    TrainReport,
    pack_state,
    unpack_state,
)
from ret_fl.proxy import train_proxy
from ret_fl.proxystate import ProxyState
from ret_fl.strategy import FederationError
from simulations.inline import InlineGrid

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]
UNEQUAL: Mapping[str, Scalar] = {"shards": 3, "partition.sizes": "0.6,0.3,0.1"}


def assert_equal_states(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []


def furthest(left: State, right: State) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name].astype(float) - right[name]).max()) for name in left)


class Recorder:
    """A real client whose orders and replies are kept."""

    def __init__(self, client: Client = client_app) -> None:
        self.client = client
        self.orders: list[tuple[int, TrainOrder]] = []
        self.replies: list[tuple[TrainReport, State | None]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return self.client(message, context)
        self.orders.append((context.node_id, TrainOrder.unpack(message.content)[0]))
        reply = self.client(message, context)
        report, weights = TrainReport.unpack(reply.content)
        self.replies.append((report, unpack_state(weights) if weights is not None else None))
        return reply


def spoiling(shard: int, spoil: Callable[[Message, Message], Message | None], rounds: tuple[int, ...] = (1,)) -> Client:
    """Real clients, but the reply for one shard goes through `spoil(request, reply)` in some rounds."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return client_app(message, context)
        order = TrainOrder.unpack(message.content)[0]
        reply = client_app(message, context)
        if order.shard == shard and order.round in rounds:
            return spoil(message, reply) or reply
        return reply

    return client


# --- averaging --------------------------------------------------------------------------------------------------


def test_every_shard_gets_one_order_though_nodes_are_fewer(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()
    fed = federate(tiny({"shards": 5, "num-server-rounds": 2}), seen, nodes=2)
    fed.run()
    for number in (1, 2):
        orders = [(node, order) for node, order in seen.orders if order.round == number]
        assert sorted(order.shard for _, order in orders) == [0, 1, 2, 3, 4]
        assert sorted(Counter(node for node, _ in orders).values()) == [2, 3]
        ids = np.concatenate([order.ids for _, order in orders])
        assert sorted(ids) == list(range(24))


def test_one_shard_without_mitigation_is_central_training(tiny: Tiny, federate: Federate) -> None:
    config = tiny(PLAIN, {"shards": 1, "num-server-rounds": 3})
    final = federate(config).run()
    data, weights, state = load_splits(config.data), fresh_weights(config), None
    n, cells = len(data.train), config.diffusion.timesteps
    trainer = make_trainer(config)
    for number in (1, 2, 3):
        order = TrainOrder(
            config, "x", data.train.fingerprint, 0, number, number - 1, "global", True, np.arange(n),
            np.ones(n, np.float32), np.zeros(n, np.float32), np.full(n, np.nan, np.float32),
            np.zeros(cells, np.float32), np.zeros(cells, np.int64),
        )  # fmt: skip
        trained = train_proxy(trainer, order, weights, data.train, data.kind, state)
        weights, state = trained.weights, trained.state
    assert_equal_states(final, weights)


def test_unequal_shards_weigh_by_their_samples(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()
    fed = federate(tiny(UNEQUAL, {"num-server-rounds": 1}), seen)
    sizes = fed.strategy.ledger.sizes()
    assert sorted(sizes) == [2, 7, 15] or len(set(sizes)) == 3
    final = fed.run()
    weight = {report.shard: report.num_examples / 24 for report, _ in seen.replies}
    assert [weight[k] * 24 for k in range(3)] == sizes.tolist()
    assert sum(weight.values()) == pytest.approx(1)
    for name in final:
        mean = sum(weight[r.shard] * state[name].astype(np.float64) for r, state in seen.replies if state)
        np.testing.assert_allclose(final[name], mean, rtol=0, atol=2e-7 * max(1, float(np.abs(mean).max())))


def test_without_mitigation_it_is_flowers_own_fedavg(tiny: Tiny, federate: Federate) -> None:
    """Flower's FedAvg with a ClientApp of ten lines, each client owning its shard, comes to the same weights."""
    config = tiny(PLAIN, UNEQUAL, {"num-server-rounds": 3})
    data, cells = load_splits(config.data), config.diffusion.timesteps
    assert data.train.labels is not None
    shard = partition(24, data.train.labels.numpy(), 10, 3, config.partition, config.seed)
    kept: dict[int, ProxyState] = {}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        k, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        ids = np.flatnonzero(shard == k)
        n = len(ids)
        order = TrainOrder(
            config, "x", data.train.fingerprint, k, number, 0, "global", True, ids, np.ones(n, np.float32),
            np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(cells, np.float32), np.zeros(cells, np.int64),
        )  # fmt: skip
        weights = unpack_state(message.content["arrays"])
        trained = train_proxy(make_trainer(config), order, weights, data.train, data.kind, kept.get(k))
        kept[k] = trained.state
        metrics = MetricRecord({"num-examples": n})
        return Message(RecordDict({"arrays": pack_state(trained.weights), "metrics": metrics}), reply_to=message)

    grid = InlineGrid(app, 3, {})
    plain = FedAvg(fraction_evaluate=0.0).start(grid, pack_state(fresh_weights(config)), 3)
    assert furthest(federate(config).run(), unpack_state(plain.arrays)) <= 1e-6


@pytest.mark.parametrize("base", [FedAdam, FedMedian])
def test_flowers_other_strategies_average_underneath(tiny: Tiny, federate: Federate, base: type) -> None:
    fed = federate(tiny(), base=base(fraction_evaluate=0.0))
    final = fed.run()
    assert [s.aggregated for s in fed.rounds] == [True, True]
    assert all(np.isfinite(value).all() for value in final.values())
    assert furthest(final, fed.start) > 0


def test_the_median_is_that_of_the_proxies(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()
    final = federate(tiny({"shards": 3, "num-server-rounds": 1}), seen, base=FedMedian(fraction_evaluate=0.0)).run()
    for name in final:
        uploads = [state[name] for _, state in seen.replies if state]
        np.testing.assert_allclose(final[name], np.median(uploads, axis=0), atol=1e-6)


# --- bad replies ------------------------------------------------------------------------------------------------


def edited(key: str, change: Callable[[dict], dict]) -> Callable[[Message, Message], None]:
    """Rebuild one record of the reply from its changed items."""

    def spoil(request: Message, reply: Message) -> None:
        record = reply.content[key]
        reply.content[key] = type(record)(change(dict(record)))

    return spoil


def array(name: str, change: Callable[[np.ndarray], np.ndarray], key: str = REPORT) -> Callable:
    return edited(key, lambda items: items | {name: Array(change(items[name].numpy()))})


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


# --- nodes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """24 grey PNGs of 8x8 in 2 classes."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def from_pictures(tiny: Tiny, pictures: Path, tmp_path: Path) -> RunConfig:
    source: dict[str, Scalar] = {"data.source": "image-folder", "data.path": str(pictures), "data.limit": 0}
    return tiny(source, {"data.cache-dir": str(tmp_path / "cache"), "num-server-rounds": 1})


def test_a_node_with_one_other_image_stops_the_run_before_training(
    from_pictures: RunConfig, federate: Federate, pictures: Path
) -> None:
    copy = pictures.parent / "copy"
    shutil.copytree(pictures, copy)
    changed = copy / "class1" / "13.png"
    pixels = np.array(Image.open(changed))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    fed = federate(from_pictures)
    fed.grid.contexts[3].node_config["data-path"] = str(copy)
    with pytest.raises(FederationError) as stop:
        fed.run()
    own = load_splits(from_pictures.data).train.fingerprint
    other = load_splits(from_pictures.data.model_copy(update={"path": str(copy)})).train.fingerprint
    assert own != other
    for words in (own[:16], other[:16], "partition 1", "data.path"):
        assert words in str(stop.value)
    assert not fed.rounds


def test_a_node_with_the_same_images_elsewhere_takes_part(
    from_pictures: RunConfig, federate: Federate, pictures: Path
) -> None:
    copy = pictures.parent / "copy"
    shutil.copytree(pictures, copy)
    fed = federate(from_pictures)
    fed.grid.contexts[3].node_config["data-path"] = str(copy)
    final = fed.run()
    assert_equal_states(final, federate(from_pictures).run())


def test_a_node_that_gets_an_order_about_other_data_refuses_it(
    from_pictures: RunConfig, federate: Federate, pictures: Path
) -> None:
    fed = federate(from_pictures)
    fed.strategy.roster.greet(fed.grid)
    fed.strategy.fingerprint = "0" * 64
    messages = list(fed.strategy.configure_train(1, pack_state(fed.start), ConfigRecord(), fed.grid))
    reply = next(iter(fed.grid.send_and_receive(messages)))
    assert reply.has_error()
    assert "0" * 16 in reply.error.reason
    assert load_splits(from_pictures.data).train.fingerprint[:16] in reply.error.reason


def test_too_few_clients_end_the_wait(tiny: Tiny, federate: Federate) -> None:
    with pytest.raises(FederationError, match=r"2 of min-nodes=3.*wait-seconds"):
        federate(tiny({"min-nodes": 3})).run()


def test_clients_that_cannot_even_greet_are_waited_for_and_named(
    tiny: Tiny, federate: Federate, flower_log: pytest.LogCaptureFixture
) -> None:
    def broken(message: Message, context: Context) -> Message:
        raise OSError("no such folder")

    with flower_log.at_level(logging.WARNING), pytest.raises(FederationError, match="0 of min-nodes=1"):
        federate(tiny(), broken).run()
    assert "no such folder" in flower_log.text


def test_a_dead_nodes_shard_goes_to_a_living_one(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()
    fed = federate(tiny({"num-server-rounds": 2}), seen)
    whole = federate(tiny({"num-server-rounds": 2, "state-dir": str(tiny().state_dir) + "-other"})).run()
    note = fed._note

    def dies(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 1:
            del fed.grid.contexts[3]
        return note(server_round, arrays)

    fed._note = dies  # type: ignore[method-assign]
    final = fed.run()
    assert [node for node, order in seen.orders if order.round == 2] == [2, 2]
    assert_equal_states(final, whole)  # the same folder of proxies: nothing is lost


def test_without_any_living_node_the_run_stops(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny())
    fed.strategy.roster.greet(fed.grid)
    fed.grid.contexts.clear()
    with pytest.raises(FederationError, match="0 of min-nodes=1"):
        fed.strategy.configure_train(1, pack_state(fed.start), ConfigRecord(), fed.grid)


# --- phases between averages ------------------------------------------------------------------------------------

PHASES: Mapping[str, Scalar] = {
    "aggregate-every": 2,
    "num-server-rounds": 4,
    "shards": 3,
    "redistribution.policy": "high-loss",
    "redistribution.fraction": 0.25,
    "local-epochs": 2,
}


def test_between_averages_nothing_is_uploaded_and_proxies_go_on(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()
    fed = federate(tiny(PHASES), seen)
    first = fed.start
    fed.run()
    model = sum(value.nbytes for value in first.values())
    assert [s.aggregated for s in fed.rounds] == [False, True, False, True]
    assert [s.bytes_up > 3 * model for s in fed.rounds] == [False, True, False, True]
    assert max(s.bytes_up for s in fed.rounds if not s.aggregated) < model / 10
    starts = {(r.round, r.start) for r, _ in seen.replies}
    assert starts == {(1, "global"), (2, "proxy"), (3, "global"), (4, "proxy")}
    assert all((state is None) == (r.round % 2 == 1) for r, state in seen.replies)


def test_samples_move_only_between_averages(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny(PHASES))
    start = fed.strategy.ledger.shard.tolist()
    fed.run()
    assert [len(s.moves) > 0 for s in fed.rounds] == [True, False, True, False]
    owners = [start, *fed.owners]
    moved = [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in pairwise(owners)]
    assert moved == [len(s.moves) for s in fed.rounds]
    assert all(sorted(Counter(o).values()) == [8, 8, 8] for o in fed.owners)  # a ring keeps sizes


def test_averaging_every_second_round_is_another_model(tiny: Tiny, federate: Federate) -> None:
    kept = {**PHASES, "redistribution.policy": "none"}
    every_second = federate(tiny(kept, {"num-server-rounds": 2})).run()
    every = federate(
        tiny(kept, {"num-server-rounds": 2, "aggregate-every": 1, "state-dir": str(tiny().state_dir) + "-other"})
    ).run()
    assert furthest(every, every_second) > 1e-5


def test_the_last_round_is_averaged_though_none_is_due(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny(PHASES, {"num-server-rounds": 3}))
    final = fed.run()
    assert [s.aggregated for s in fed.rounds] == [False, True, True]
    assert furthest(final, fed.start) > 0


def test_a_client_that_lost_its_proxy_starts_from_the_global_weights_and_says_so(
    tiny: Tiny, federate: Federate, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(PHASES, {"num-server-rounds": 2})
    seen = Recorder()

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order = TrainOrder.unpack(message.content)[0]
            if (order.round, order.shard) == (2, 1):
                shutil.rmtree(Path(config.state_dir) / "test" / "shard-0001")
        return seen(message, context)

    fed = federate(config, client)
    with caplog.at_level(logging.WARNING):
        fed.run()
    starts = {r.shard: (r.start, r.moments) for r in fed.rounds[1].reports}
    assert starts == {0: ("proxy", "carried"), 1: ("global", "fresh"), 2: ("proxy", "carried")}
    assert fed.rounds[1].row()["fresh_moments"] == 1
    assert fed.rounds[1].row()["shards"]["1"]["start"] == "global"  # type: ignore[index]
    assert "shard 1: no usable state of round 1" in caplog.text


def test_a_proxy_that_missed_an_average_does_not_go_on_from_before_it(tiny: Tiny, federate: Federate) -> None:
    """Shard 1 fails in the averaging round 2 and again in 3: its own weights of round 1 are out of date by then."""
    seen = Recorder()

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order = TrainOrder.unpack(message.content)[0]
            if order.shard == 1 and order.round in (2, 3):
                raise RuntimeError("away")
        return seen(message, context)

    fed = federate(tiny(PHASES, {"keep-checkpoints": 9}), client)
    fed.run()
    assert {r.shard: r.start for r in fed.rounds[3].reports} == {0: "proxy", 1: "global", 2: "proxy"}


# --- what the server learns -------------------------------------------------------------------------------------


def test_the_ledger_sums_up_what_the_reports_said(tiny: Tiny, federate: Federate) -> None:
    config = tiny({"agc.t-max": 1000, "num-server-rounds": 3, "local-epochs": 2})
    seen = Recorder()
    fed = federate(config, seen)
    fed.run()
    visits, skips = np.zeros(24, int), np.zeros(24, int)
    for report, _ in seen.replies:
        visits[report.ids] += report.visits
        skips[report.ids] += report.skips
    np.testing.assert_array_equal(fed.strategy.ledger.visits, visits)
    np.testing.assert_array_equal(fed.strategy.ledger.skips, skips)
    assert visits.sum() == 3 * 2 * 24
    last = {report.shard: report for report, _ in seen.replies}
    for k, state in enumerate(fed.strategy.shards):
        np.testing.assert_array_equal(state.bank_values, last[k].bank_values)
        assert state.bank_visits.sum() == sum(r.visits.sum() for r, _ in seen.replies if r.shard == k)


def test_orders_carry_what_the_ledger_knows(tiny: Tiny, federate: Federate) -> None:
    quarantine: dict[str, Scalar] = {"quarantine.share": 0.25, "quarantine.min-draws": 1, "local-epochs": 6}
    seen = Recorder()
    fed = federate(tiny(quarantine, {"num-server-rounds": 3, "redistribution.policy": "quarantine"}), seen)
    fed.run()
    first, last = ([o for _, o in seen.orders if o.round == n] for n in (1, 3))
    assert all((o.probability == 1).all() and np.isnan(o.log_ratio).all() for o in first)
    assert all(not o.bank_visits.any() for o in first)
    probability = np.concatenate([o.probability for o in last])
    assert 0 < (probability == 0.25).sum() <= 6
    assert set(probability.tolist()) == {0.25, 1.0}
    ratio = np.concatenate([o.log_ratio for o in last])
    assert np.nanmax(ratio[probability < 1]) < np.nanmin(ratio[probability == 1])
    assert all(o.bank_visits.any() for o in last)


def test_copies_share_one_images_visits_whatever_shards_they_are_in(tiny: Tiny, federate: Federate) -> None:
    canaries: dict[str, Scalar] = {"data.canaries": 1, "data.canary-repeats": 4, "shards": 2}
    for setting, expected in (("weight", 0.25), ("keep", 1.0)):
        seen = Recorder()
        config = tiny(canaries, {"data.duplicates": setting, "num-server-rounds": 1, "data.limit": 20})
        federate(config, seen).run()
        orders = [order for _, order in seen.orders]
        copies = np.isin(np.concatenate([o.ids for o in orders]), load_splits(config.data).canaries[0])
        probability = np.concatenate([o.probability for o in orders])
        assert (
            len({shard for shard, o in enumerate(orders) if np.isin(o.ids, load_splits(config.data).canaries).any()})
            == 2
        )
        np.testing.assert_allclose(probability[copies], expected)
        assert (probability[~copies] == 1).all()


def test_two_runs_with_one_seed_are_one(tiny: Tiny, federate: Federate) -> None:
    finals = [
        federate(tiny({"seed": seed, "num-server-rounds": 1, "state-dir": str(tiny().state_dir) + str(i)})).run()
        for i, seed in enumerate((5, 5, 6))
    ]
    assert_equal_states(finals[0], finals[1])
    assert furthest(finals[0], finals[2]) > 0
    assert torch.get_num_threads() == 1


def test_a_report_with_more_than_is_known_is_read_all_the_same(
    tiny: Tiny, federate: Federate, real_replies: dict[int, bytes]
) -> None:
    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            edited(REPORT, lambda items: items | {"news": Array(np.zeros(1))})(message, reply)
        return reply

    fed = federate(tiny(ONE_ROUND), client)
    fed.run()
    assert not fed.rounds[0].failures


def test_a_base_that_would_wait_for_ever_is_refused(tiny: Tiny, federate: Federate) -> None:
    with pytest.raises(ValueError, match="min_available_nodes=5"):
        federate(tiny(), base=FedAvg(min_available_nodes=5))
    # Flower's default minimum of two, although one node does the work of both shards
    federate(tiny({"num-server-rounds": 1}), nodes=1, base=FedAvg()).run()


def test_what_clients_answered_is_said_when_too_few_come(tiny: Tiny, federate: Federate) -> None:
    def client(message: Message, context: Context) -> Message:
        raise FileNotFoundError("photos is not a folder")

    with pytest.raises(FederationError, match="photos is not a folder"):
        federate(tiny(), client).run()
