"""Anti-Gradient Control: a sample whose loss is abnormally low for its timestep gives no gradient.

IET-AGC (Guan et al. 2024, arXiv 2407.15328) and its successor RET (arXiv 2502.09434). Despite the name nothing
ascends: low-loss samples are left out of the batch mean. For a batch of losses l at timesteps t,

    keep = mem_ratio * l >= bank[t]          bank read before the batch updates it
    L    = sum(l * keep) / sum(keep)
    bank[t] <- decay * bank[t] + (1 - decay) * l       every sample, kept or skipped, in batch order
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ret_fl.config import AgcConfig, ConfigError
from ret_fl.loading import load
from ret_fl.plugins import GATES

Gate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(loss float [B], t int64 [B], position in the shard int64 [B]) -> weight, bool [B] or float [B] in [0, 1]."""
WEIGHTS = (torch.bool, torch.float32)


class LossBank:
    """Exponential moving average of the loss at each timestep.

    values: float32 [bins]; visits: int64 [bins], how many losses each cell has seen. `bins` = 0 gives every
    timestep its own cell, as the paper does; fewer cells pool neighbouring timesteps. With `bias_correct` a cell's
    value is divided by 1 - decay^visits, which undoes the pull of the zero start.
    """

    def __init__(
        self,
        num_timesteps: int,
        decay: float = 0.8,
        *,
        bins: int = 0,
        bias_correct: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1 (got {num_timesteps})")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1) (got {decay})")
        if not 0 <= bins <= num_timesteps:
            raise ValueError(f"agc.bins must be between 0 and the {num_timesteps} timesteps (got {bins})")
        self.num_timesteps = num_timesteps
        self.decay = decay
        self.bias_correct = bias_correct
        self.values = torch.zeros(bins or num_timesteps, device=device)
        self.visits = torch.zeros(bins or num_timesteps, dtype=torch.int64, device=device)

    def cell(self, t: Tensor) -> Tensor:
        """The cell of each timestep: int64 [B]."""
        return t * len(self.values) // self.num_timesteps

    def value(self, t: Tensor) -> Tensor:
        """The usual loss at timesteps t (int64 [B], in [0, T)): float32 [B]; 0 where nothing was seen."""
        cell = self.cell(t)
        value = self.values[cell]
        if self.bias_correct:
            value = value / (1 - self.decay ** self.visits[cell].clamp(min=1))
        return value

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Take in losses (float [B]) seen at t (int64 [B]), as if one after the other in batch order.

        Exact and without a loop: a loss followed by r later ones of the same cell enters with (1 - decay) decay^r,
        and a cell hit m times keeps decay^m of its old value.
        """
        cell, order = self.cell(t).sort(stable=True)
        loss = loss.detach().to(self.values.dtype)[order]
        hits = torch.zeros_like(self.visits).index_add_(0, cell, torch.ones_like(cell))
        # sorted, the losses of a cell stand together and its last one at cumsum(hits) - 1
        later = hits.cumsum(0)[cell] - 1 - torch.arange(len(cell), device=cell.device)
        self.values.mul_(self.decay**hits)
        self.values.index_add_(0, cell, (1 - self.decay) * self.decay**later * loss)
        self.visits.add_(hits)


def keep_mask(loss: Tensor, bank_value: Tensor, mem_ratio: float) -> Tensor:
    """True where a sample trains: mem_ratio * loss >= bank_value. All of shape [B]."""
    return mem_ratio * loss >= bank_value


def gated_mean(loss: Tensor, keep: Tensor, max_rescale: float = 0.0) -> Tensor:
    """Mean of the kept losses (scalar); 0 if none is kept. Of weights in [0, 1] it is the weighted mean.

    Weights that sum to less than 1 are not scaled up. With `max_rescale` = c the few losses left of a batch of B weigh
    at most c/B each, instead of 1/kept.
    """
    return (loss * keep).sum() / gate_divisor(keep, max_rescale)


def gate_divisor(keep: Tensor, max_rescale: float = 0.0) -> Tensor:
    """What `gated_mean` divides the sum of the kept losses by: their number, or sum of weights (scalar), or more."""
    least = max(len(keep) / max_rescale, 1.0) if max_rescale > 0 else 1.0
    return keep.sum().clamp(min=least)


@dataclass(frozen=True)
class Seen:
    """What a gate may look at beside the losses of a batch of B from a shard of n.

    position: int64 [B], where the samples stand in the shard. bank: the usual loss at each timestep, before this
    batch. log_ratio: float32 [n], each sample's mean log-ratio over the rounds so far (NaN: unknown); usual: float32
    [n], the same over the first rounds alone, `agc.usual-share` of them (NaN before their end, too).
    """

    position: Tensor
    bank: LossBank
    log_ratio: Tensor
    usual: Tensor


def off(loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """Every sample trains."""
    return torch.ones_like(loss, dtype=torch.bool)


def agc(loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """The paper's: a sample whose loss is abnormally low for its timestep is skipped."""
    return keep_mask(loss, seen.bank.value(t), config.mem_ratio) | _free(t, seen, config)


def own(loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """Ours: a sample is skipped whose loss is abnormally low for its timestep and for itself.

    Its usual loss is what the bank tells times e^usual: how much easier or harder than others it was early in
    training, when none was memorized. So easy samples are not taken for memorized ones. Unknown ones train.
    """
    usual = seen.usual[seen.position]
    own_value = seen.bank.value(t) * usual.exp()
    return keep_mask(loss, own_value, config.mem_ratio) | usual.isnan() | _free(t, seen, config)


def _free(t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """Where the bank does not tell: bool [B]."""
    return (t >= config.t_max) | (seen.bank.visits[seen.bank.cell(t)] < config.min_visits)


class Sample:
    """A sample is skipped by its own history: the more often, the lower its log-ratio lies below the median."""

    def __init__(self) -> None:
        self.keep_probability: Tensor | None = None

    def __call__(self, loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
        if self.keep_probability is None:
            below = (seen.log_ratio - seen.log_ratio.nanmedian()).clamp(max=0)
            self.keep_probability = torch.exp(config.sharpness * below).nan_to_num(1.0)
        return (torch.rand_like(loss) < self.keep_probability[seen.position]) | (t >= config.t_max)


def random(loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """The control: samples are skipped by chance, agc.random-rate of them."""
    return (torch.rand_like(loss) >= config.random_rate) | (t >= config.t_max)


def make_gate(config: AgcConfig, bank: LossBank, log_ratio: Tensor, usual: Tensor) -> Gate:
    """The gate that `agc.mode` names, for one order; bank, log_ratio and usual as in `Seen`.

    Raises `ConfigError` as `ret_fl.loading.load`; so does the gate for weights of another shape or kind.
    """
    (plugin,) = load(GATES, config.mode, config.options)

    def gate(loss: Tensor, t: Tensor, position: Tensor) -> Tensor:
        weight = plugin.call(loss, t, Seen(position, bank, log_ratio, usual), config)
        if not isinstance(weight, Tensor) or weight.shape != loss.shape or weight.dtype not in WEIGHTS:
            told = (tuple(weight.shape), weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
            raise ConfigError(
                f"agc.mode={config.mode}: the gate must give one weight a sample, bool or float32 "
                f"{tuple(loss.shape)}, not {told}"
            )
        return weight

    return gate
