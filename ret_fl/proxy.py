"""Train one proxy on one shard for one round: the client's half of Redistribute Ensemble Training.

for each batch of the shard:
    t, noise  ~ U{0..T-1}, N(0, 1)
    l         = |eps_hat - noise|^2 per sample
    keep      = gate(l, t)                    AGC or a plug-in, ret_fl/mitigation/agc.py
    step on mean(l[keep]); EMA;               neither, if nothing was kept
    bank[t] <- l                              all samples, kept or not
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ret_fl.config import ConfigError, RunConfig
from ret_fl.data.store import Samples
from ret_fl.diffusion.objective import Change
from ret_fl.mitigation import taa
from ret_fl.mitigation.agc import Gate, LossBank, gate_divisor, gated_mean, make_gate
from ret_fl.mitigation.losslog import LossLog, LossSummary
from ret_fl.packing import State
from ret_fl.protocol import TrainOrder, TrainReport
from ret_fl.proxystate import ProxyState
from ret_fl.trainer import ProxyTrainer


class ProxyDivergedError(RuntimeError):
    """Training produced a loss that is not a number."""


@dataclass(frozen=True)
class TrainedProxy:
    """Outcome of a round on a client: what it uploads, tells, and keeps."""

    weights: State
    report: TrainReport
    state: ProxyState


def visit_plan(probability: NDArray[np.float32], visits: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which position of the shard is trained on when: int64 [visits].

    Passes over the shard in fresh random order; in each, a sample takes part with its probability (float32 [n],
    relative to the largest). The number of visits does not depend on the probabilities: what quarantined
    samples give up goes to the others, so methods are compared at equal images seen.
    """
    chance = probability / probability.max()
    passes: list[NDArray[np.int64]] = []
    planned = 0
    while planned < visits:
        order = rng.permutation(len(chance))
        passes.append(order[rng.random(len(chance)) < chance[order]])
        planned += len(passes[-1])
    return np.concatenate(passes)[:visits]


def round_seed(*parts: int) -> int:
    """A seed for this run seed, round and shard: well mixed, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])


def learning_rate(config: RunConfig, round: int) -> float:
    """AdamW's rate after warm-up in a round (1, 2, ...): the same for all shards, so that proxies can be averaged."""
    settings = config.optimizer
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 + math.cos(math.pi * (round - 1) / config.num_server_rounds)) / 2


@dataclass(frozen=True)
class Draw:
    """Samples with their timesteps and noise, as `Objective.losses` takes them; all on the device."""

    x0: Tensor
    condition: Tensor | None
    t: Tensor
    noise: Tensor

    def parts(self, size: int) -> Iterator[tuple[slice, Draw]]:
        """Consecutive parts of at most `size` samples, and where each is; 0: the whole in one."""
        count = len(self.t)
        for start in range(0, count, size or count):
            where = slice(start, min(start + (size or count), count))
            condition = None if self.condition is None else self.condition[where]
            yield where, Draw(self.x0[where], condition, self.t[where], self.noise[where])


class Round:
    """One order being trained: the batches, the gate, the bank and the log of losses."""

    def __init__(self, trainer: ProxyTrainer, order: TrainOrder, store: Samples, kind: str) -> None:
        self.trainer, self.order, self.store = trainer, order, store
        self.config = trainer.config
        device, agc = trainer.device, self.config.agc
        self.ids = torch.from_numpy(order.ids)
        timesteps = self.config.diffusion.timesteps
        self.bank = LossBank(timesteps, agc.decay, bins=agc.bins, bias_correct=agc.bias_correct, device=device)
        self.bank.values.copy_(torch.from_numpy(order.bank_values))
        self.bank.visits.copy_(torch.from_numpy(order.bank_visits))
        log_ratio, usual = (torch.from_numpy(column).to(device) for column in (order.log_ratio, order.usual))
        self.gate: Gate = make_gate(agc, self.bank, log_ratio, usual)
        self.easier = usual.exp().nan_to_num(1.0) if agc.mode == "own" else torch.ones_like(usual)
        self.log = LossLog(len(order.ids), timesteps)
        self.strength = torch.tensor(order.strength, device=device)
        self.sound = torch.ones((), dtype=torch.bool, device=device)
        self.augment = taa.make_augmenter(self.config.taa, kind)
        self.queue = taa.AugmentQueue(self.config.batch_size)
        self.images = 0

    def _change(self, strength: Tensor | None) -> Change | None:
        """What happens to drawn images, if anything: augmented where a strength is given, and noise."""
        noise = self.config.data.noise
        if strength is None and not noise:
            return None

        def change(images: Tensor) -> Tensor:
            if strength is not None:
                images = self.augment(images, strength)
            return images + noise * torch.randn_like(images) if noise else images

        return change

    def _draw(self, position: Tensor, strength: Tensor | None) -> Draw:
        """Samples (int64 [B] positions) at fresh noise, their images augmented where a strength is given."""
        objective = self.trainer.objective
        change = self._change(strength)
        mirrored = None
        if self.config.data.flip:
            mirrored = torch.rand(len(position), device=self.trainer.device) < 0.5
        x0, condition = objective.batch(self.store, self.ids[position], change, mirrored)
        return Draw(x0, condition, *objective.draw(x0))

    def _losses(self, draw: Draw) -> Tensor:
        """float32 [B], one a sample."""
        return self.trainer.objective.losses(self.trainer.forward, draw.x0, draw.t, draw.noise, draw.condition)

    def _train(self, draw: Draw, choose: Callable[[Tensor, slice], Tensor], max_rescale: float = 0.0) -> None:
        """A step on the gated mean of the losses by the weights that `choose` (losses, where in the draw) gives: [n].

        micro-batch parts one after the other give the gradients of their sums; the number kept is known after the last.
        """
        whole = not self.config.micro_batch or len(draw.t) <= self.config.micro_batch
        chosen = []
        for where, part in draw.parts(self.config.micro_batch):
            loss = self._losses(part)
            trained = choose(loss.detach(), where)
            self.trainer.backward(gated_mean(loss, trained, max_rescale) if whole else (loss * trained).sum())
            chosen.append(trained)
        every = torch.cat(chosen)
        self.trainer.step(every.any(), None if whole else gate_divisor(every, max_rescale))
        self.images += len(every)

    @torch.no_grad()
    def warm_bank(self, rng: np.random.Generator) -> None:
        """Fill an empty bank with the losses of the model that training starts from: `agc.warm-passes` over the shard.

        Samples that are never visited (probability 0) are left out.

        Our choice: the authors fine-tune with a bank of zeros, which skips nothing before it is filled. The U-Net stays
        in training mode: dropout is in the losses that the bank is compared with, so it must be in the bank.
        """
        visited = np.flatnonzero(self.order.probability)
        for _ in range(self.config.agc.warm_passes):
            for position in np.array_split(rng.permutation(visited), -(-len(visited) // self.config.batch_size)):
                draw = self._draw(torch.from_numpy(position), None)
                losses = [self._losses(part) for _, part in draw.parts(self.config.micro_batch)]
                self.bank.update(draw.t, torch.cat(losses))

    def batch(self, position: Tensor) -> None:
        """Train on one batch: int64 [B] positions in the shard, on the CPU."""
        where = position.to(self.trainer.device, non_blocking=True)
        mode, config = self.config.taa.mode, self.config
        draw = self._draw(position, self.strength[where] if mode == "next-visit" else None)
        seen = torch.empty(len(position), device=self.trainer.device)
        keep = torch.empty_like(seen, dtype=torch.bool)

        def choose(loss: Tensor, part: slice) -> Tensor:
            """Let the gate look at losses, and say which are trained on now."""
            weight = self._weigh(loss, draw.t[part], where[part])
            seen[part], keep[part] = loss, weight > 0
            return weight * (self._ratio(loss, draw.t[part], where[part]) >= config.taa.bar) if band else weight

        band = mode == "two-pass-band"
        if mode == "two-pass-all":
            with torch.no_grad():
                for part, samples in draw.parts(config.micro_batch):
                    choose(self._losses(samples), part)
        else:
            self._train(draw, choose, config.agc.max_rescale)
        ratio = self._ratio(seen, draw.t, where) if mode != "off" else None
        self.log.record(where, draw.t, seen, keep)
        self.bank.update(draw.t, seen)
        if ratio is not None:
            self._augment_later(position, where, ratio, keep & (ratio < config.taa.bar) if band else keep)

    def _weigh(self, loss: Tensor, t: Tensor, position: Tensor) -> Tensor:
        """What the gate makes of losses; weights outside of [0, 1] are noted, without asking the GPU at every step."""
        weight = self.gate(loss, t, position)
        if weight.is_floating_point():
            self.sound &= ((weight >= 0) & (weight <= 1)).all()
        return weight

    def _ratio(self, loss: Tensor, t: Tensor, position: Tensor) -> Tensor:
        """Of each loss to its threshold: float [B]. Where AGC does not look, no loss is near its threshold."""
        ratio = taa.threshold_ratio(loss, self.bank.value(t) * self.easier[position], self.config.agc.mem_ratio)
        return ratio.masked_fill(t >= self.config.agc.t_max, torch.inf)

    def _augment_later(self, position: Tensor, where: Tensor, ratio: Tensor, kept_back: Tensor) -> None:
        """kept_back: bool [B], for the two-pass modes, samples still to be trained on."""
        strength = taa.strength(ratio, self.config.taa.kappa)
        if self.config.taa.mode == "next-visit":
            momentum = self.config.taa.momentum
            blended = momentum * self.strength[where] + (1 - momentum) * strength
            # a sample twice in one batch keeps one of its two new strengths, either is fine
            self.strength[where] = torch.where(ratio.isinf(), self.strength[where], blended)
            return
        waits = kept_back.cpu()
        self.queue.push(position[waits], strength.cpu()[waits])
        self.train_waiting()

    def train_waiting(self, *, flush: bool = False) -> None:
        """Two-pass modes: train on augmented re-draws of the samples that wait for one.

        At the end (`flush`) a remainder of less than half a batch is let go: a full step on it would be mostly noise.
        """
        device = self.trainer.device
        for position, strength in self.queue.batches(flush=flush):
            if 2 * len(position) < self.config.batch_size and self.images:
                continue
            draw = self._draw(position, strength.to(device))
            self._train(draw, lambda loss, part: torch.ones_like(loss, dtype=torch.bool))


def train_proxy(
    trainer: ProxyTrainer,
    order: TrainOrder,
    weights: State,
    store: Samples,
    kind: str,
    state: ProxyState | None,
) -> TrainedProxy:
    """Train `order` starting from the `weights` sent along, or from this client's own proxy where the order says so.

    kind: 'glyph' or 'photo', what augmentation 'auto' means. state: what this client kept of the shard, if it has it.
    Raises `ProxyDivergedError` if the loss is not finite.
    """
    began = time.monotonic()
    config = trainer.config
    own = order.start == "proxy" and state is not None and state.weights is not None
    carried = state.moments if state is not None and config.optimizer.carry_moments else None
    trainer.load(state.weights if own and state and state.weights else weights, carried)
    trainer.rate = learning_rate(config, order.round)
    trainer.stay_near(weights)
    trainer.unet.train()
    trainer.objective.prepare(store, torch.from_numpy(order.ids), mirrored=config.data.flip)
    seed = round_seed(config.seed, order.round, order.shard)
    rng = np.random.default_rng(seed)
    plan = visit_plan(order.probability, config.visits(len(order.ids)), rng)
    steps = -(-len(plan) // config.batch_size)
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        round_ = Round(trainer, order, store, kind)
        if not order.bank_visits.any():
            round_.warm_bank(rng)
        # near-equal batches: a last batch of a single image would be a full step on its noise
        for position in np.array_split(plan, steps):
            # two-pass modes train some draws twice: they stop at the same number of images
            if round_.images >= len(plan):
                break
            round_.batch(torch.from_numpy(position))
        round_.train_waiting(flush=True)
    if not round_.sound:
        raise ConfigError(f"agc.mode={config.agc.mode}: the gate gave weights that do not lie in [0, 1]")
    summary = round_.log.summary()
    if not np.isfinite(summary.loss):
        raise ProxyDivergedError(
            f"shard {order.shard}, round {order.round}: the loss is {summary.loss}. Lower optimizer.lr, raise "
            "optimizer.warmup-steps, or set precision=fp32"
        )
    new_weights = trainer.weights()
    report = _report(order, round_, summary, time.monotonic() - began, own, carried is not None)
    if config.private:
        report = report.silenced(order)
    kept = ProxyState(trainer.moments(), None if order.upload else new_weights)
    return TrainedProxy(new_weights, report, kept)


def _report(
    order: TrainOrder, round_: Round, summary: LossSummary, seconds: float, own: bool, carried: bool
) -> TrainReport:
    config = round_.config
    ids = order.ids
    visits, skips, draws = (x.numpy() for x in (summary.visits, summary.skips, summary.draws))
    ratio_sum = summary.log_ratio_sum.numpy()
    skip_score = skips / np.maximum(visits, 1)
    ratio = np.where(draws > 0, ratio_sum / np.maximum(draws, 1), -np.inf)
    tail = max(1, round(config.report_tail * len(ids)))
    low = np.argsort(-skip_score, kind="stable")[:tail]
    low = low[skips[low] > 0]
    high = np.argsort(-ratio, kind="stable")[:tail]
    high = high[draws[high] > 0]
    told = np.arange(len(ids)) if config.report == "full" else np.union1d(low, high)
    return TrainReport(
        shard=order.shard,
        round=order.round,
        num_examples=len(ids),
        images=round_.images,
        seconds=seconds,
        loss=summary.loss,
        skip_rate=summary.skip_rate,
        spread=summary.spread,
        start="proxy" if own else "sent" if order.start == "sent" else "global",
        moments="carried" if carried else "fresh",
        ids=ids[told],
        visits=visits[told],
        skips=skips[told],
        draws=draws[told],
        log_ratio_sum=ratio_sum[told],
        strength=round_.strength.cpu().numpy()[told],
        memorized=ids[low],
        memorized_score=skip_score[low].astype(np.float32),
        high_loss=ids[high],
        high_loss_score=ratio[high].astype(np.float32),
        bank_values=round_.bank.values.cpu().numpy(),
        bank_visits=round_.bank.visits.cpu().numpy(),
        bin_mean=summary.bin_mean.numpy(),
        bin_count=summary.bin_count.numpy(),
        level_draws=summary.level_draws.numpy(),
        level_skips=summary.level_skips.numpy(),
    )
