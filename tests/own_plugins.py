"""Plug-ins of the tests, sound ones and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ret_fl.audit.inputs import Evidence
from ret_fl.config import AgcConfig, PartitionConfig, RedistributionConfig, TaaConfig
from ret_fl.ledger import Moves, ShardLedger
from ret_fl.mitigation.agc import Seen, keep_mask
from ret_fl.protocol import TrainReport

Labels = np.ndarray | None


class First:
    """The first samples of each shard go to the next."""

    class Settings(BaseModel):
        count: int = Field(1, ge=1, description="How many go.")
        from_shard: int = Field(-1, description="Only from this shard; -1: from all.")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(
        self,
        ledger: ShardLedger,
        reports: Sequence[TrainReport],
        rng: np.random.Generator,
        config: RedistributionConfig,
    ) -> Moves:
        givers = range(ledger.num_shards) if self.settings.from_shard < 0 else [self.settings.from_shard]
        return Moves.join(
            [Moves.between(ledger.ids(k)[: self.settings.count], k, (k + 1) % ledger.num_shards) for k in givers]
        )


class Demanding(First):
    """As First, with one setting more, that has no default."""

    class Settings(First.Settings):
        goal: str = Field(description="Which goal.")


def bad_moves(
    ledger: ShardLedger, reports: Sequence[TrainReport], rng: np.random.Generator, config: RedistributionConfig
) -> Any:
    """Samples of shard 0, said to be in shard 1."""
    return Moves.between(ledger.ids(0), 1, 0)


def no_moves(
    ledger: ShardLedger, reports: Sequence[TrainReport], rng: np.random.Generator, config: RedistributionConfig
) -> Any:
    """No moves but a list."""
    return []


def same_as_agc(loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """AGC, in weights of 0 and 1."""
    return (keep_mask(loss, seen.bank.value(t), config.mem_ratio) | (t >= config.t_max)).float()


class Constant:
    """Every sample weighs the same."""

    class Settings(BaseModel):
        weight: float = 0.5

    def __init__(self, settings: Settings) -> None:
        self.weight = settings.weight

    def __call__(self, loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
        return torch.full_like(loss, self.weight)


class Alternating:
    """The first batch of an order trains, the second does not, and so on: a gate that remembers, within a round."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
        self.calls += 1
        return torch.full_like(loss, self.calls % 2, dtype=torch.bool)


def one_weight(loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
    """One weight for the whole batch."""
    return loss.new_ones(())


class Shift:
    """Moves images by one pixel to the right, where their strength is not 0."""

    def __call__(self, images: Tensor, strength: Tensor, config: TaaConfig) -> Tensor:
        return torch.where(strength[:, None, None, None] > 0, images.roll(1, -1), images)


def cropped(images: Tensor, strength: Tensor, config: TaaConfig) -> Tensor:
    """Images of another size."""
    return images[..., 1:]


class Dealt:
    """A rule for each way of dealing samples well or badly."""

    class Settings(BaseModel):
        how: str = "in turn"

    def __init__(self, settings: Settings) -> None:
        self.how = settings.how

    def __call__(
        self, num_samples: int, labels: Labels, shards: int, config: PartitionConfig, rng: np.random.Generator
    ) -> Any:
        rows = np.arange(num_samples)
        return {
            "in turn": rows % shards,
            "shares": rows / num_samples,
            "too many": rows,
            "too few": rows[1:] % shards,
            "below": rows % shards - 1,
            "one": rows * 0,
        }[self.how]


class Count:
    """Counts images."""

    class Settings(BaseModel):
        fail: bool = False

    def __init__(self, settings: Settings) -> None:
        self.fail = settings.fail

    def __call__(self, evidence: Evidence) -> dict[str, float]:
        if self.fail:
            raise KeyError("nothing counted")
        opened = evidence.denoiser()
        return {
            "samples": len(evidence.images),
            "training images": len(evidence.data.train),
            "parameters": np.nan if opened is None else sum(p.numel() for p in opened[0].parameters()),
        }


class Unmakeable(Count):
    """Cannot be made."""

    def __init__(self, settings: Count.Settings) -> None:
        raise RuntimeError("no luck")


class PlainSettings(Count):
    """Its Settings are no pydantic model."""

    Settings = dict  # type: ignore[assignment]


class Uncallable:
    """Has no __call__."""


made: list[str] = []


class OfAnotherPoint:
    """Takes other things; that it was made is remembered."""

    def __init__(self) -> None:
        made.append("made")

    def __call__(self, anything: object) -> None:
        made.append("called")
