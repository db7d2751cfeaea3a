"""What carries orders out: train a shard's proxy, report. The same in simulation and on separate machines.

Loads torch and diffusers: clients/app.py imports it where an order is carried out, and no earlier. A node may be
started with its own settings (`flower-supernode --node-config`), which replace the run's there: `NODE_SETTINGS`.
"""

from __future__ import annotations

from functools import lru_cache
from logging import INFO, WARNING
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

import ret_fl.diffusion  # noqa: F401  before the others: see there
from ret_fl.clipping import clip_where_asked
from ret_fl.config import RunConfig
from ret_fl.data.partition import BY_SPEED
from ret_fl.deploy.nodeconfig import NODE_SETTINGS
from ret_fl.devices import resolve_device
from ret_fl.diffusion.text_to_image import data_read
from ret_fl.events import as_text
from ret_fl.files import user_cache
from ret_fl.loading import require_plugins
from ret_fl.plugins import AUGMENTERS, GATES
from ret_fl.protocol import Hello, TrainOrder
from ret_fl.proxy import train_proxy
from ret_fl.proxystate import ProxyFiles, ProxyState
from ret_fl.samples.access import open_access
from ret_fl.samples.records import Description
from ret_fl.speed import images_per_second
from ret_fl.trainer import ProxyTrainer

app = ClientApp()


CALLED_HERE = (GATES, AUGMENTERS)
"""The plug-in points of a client: without what they name here, it gets no work."""


class WrongDataError(ValueError):
    """This node's data, or pretrained model, is not the one the order is about."""


def _on_this_node(config: RunConfig, context: Context) -> RunConfig:
    """The run's settings with what this node overrides."""
    node = context.node_config
    changed = {setting: node[key] for key, setting in NODE_SETTINGS.items() if key in node}
    return RunConfig.from_flat({**config.to_flat(), **changed}) if changed else config


@lru_cache(maxsize=1)
def _trainer(config: RunConfig, known: Description) -> ProxyTrainer:
    """One model a process, used again for every shard and round of a run."""
    return ProxyTrainer(config, known.image_shape, known.num_classes, resolve_device(config.device))


def _limit_threads(config: RunConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)


def _keep(files: ProxyFiles, order: TrainOrder, state: ProxyState, rounds: int) -> None:
    """Keep a proxy's state for its next round. Raises `OSError` where that fails and its weights are not sent."""
    try:
        files.save(order.shard, order.round, state, keep=rounds)
    except OSError as error:
        if not order.upload:
            raise
        told = (
            "shard %d, round %d: Adam's moments cannot be kept (%s) and start fresh in the next round: make room "
            "there, or name another folder (state-dir in the node config)"
        )
        log(WARNING, told, order.shard, order.round, error)


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which partition, device and data this node has, and how fast it is where shards are dealt by speed."""
    config = _on_this_node(Hello.requested(message.content), context)
    require_plugins(config, CALLED_HERE)
    known = open_access(config.service, data_read(config)).describe()
    partition = int(context.node_config.get("partition-id", -1))
    speed = 0.0
    if config.partition.sizes == BY_SPEED:
        _limit_threads(config)
        speed = images_per_second(_trainer(config, known), known.image_shape)
    answer = Hello(partition, str(resolve_device(config.device)), known.fingerprint, known.samples, speed)
    return Message(answer.pack(), reply_to=message)


@app.train(mods=[clip_where_asked])
def train(message: Message, context: Context) -> Message:
    """Train one shard for one round."""
    order, weights = TrainOrder.unpack(message.content)
    config = _on_this_node(order.config, context)
    require_plugins(config, CALLED_HERE)
    _limit_threads(config)
    access = open_access(config.service, data_read(config))
    known = access.describe(order)
    if known.fingerprint != order.fingerprint:
        raise WrongDataError(
            f"the order is about data {order.fingerprint[:16]}, this node has {known.fingerprint[:16]}: check "
            "data.source, data.path and the files here, or those of its sample service"
        )
    trainer = _trainer(config, known)
    if trainer.model.frozen != order.frozen:
        raise WrongDataError(
            f"the pretrained weights in {config.model.init_from} are not those of the server: copy the same folder "
            "here (node config model-folder tells where it is)"
        )
    samples = access.samples(order)
    files = ProxyFiles(Path(config.state_dir) if config.state_dir else user_cache("proxies"), order.run_key)
    state = files.load(order.shard, order.proxy_round)
    where = {"run": context.run_id, "round": order.round, "shard": order.shard, "node": context.node_id}
    log(INFO, "%s", as_text("order begun", where | {"samples": len(order.ids)}))
    trained = train_proxy(trainer, order, weights, samples, known.kind, state)
    if config.optimizer.carry_moments or not order.upload:
        _keep(files, order, trained.state, config.keep_checkpoints)
    told = trained.report
    done = {"images": told.images, "seconds": told.seconds, "loss": told.loss, "skip_rate": told.skip_rate}
    log(INFO, "%s", as_text("order done", where | done))
    return Message(trained.report.pack(trained.weights if order.upload else None), reply_to=message)
