"""ClientApp: take an order, train its proxy, report. The same in simulation and on separate machines.

A node may be started with its own settings (`flower-supernode --node-config`): `data-path`, `device` and
`state-dir` replace the run's on that node.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ret_fl.config import RunConfig
from ret_fl.data.partition import BY_SPEED
from ret_fl.data.sources import DataSplits, load_splits
from ret_fl.devices import resolve_device
from ret_fl.files import user_cache
from ret_fl.protocol import Hello, TrainOrder
from ret_fl.proxy import ProxyTrainer, train_proxy
from ret_fl.proxystate import ProxyFiles
from ret_fl.speed import images_per_second

app = ClientApp()


class WrongDataError(ValueError):
    """This node's data is not the data the order is about."""


def _on_this_node(config: RunConfig, context: Context) -> RunConfig:
    """The run's settings with what this node overrides."""
    node = context.node_config
    own = {"data.path": node.get("data-path"), "device": node.get("device"), "state-dir": node.get("state-dir")}
    changed = {key: value for key, value in own.items() if value is not None}
    return RunConfig.from_flat({**config.to_flat(), **changed}) if changed else config


def _data(config: RunConfig) -> DataSplits:
    return load_splits(config.data)


@lru_cache(maxsize=1)
def _trainer(config: RunConfig) -> ProxyTrainer:
    """One model a process, used again for every shard and round of a run."""
    store = _data(config).train
    return ProxyTrainer(config, store.image_shape, store.num_classes, resolve_device(config.device))


def _limit_threads(config: RunConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which partition, device and data this node has, and how fast it is where shards are dealt by speed."""
    config = _on_this_node(Hello.requested(message.content), context)
    store = _data(config).train
    partition = int(context.node_config.get("partition-id", -1))
    speed = 0.0
    if config.partition.sizes == BY_SPEED:
        _limit_threads(config)
        speed = images_per_second(_trainer(config), store.image_shape)
    answer = Hello(partition, str(resolve_device(config.device)), store.fingerprint, len(store), speed)
    return Message(answer.pack(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one shard for one round."""
    order, weights = TrainOrder.unpack(message.content)
    config = _on_this_node(order.config, context)
    _limit_threads(config)
    data = _data(config)
    if data.train.fingerprint != order.fingerprint:
        raise WrongDataError(
            f"the order is about data {order.fingerprint[:16]}, this node has {data.train.fingerprint[:16]}: check "
            "data.source, data.path and the files here"
        )
    files = ProxyFiles(Path(config.state_dir) if config.state_dir else user_cache("proxies"), order.run_key)
    state = files.load(order.shard, order.proxy_round)
    trained = train_proxy(_trainer(config), order, weights, data.train, data.kind, state)
    if config.optimizer.carry_moments or not order.upload:
        files.save(order.shard, order.round, trained.state, keep=config.keep_checkpoints)
    return Message(trained.report.pack(trained.weights if order.upload else None), reply_to=message)
