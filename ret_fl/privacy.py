"""Differential privacy of whole shards: Flower's wrappers around the mean of proxies, and what they come to.

In a round every shard gives the change of its weights, clipped to L2 norm C, and the mean of K of them is released with
Gaussian noise of standard deviation z C / K (McMahan et al. 2018, arXiv 1710.06963). C may follow a quantile of the
norms, told from a count of clipped updates that has noise of its own (Andrew et al. 2021, arXiv 1905.03871).

Neighbours are runs that differ in one shard: its slot is empty in one of them, so that it adds nothing to the sum of
changes, and a half to the count of clipped ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase

from ret_fl.config import ConfigError, RunConfig
from ret_fl.files import read_lines, write_atomically

Wrapper = DifferentialPrivacyFixedClippingBase | DifferentialPrivacyAdaptiveBase


class _TowardsTheQuantile(DifferentialPrivacyAdaptiveBase):
    """What of Andrew et al. Flower 1.41 has otherwise: it lowers the norm when many are clipped, which clips more, and
    makes the noise of a round for the norm of the next."""

    _clipped_to = 0.0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._clipped_to = self.clipping_norm
        return super().aggregate_train(server_round, replies)  # type: ignore[safe-super]

    def _geometric_update(self, clipped_fraction: float) -> None:
        self.clipping_norm *= math.exp(self.clip_norm_lr * (clipped_fraction - self.target_clipped_quantile))

    def _add_noise_to_aggregated_arrays(self, aggregated: ArrayRecord) -> ArrayRecord:
        following, self.clipping_norm = self.clipping_norm, self._clipped_to
        noisy = super()._add_noise_to_aggregated_arrays(aggregated)
        self.clipping_norm = following
        return noisy


class ServerSideAdaptive(_TowardsTheQuantile, DifferentialPrivacyServerSideAdaptiveClipping):
    """The server clips, at a norm that follows a quantile."""


class ClientSideAdaptive(_TowardsTheQuantile, DifferentialPrivacyClientSideAdaptiveClipping):
    """Clients clip (ret_fl/clipping.py), at a norm that follows a quantile."""


def with_noise(mean: FedAvg, config: RunConfig) -> Strategy:
    """`mean` as `dp.mode` wants it wrapped. Raises `ConfigError` where the accountant is missing."""
    dp, shards = config.dp, config.shards
    if not config.private:
        return mean
    epsilon([dp.noise_multiplier], dp.delta)  # before hours of training rather than after
    if dp.mode == "server-fixed":
        return DifferentialPrivacyServerSideFixedClipping(mean, dp.noise_multiplier, dp.clipping_norm, shards)
    if dp.mode == "client-fixed":
        return DifferentialPrivacyClientSideFixedClipping(mean, dp.noise_multiplier, dp.clipping_norm, shards)
    adaptive = ServerSideAdaptive if dp.mode == "server-adaptive" else ClientSideAdaptive
    return adaptive(
        mean,
        dp.noise_multiplier,
        shards,
        initial_clipping_norm=dp.clipping_norm,
        target_clipped_quantile=dp.target_quantile,
        clip_norm_lr=dp.norm_rate,
        clipped_count_stddev=dp.count_noise or dp.noise_multiplier,
    )


def wrapper_of(base: Strategy) -> Wrapper | None:
    """The differential-privacy wrapper in a base strategy, if there is one."""
    inner: Strategy | None = base
    while inner is not None and not isinstance(inner, Wrapper):
        inner = getattr(inner, "strategy", None)
    return inner


@dataclass(frozen=True)
class Release:
    """Weights that left a round. noise_multiplier: that of one Gaussian mechanism that gives as much away.

    clipping_norm: the norm after the round, which a fixed one was clipped to and an adaptive one will be.
    """

    round: int
    mode: str
    noise_multiplier: float
    clipping_norm: float

    @classmethod
    def of(cls, wrapper: Wrapper, config: RunConfig, round: int) -> Release:
        multiplier = wrapper.noise_multiplier
        if isinstance(wrapper, DifferentialPrivacyAdaptiveBase):
            # the count changes by a half with a shard: twice its noise is its multiplier
            multiplier = joint([multiplier, 2 * wrapper.clipped_count_stddev])
        return cls(round, config.dp.mode, float(multiplier), float(wrapper.clipping_norm))


def joint(multipliers: Sequence[float]) -> float:
    """The noise multiplier of one Gaussian mechanism that gives away as much as several, one after the other.

    Exact: a Gaussian mechanism's privacy loss is Gaussian, and so is a sum of them (Dong et al., arXiv 1905.02383).
    """
    return sum(z**-2 for z in multipliers) ** -0.5


def epsilon(multipliers: Sequence[float], delta: float) -> float:
    """What releases with these noise multipliers come to at `delta`, by dp-accounting; 0 for none.

    Raises `ConfigError` if that is not installed.
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError:
        raise ConfigError("dp.mode needs dp-accounting: pip install 'ret-fl[dp]', or set dp.mode=off") from None
    return float(get_epsilon_gaussian(joint(multipliers), delta)) if multipliers else 0.0


class PrivacyLog:
    """privacy.jsonl: every release a run ever made. Rounds that are done again after a crash count again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, release: Release) -> None:
        """Write it down, on disk before the weights go anywhere."""
        lines = [json.dumps(asdict(one)) + "\n" for one in (*self.releases(), release)]
        write_atomically(self.path, "".join(lines))

    def releases(self) -> list[Release]:
        return [Release(**line) for line in read_lines(self.path)]

    def epsilon(self, delta: float) -> float:
        return epsilon([release.noise_multiplier for release in self.releases()], delta)
