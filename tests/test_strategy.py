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
from conftest import PLAIN, Federation, fresh_weights, make_trainer
from federations import UNEQUAL, Recorder, assert_equal_states, furthest
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from ret_fl.config import RunConfig, Scalar
from ret_fl.data.partition import partition
from ret_fl.data.sources import load_splits
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import TrainOrder
from ret_fl.proxy import train_proxy
from ret_fl.proxystate import ProxyState
from simulations.inline import InlineGrid

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]
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
            np.full(n, np.nan, np.float32),
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
            np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(cells, np.float32),
            np.zeros(cells, np.int64),
        )  # fmt: skip
        weights = unpack_state(message.content["arrays"])
        trained = train_proxy(make_trainer(config), order, weights, data.train, data.kind, kept.get(k))
        kept[k] = trained.state
        metrics = MetricRecord({"num-examples": n})
        return Message(RecordDict({"arrays": pack_state(trained.weights), "metrics": metrics}), reply_to=message)

    grid = InlineGrid(app, 3, {})
    plain = FedAvg(fraction_evaluate=0.0).start(grid, pack_state(fresh_weights(config)), 3)
    # the mean of three is taken two at a time: the last bits differ, and training carries them on
    assert furthest(federate(config).run(), unpack_state(plain.arrays)) <= 1e-5


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


def test_a_base_that_would_wait_for_ever_is_refused(tiny: Tiny, federate: Federate) -> None:
    with pytest.raises(ValueError, match="min_available_nodes=5"):
        federate(tiny(), base=FedAvg(min_available_nodes=5))
    # Flower's default minimum of two, although one node does the work of both shards
    federate(tiny({"num-server-rounds": 1}), nodes=1, base=FedAvg()).run()
