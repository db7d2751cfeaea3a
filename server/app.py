"""ServerApp: settings -> data, ledger, strategy; rounds; final model and artefacts."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from ret_fl.aggregation import make_base, restore_base
from ret_fl.artefacts import finish
from ret_fl.checkpoint import Checkpoint, any_checkpoint, load_latest
from ret_fl.config import ConfigError, RunConfig
from ret_fl.data.clusters import Clusters, describe_clusters, find_clusters
from ret_fl.data.partition import BY_SPEED
from ret_fl.data.sources import DataSplits, deal, load_splits
from ret_fl.devices import limit_threads, resolve_device
from ret_fl.diffusion.models import check_pretrained_schedule
from ret_fl.diffusion.proxymodel import open_model, trained_parameters
from ret_fl.diffusion.text_to_image import data_read, frozen_part, require_captions
from ret_fl.dispatch import Dispatcher
from ret_fl.events import BEGUN, Journal
from ret_fl.ledger import ShardLedger
from ret_fl.loading import foreign_plugins, points_of, require_plugins
from ret_fl.packing import State, pack_state, unpack_state
from ret_fl.recorder import RunRecorder
from ret_fl.redistribution import parse_policy
from ret_fl.roster import Roster
from ret_fl.rundir import RunDir, is_deployed
from ret_fl.samples.grants import Signer
from ret_fl.samples.records import Description, hash_samples
from ret_fl.strategy import RedistributeEnsemble
from ret_fl.trainer import part_of, state_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, Redistribute Ensemble Training."""
    config = RunConfig.from_flat(context.run_config)
    if config.resume:
        run = RunDir.existing(config.resume)
        _warn_of_ignored(config, run.read_config())
    else:
        require_plugins(config)
        parse_policy(config.redistribution.policy, config.redistribution.options)
        make_base(config)
        run = RunDir.begin(config)
    with run.locked(config.wait_seconds):
        _conduct(grid, context, run)


def _conduct(grid: Grid, context: Context, run: RunDir) -> None:
    config = run.read_config()
    # a run that did not get as far as its first checkpoint is begun anew
    begun = any_checkpoint(run.checkpoints) or bool(run.rows())
    checkpoint: Checkpoint | None = load_latest(run.checkpoints) if begun else None
    require_plugins(config, points_of(dealt=checkpoint is not None))
    for told in foreign_plugins(config):
        log(INFO, "plug-in: %s", told)
    base = make_base(config)
    resolve_device(config.device)
    limit_threads(config.threads)
    check_pretrained_schedule(config.model, config.diffusion)
    log(INFO, "results: %s", run.path)

    data = load_splits(data_read(config))
    log(INFO, "data: %s", data.describe())
    require_captions(config, data.train)
    if checkpoint:
        _refuse_other_data(checkpoint, data)
        _refuse_other_model(checkpoint, config)
    _warn_of_mixing(config)
    journal = Journal(run.events, context.run_id)
    about = {"rounds": config.num_server_rounds, "shards": config.shards, "min_nodes": config.min_nodes}
    about["done"] = checkpoint.round if checkpoint else 0
    journal.note(BEGUN, deployed=is_deployed(), out=str(run.path), **about)
    roster = Roster(config, data.train.fingerprint, journal)
    grid = Dispatcher(grid, roster, config.retries, config.patience)
    roster.greet(grid)
    if checkpoint:
        strategy, weights = _resumed(config, data, roster, checkpoint, base)
    else:
        strategy, weights = fresh_strategy(config, data, roster, roster.alive(grid), base)
    recorder = RunRecorder(run, config, strategy, data)
    remaining = config.num_server_rounds - strategy.first_round
    arrays = pack_state(weights)
    del weights, checkpoint  # Flower keeps the first weights until the run ends: once is enough
    if remaining > 0:
        done = strategy.start(grid, arrays, remaining, timeout=config.round_timeout, evaluate_fn=recorder)
        arrays = done.arrays if config.averages else arrays
    recorder.close()
    finish(run, config, data, unpack_state(arrays), strategy.shards, strategy.ledger)
    log(INFO, "finished: %s", run.summary)


def _warn_of_ignored(asked: RunConfig, stored: RunConfig) -> None:
    """A resumed run goes by its own config.json; say so where `flwr run` was given something else."""
    defaults, kept = RunConfig().to_flat(), stored.to_flat()
    differs = [k for k, v in asked.to_flat().items() if v not in (defaults[k], kept[k]) and k not in ("resume", "out")]
    if differs:
        log(WARNING, "resuming: %s ignored, config.json decides (`ret-fl run --resume --set` changes it)", differs)


def fresh_strategy(
    config: RunConfig, data: DataSplits, roster: Roster, nodes: Sequence[int], base: Strategy | None = None
) -> tuple[RedistributeEnsemble, State]:
    """Strategy and first weights of a new run. nodes: those that are there, for shards as large as they are fast."""
    train = data.train
    dealt = config
    if config.partition.sizes == BY_SPEED:
        sizes = roster.sizes(config.shards, nodes)
        log(INFO, "shard sizes by speed: %s", sizes)
        dealt = config.model_copy(update={"partition": config.partition.model_copy(update={"sizes": sizes})})
    model = open_model(config, train.image_shape, train.num_classes)
    start = trained_parameters(model.unet)
    weights = state_of(start, start if config.ema.decay else None)
    strategy = RedistributeEnsemble(
        ShardLedger.start(deal(dealt, data), config.shards),
        config,
        fingerprint=train.fingerprint,
        clusters=_clusters(config, data),
        run_key=uuid.uuid4().hex,
        base=base,
        roster=roster,
        signer=_signer(config, data),
        frozen=model.frozen,
    )
    return strategy, weights


def _refuse_other_data(checkpoint: Checkpoint, data: DataSplits) -> None:
    if checkpoint.fingerprint != data.train.fingerprint:
        raise ConfigError(
            f"the run was made with data {checkpoint.fingerprint[:16]}, the same settings now give "
            f"{data.train.fingerprint[:16]}: the files behind data.path have changed"
        )


def _refuse_other_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    if checkpoint.frozen and checkpoint.frozen != frozen_part(config):
        raise ConfigError("model.init-from: the folder holds other weights than those the run was begun with")


def _resumed(
    config: RunConfig, data: DataSplits, roster: Roster, checkpoint: Checkpoint, base: Strategy
) -> tuple[RedistributeEnsemble, State]:
    log(INFO, "going on after round %d", checkpoint.round)
    roster.home = dict(checkpoint.home)
    if checkpoint.base == config.aggregation.strategy:
        restore_base(base, checkpoint.base_state)
    else:
        log(
            WARNING,
            "%s goes on from %s's weights, with no state of its own",
            config.aggregation.strategy,
            checkpoint.base or "an earlier version",
        )
    strategy = RedistributeEnsemble(
        checkpoint.ledger,
        config,
        fingerprint=checkpoint.fingerprint,
        clusters=_clusters(config, data),
        run_key=checkpoint.run_key,
        base=base,
        roster=roster,
        first_round=checkpoint.round,
        banks=checkpoint.shards,
        signer=_signer(config, data),
        frozen=checkpoint.frozen,
    )
    for shard in strategy.shards:
        if shard.weights is not None:
            shard.weights = pack_state(_with_ema(config, unpack_state(shard.weights)))
    return strategy, _with_ema(config, checkpoint.weights)


def _with_ema(config: RunConfig, weights: State) -> State:
    """Weights of a checkpoint as the run has them now: an EMA may have been turned on or off since."""
    return state_of(part_of(weights, "raw."), part_of(weights, "ema.") if config.ema.decay else None)


def _signer(config: RunConfig, data: DataSplits) -> Signer | None:
    """Signs orders for a sample service where the run has a key; a grant holds as long as its order."""
    key = config.service.signing_key
    if not key:
        return None
    known = Description.of(data.train, data.kind)
    return Signer(Path(key), config.round_timeout, known, hash_samples(data.train, known))


def _warn_of_mixing(config: RunConfig) -> None:
    """Proxies that are kept apart are often meant to be forgotten apart."""
    if not config.averages and config.redistribution.policy != "none":
        log(
            WARNING,
            "proxies stay apart, but redistribution.policy=%s lets what one shard's samples do reach other shards: set "
            "it to none if a sample must only ever touch its own proxy (docs/method.md)",
            config.redistribution.policy,
        )


def _clusters(config: RunConfig, data: DataSplits) -> Clusters | None:
    """Which samples are copies of one another, told to the log; None where nothing is done about them."""
    handling = config.data.duplicates
    used = handling != "keep" or config.partition.clusters != "any"
    looked_for = config.data if used else config.data.model_copy(update={"near_duplicates": "off"})
    told = find_clusters(data.train, looked_for, resolve_device(config.device))
    if found := describe_clusters(told):
        what = {"weight": "each is visited 1/copies as often", "drop": "only the first of each is visited"}
        log(WARNING, "duplicates: %s; %s (data.duplicates)", found, what.get(handling, "all are trained on"))
    return None if handling == "keep" else told
