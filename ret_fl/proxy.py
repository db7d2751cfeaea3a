"""Train one proxy on one shard for one round: the client's half of Redistribute Ensemble Training.

for each batch of the shard:
    t, noise  ~ U{0..T-1}, N(0, 1)
    l         = |eps_hat - noise|^2 per sample
    keep      = gate(l, t)                    AGC, ret_fl/mitigation/agc.py
    step on mean(l[keep]); EMA;               neither, if nothing was kept
    bank[t] <- l                              all samples, kept or not
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ret_fl.config import RunConfig
from ret_fl.data.store import Samples
from ret_fl.diffusion.models import build_unet, fold_factor
from ret_fl.diffusion.objective import Objective, make_scheduler
from ret_fl.mitigation import taa
from ret_fl.mitigation.agc import Gate, LossBank, gated_mean, make_gate
from ret_fl.mitigation.losslog import LossLog, LossSummary
from ret_fl.packing import State
from ret_fl.protocol import TrainOrder, TrainReport
from ret_fl.proxystate import Moments, ProxyState


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


class ProxyTrainer:
    """A U-Net, its EMA and its optimizer on one device, used again for every order of a run."""

    def __init__(
        self, config: RunConfig, image_shape: tuple[int, int, int], num_classes: int, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and native)
        fold = fold_factor(config.model, image_shape)
        self.objective = Objective(make_scheduler(config.diffusion), device, fold=fold, bf16=bf16)
        unet = build_unet(config.model, image_shape, num_classes, config.seed).to(device)
        self.unet = unet.to(memory_format=torch.channels_last) if self.objective.channels_last else unet
        self.forward: nn.Module = torch.compile(self.unet) if config.compile else self.unet  # type: ignore[assignment]
        self.ema = copy.deepcopy(self.unet).requires_grad_(False)
        self.parameter_pairs = list(self.ema.parameters()), [p.detach() for p in self.unet.parameters()]
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            fused=fused,
        )
        self.step_count = 0
        self.rate = config.optimizer.lr

    @torch.no_grad()
    def _update_ema(self, took_step: Tensor) -> None:
        # not torch's AveragedModel: its counter on the CPU costs a wait for the GPU at every step. The weight is a
        # tensor, so that a skipped batch leaves the EMA alone without asking the GPU either
        ema, current = self.parameter_pairs
        weight = (1 - self.config.ema.decay) * took_step
        difference = torch._foreach_sub(current, ema)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(ema, difference)

    def load(self, weights: State, moments: Moments | None) -> None:
        """Take over weights ('raw.*' and 'ema.*') and Adam's moments; without moments the warm-up starts anew."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in weights.items() if k.startswith(prefix)}

        self.unet.load_state_dict(part("raw."))
        self.ema.load_state_dict(part("ema."))
        self.optimizer.state.clear()
        self.step_count = moments.step if moments else 0
        if moments:
            # as the parameter lies in memory: fused AdamW pairs up elements by address, whatever the strides say
            for name, parameter in self.unet.named_parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(moments.updates), device=self.device),
                    "exp_avg": torch.empty_like(parameter).copy_(moments.first[name]).detach(),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(moments.second[name]).detach(),
                }

    def weights(self) -> State:
        """The raw and EMA weights as float32 arrays."""
        parts = {"raw.": self.unet, "ema.": self.ema}
        return {
            # a copy: on the CPU the tensor is the model itself, which trains on
            prefix + name: value.detach().cpu().contiguous().numpy().copy()
            for prefix, module in parts.items()
            for name, value in module.state_dict().items()
        }

    def moments(self) -> Moments:
        state = self.optimizer.state
        named = [(name, state[p]) for name, p in self.unet.named_parameters() if p in state]
        return Moments(
            step=self.step_count,
            updates=int(named[0][1]["step"]) if named else 0,
            first={name: s["exp_avg"].cpu() for name, s in named},
            second={name: s["exp_avg_sq"].cpu() for name, s in named},
        )

    def step(self, loss: Tensor, any_kept: Tensor) -> None:
        """Backward, clip, AdamW, EMA. Where nothing was kept (bool scalar) weights, moments and EMA stay."""
        settings = self.config.optimizer
        self.step_count += 1
        warm = min(1.0, self.step_count / settings.warmup_steps) if settings.warmup_steps else 1.0
        self.optimizer.param_groups[0]["lr"] = self.rate * warm
        took_step = any_kept.float()
        loss.backward()
        if settings.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.unet.parameters(), settings.grad_clip)
        if self.optimizer.defaults["fused"]:
            # the hook GradScaler uses: the fused kernel itself passes over the step, without a host sync
            self.optimizer.found_inf = 1 - took_step  # type: ignore[attr-defined]
            self.optimizer.step()
        elif any_kept:
            self.optimizer.step()
        self._update_ema(took_step)
        self.optimizer.zero_grad()


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
        self.gate: Gate = make_gate(agc, self.bank, torch.from_numpy(order.log_ratio).to(device))
        self.log = LossLog(len(order.ids), timesteps)
        self.strength = torch.tensor(order.strength, device=device)
        policy = self.config.taa.policy if self.config.taa.policy != "auto" else kind
        self.augment = taa.Augmenter(policy, self.config.taa.ops, self.config.taa.magnitude)  # type: ignore[arg-type]
        self.queue = taa.AugmentQueue(self.config.batch_size)
        self.images = 0

    def _losses(self, position: Tensor, strength: Tensor | None) -> tuple[Tensor, Tensor]:
        """Per-sample losses at fresh noise, of the images augmented where a strength is given: loss [B], t [B]."""
        x, labels = self.store.fetch(self.ids[position], self.trainer.device)
        if self.config.data.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        if strength is not None:
            x = self.augment(x, strength)
        objective = self.trainer.objective
        x = objective.folded(x)
        t, noise = objective.draw(x)
        labels = labels if self.config.model.class_conditional else None
        return objective.losses(self.trainer.forward, x, t, noise, labels), t

    @torch.no_grad()
    def warm_bank(self, rng: np.random.Generator) -> None:
        """Fill an empty bank with the losses of the model that training starts from: `agc.warm-passes` over the shard.

        Our choice: the authors fine-tune with a bank of zeros, which skips nothing before it is filled.
        """
        count = len(self.order.ids)
        for _ in range(self.config.agc.warm_passes):
            for position in np.array_split(rng.permutation(count), -(-count // self.config.batch_size)):
                loss, t = self._losses(torch.from_numpy(position), None)
                self.bank.update(t, loss)

    def batch(self, position: Tensor) -> None:
        """Train on one batch: int64 [B] positions in the shard, on the CPU."""
        where = position.to(self.trainer.device, non_blocking=True)
        mode, config = self.config.taa.mode, self.config
        with torch.set_grad_enabled(mode != "two-pass-all"):
            loss, t = self._losses(position, self.strength[where] if mode == "next-visit" else None)
        seen = loss.detach()
        keep = self.gate(seen, t, where)
        ratio = None
        if mode != "off":
            ratio = taa.threshold_ratio(seen, self.bank.value(t), config.agc.mem_ratio)
            # where AGC does not look, no loss is near its threshold
            ratio = ratio.masked_fill(t >= config.agc.t_max, torch.inf)
        self.log.record(where, t, seen, keep)
        self.bank.update(t, seen)
        if ratio is None or mode == "next-visit":
            trained = keep
        elif mode == "two-pass-band":
            trained = keep & (ratio >= config.taa.bar)
        else:
            trained = torch.zeros_like(keep)
        if mode != "two-pass-all":
            self.trainer.step(gated_mean(loss, trained, config.agc.max_rescale), trained.any())
            self.images += len(position)
        if ratio is not None:
            self._augment_later(position, where, ratio, keep, trained)

    def _augment_later(self, position: Tensor, where: Tensor, ratio: Tensor, keep: Tensor, trained: Tensor) -> None:
        strength = taa.strength(ratio, self.config.taa.kappa)
        if self.config.taa.mode == "next-visit":
            momentum = self.config.taa.momentum
            blended = momentum * self.strength[where] + (1 - momentum) * strength
            # a sample twice in one batch keeps one of its two new strengths, either is fine
            self.strength[where] = torch.where(ratio.isinf(), self.strength[where], blended)
            return
        waits = (keep & ~trained).cpu()
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
            loss, _ = self._losses(position, strength.to(device))
            self.trainer.step(loss.mean(), torch.ones((), dtype=torch.bool, device=device))
            self.images += len(position)


def train_proxy(
    trainer: ProxyTrainer,
    order: TrainOrder,
    weights: State,
    store: Samples,
    kind: str,
    state: ProxyState | None,
) -> TrainedProxy:
    """Train `order` starting from the global `weights`, or from this client's own proxy where the order says so.

    kind: 'glyph' or 'photo', what augmentation 'auto' means. state: what this client kept of the shard, if it has it.
    Raises `ProxyDivergedError` if the loss is not finite.
    """
    began = time.monotonic()
    config = trainer.config
    own = order.start == "proxy" and state is not None and state.weights is not None
    carried = state.moments if state is not None and config.optimizer.carry_moments else None
    trainer.load(state.weights if own and state and state.weights else weights, carried)
    trainer.rate = learning_rate(config, order.round)
    trainer.unet.train()
    seed = round_seed(config.seed, order.round, order.shard)
    rng = np.random.default_rng(seed)
    plan = visit_plan(order.probability, config.local_epochs * len(order.ids), rng)
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
    summary = round_.log.summary()
    if not np.isfinite(summary.loss):
        raise ProxyDivergedError(
            f"shard {order.shard}, round {order.round}: the loss is {summary.loss}. Lower optimizer.lr, raise "
            "optimizer.warmup-steps, or set precision=fp32"
        )
    new_weights = trainer.weights()
    report = _report(order, round_, summary, time.monotonic() - began, own, carried is not None)
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
        start="proxy" if own else "global",
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
