"""The model a run hands over: one averaged pipeline, or the K proxies of a run that averaged nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ret_fl.config import RunConfig
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.ensemble import member_folder, write_ensemble
from ret_fl.diffusion.proxymodel import load_trained, open_model
from ret_fl.ledger import ShardLedger
from ret_fl.packing import State
from ret_fl.recorder import ema_state
from ret_fl.rounds import ShardState, proxy_weights


def save_model(
    folder: Path,
    config: RunConfig,
    train: SampleStore,
    weights: State,
    shards: Sequence[ShardState],
    ledger: ShardLedger,
) -> None:
    """Write what diffusers opens: a pipeline in `folder`, or, where nothing was averaged, one in each folder/shard-<k>.

    weights: the averaged ones, or the common start of proxies that were kept apart. train: what it was trained on.
    """
    model = open_model(config, train.image_shape, train.num_classes)
    if config.averages:
        load_trained(model.unet, ema_state(weights))
        model.save(folder)
        return
    for shard, own in enumerate(proxy_weights(shards, weights)):
        load_trained(model.unet, ema_state(own))
        model.save(member_folder(folder, shard))
    write_ensemble(folder, config.ensemble, ledger.sizes().tolist())
