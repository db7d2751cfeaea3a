"""What a proxy's losses say of its samples: who is memorized, who is badly fitted, how well the shard is fitted.

A loss means little without its timestep, so every loss is compared, in logs, with the usual loss of its shard at
neighbouring timesteps: the log-ratio. Averaged over a sample's draws at low noise (t < 0.4 T) it tells duplicated
samples from others with an AUC of .78 after one draw and .999 after twenty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 50
LOW_NOISE = 0.4
"""Log-ratios use timesteps below this share of T: at higher noise every sample looks alike."""


@dataclass(frozen=True)
class LossSummary:
    """Of the n samples of a shard over one phase.

    visits, skips: int64 [n]; draws: int64 [n], visits at low noise; log_ratio_sum: float64 [n], over these draws.
    bin_mean: float64 [BINS], mean log-loss of the shard at low noise; bin_count: int64 [BINS], its draws.
    level_draws, level_skips: int64 [BINS], draws and skips at every noise level, t from 0 to T.
    spread: standard deviation of a single log-ratio. loss: mean loss of all draws. skip_rate: share skipped.
    """

    visits: Tensor
    skips: Tensor
    draws: Tensor
    log_ratio_sum: Tensor
    bin_mean: Tensor
    bin_count: Tensor
    level_draws: Tensor
    level_skips: Tensor
    spread: float
    loss: float
    skip_rate: float


class LossLog:
    """Remembers every draw of a phase on the device, and sums it up at its end (one host sync in all)."""

    def __init__(self, samples: int, num_timesteps: int) -> None:
        self.samples = samples
        self.num_timesteps = num_timesteps
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def record(self, position: Tensor, t: Tensor, loss: Tensor, keep: Tensor) -> None:
        """position, t: int64 [B]; loss: float [B]; keep: bool [B]."""
        self.steps.append((position, t, loss.detach(), keep))

    def summary(self) -> LossSummary:
        position, t, loss, keep = (torch.cat(column).cpu() for column in zip(*self.steps, strict=True))

        def per_sample(values: Tensor, where: Tensor) -> Tensor:
            return torch.zeros(self.samples, dtype=values.dtype).index_add_(0, where, values)

        level = t * BINS // self.num_timesteps
        low = t < LOW_NOISE * self.num_timesteps
        cell = level[low]
        log_loss = loss[low].double().clamp(min=1e-30).log()
        count = torch.bincount(cell, minlength=BINS)
        mean = torch.zeros(BINS, dtype=torch.float64).index_add_(0, cell, log_loss) / count.clamp(min=1)
        log_ratio = log_loss - mean[cell]
        return LossSummary(
            visits=torch.bincount(position, minlength=self.samples),
            skips=per_sample((~keep).long(), position),
            draws=torch.bincount(position[low], minlength=self.samples),
            log_ratio_sum=per_sample(log_ratio, position[low]),
            bin_mean=mean,
            bin_count=count,
            level_draws=torch.bincount(level, minlength=BINS),
            level_skips=torch.bincount(level[~keep], minlength=BINS),
            spread=float(log_ratio.std()) if len(log_ratio) > 1 else 0.0,
            loss=float(loss.double().mean()),
            skip_rate=float((~keep).double().mean()),
        )
