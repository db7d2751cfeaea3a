"""What is kept of every round: checkpoint, row of metrics.jsonl, TensorBoard, losses of the averaged model.

Flower calls `evaluate_fn(round, arrays)` once the round's weights are final, whatever strategies are wrapped around
each other: that is the moment a round is recorded, and only then is it done.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from diffusers import ModelMixin
from flwr.app import ArrayRecord, MetricRecord
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from ret_fl.aggregation import base_state
from ret_fl.audit.leakage import auc_of_lower
from ret_fl.checkpoint import Checkpoint, save_checkpoint
from ret_fl.config import RunConfig
from ret_fl.data.sources import DataSplits
from ret_fl.data.store import SampleStore
from ret_fl.devices import resolve_device
from ret_fl.diffusion.objective import Objective
from ret_fl.diffusion.proxymodel import load_trained, open_model
from ret_fl.evaluation import fixed_losses
from ret_fl.files import as_line, write_atomically
from ret_fl.history import forget_phases_after, phase_of, save_phase
from ret_fl.ledger import ShardLedger
from ret_fl.packing import State, unpack_state
from ret_fl.privacy import PrivacyLog, Release, wrapper_of
from ret_fl.rounds import proxy_weights
from ret_fl.rundir import RunDir
from ret_fl.strategy import RedistributeEnsemble
from ret_fl.trainer import part_of

EVALUATED = 512
"""Images of each split whose loss is measured during training."""


def ema_state(weights: State) -> dict[str, torch.Tensor]:
    """The averaged weights, which are the model a run hands over."""
    return part_of(weights, "ema.")


def canaries_found(ledger: ShardLedger, canaries: NDArray[np.int64]) -> float | None:
    """How well the mean log-ratio, by which quarantine chooses, finds the canaries: an AUC in [0, 1], .5 is guessing.

    The share of pairs of a sample that holds a canary (canaries: int64 [n, repeats], IDs) and one that holds none in
    which the canary's is lower, ties counting half; samples without a loss on record are left out. None if one kind
    has none.
    """
    ratio, known = ledger.log_loss_ratio(), ledger.draws > 0
    is_canary = np.isin(np.arange(len(ledger)), canaries)
    inside, outside = (np.sort(ratio[part & known]) for part in (is_canary, ~is_canary))
    return auc_of_lower(inside, outside) if len(inside) and len(outside) else None


class RunRecorder:
    """Records rounds into a `RunDir`; give it to `Strategy.start` as evaluate_fn."""

    def __init__(self, run: RunDir, config: RunConfig, strategy: RedistributeEnsemble, data: DataSplits) -> None:
        self.run, self.config, self.strategy, self.data = run, config, strategy, data
        # the last average before this run was taken up again: what an uninterrupted one would remember
        self.evaluated = strategy.first_round - strategy.first_round % (config.aggregate_every or 1)
        self._forget_rounds_after(strategy.first_round)
        self.privacy = PrivacyLog(run.privacy)
        self.board = SummaryWriter(str(run.tensorboard), purge_step=strategy.first_round + 1)

    def _forget_rounds_after(self, round: int) -> None:
        """A resumed run does rounds again whose rows may be there already."""
        rows = [row for row in self.run.rows() if row["round"] <= round]
        write_atomically(self.run.metrics, "".join(map(as_line, rows)))
        forget_phases_after(self.run.history, round)

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Record the round Flower has just finished; 0 is the state before the first."""
        weights = unpack_state(arrays)
        if server_round == 0:
            if self.strategy.first_round == 0:
                self._checkpoint(0, weights)
            return None
        last = self.strategy.last
        assert last is not None, "aggregate_train comes before evaluate_fn"
        row = last.row() | self._privacy_spent() | self._canaries()
        if (last.aggregated or not self.config.averages) and self._evaluates(last.round):
            row |= self._losses(weights)
            self.evaluated = last.round
        save_phase(self.run.history, phase_of(last, self.strategy.ledger))
        # the row first: a round without checkpoint is done again and its row taken back, a lost row stays lost
        with self.run.metrics.open("a") as file:
            file.write(as_line(row))
            file.flush()
            os.fsync(file.fileno())
        self._checkpoint(last.round, weights)
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        metrics = {k: v for k, v in numbers.items() if math.isfinite(v)}
        for key, value in metrics.items():
            self.board.add_scalar(key, value, last.round)
        self.board.flush()
        return MetricRecord({**metrics})

    def _checkpoint(self, round: int, weights: State) -> None:
        s = self.strategy
        name, kept = self.config.aggregation.strategy, base_state(s.base)
        checkpoint = Checkpoint(
            round, s.run_key, s.fingerprint, weights, s.ledger, s.shards, s.frozen, name, kept, s.roster.home
        )
        save_checkpoint(self.run.checkpoints, checkpoint, self.config.keep_checkpoints)
        s.ledger.save(self.run.ledger)

    def _privacy_spent(self) -> dict[str, object]:
        """The release of the round, noted, and what all of them come to; nothing without differential privacy."""
        last, wrapper = self.strategy.last, wrapper_of(self.strategy.base)
        if wrapper is None or not self.config.private or last is None:
            return {}
        if last.aggregated:
            self.privacy.add(Release.of(wrapper, self.config, last.round))
        spent = self.privacy.epsilon(self.config.dp.delta)
        return {"epsilon": spent, "delta": self.config.dp.delta, "clipping_norm": wrapper.clipping_norm}

    def _evaluates(self, round: int) -> bool:
        """Every n rounds, or at the first average after that; and at the end."""
        every = self.config.evaluate_every
        return bool(every) and (round - round % every > self.evaluated or round == self.config.num_server_rounds)

    def _canaries(self) -> dict[str, object]:
        """How well losses tell the samples that stand there on purpose, if there are any."""
        canaries = self.data.canaries
        found = canaries_found(self.strategy.ledger, canaries) if canaries.shape[1] > 1 else None
        return {} if found is None else {"canary_auc": found}

    @cached_property
    def _measured(self) -> tuple[ModelMixin, Objective]:
        """A model to measure losses with; a run that measures none needs no memory for it."""
        device = resolve_device(self.config.device)
        model = open_model(self.config, self.data.train.image_shape, self.data.train.num_classes)
        return model.unet.to(device), model.objective(device)

    def _losses(self, weights: State) -> dict[str, object]:
        """Of the averaged model; of proxies kept apart the mean, each weighted by its samples."""
        unet, objective = self._measured
        splits = {"train_loss": self.data.train, "held_out_loss": self.data.held_out}
        if self.config.private:
            # differential privacy answers for what is told of training images, and this would go past it
            del splits["train_loss"]
        losses = {name: 0.0 for name, store in splits.items() if len(store)}
        for share, own in self._models(weights):
            load_trained(unet, ema_state(own))
            for name in losses:
                store = splits[name]
                losses[name] += share * float(fixed_losses(unet, objective, store, _spread(store)).mean())
        return dict(losses)

    def _models(self, weights: State) -> Iterator[tuple[float, State]]:
        """What the run has now, by share: one model, or K."""
        if self.config.averages:
            yield 1.0, weights
            return
        sizes = self.strategy.ledger.sizes()
        yield from zip((sizes / sizes.sum()).tolist(), proxy_weights(self.strategy.shards, weights), strict=True)

    def close(self) -> None:
        self.board.close()


def _spread(store: SampleStore) -> torch.Tensor:
    """Up to EVALUATED sample IDs, evenly over the store: int64."""
    return torch.from_numpy(np.linspace(0, len(store) - 1, min(EVALUATED, len(store))).astype(np.int64))
