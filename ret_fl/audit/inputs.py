"""What an audit is given: real images, how to measure, and what is known of the model's training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.distances import MEMORY_MB
from ret_fl.audit.replication import require_threshold
from ret_fl.data.store import SampleStore

if TYPE_CHECKING:
    from ret_fl.audit.generate import Denoiser


@dataclass(frozen=True)
class AuditData:
    """The real images of an audit; their sizes must be those of the generated ones.

    source: what the report calls them. train: what the model was trained on, repeats included. reference: as many
    distinct real images never trained on, to calibrate the copy rate. held_out: further such images, for floors and
    quality. canaries: int64 [n, repeats], the rows of `train` that hold each image repeated on purpose. one_split:
    whether all sets come from one source, whose classes have the same numbers in each.
    """

    source: str
    train: SampleStore
    reference: SampleStore | None = None
    held_out: SampleStore | None = None
    canaries: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    one_split: bool = False


@dataclass(frozen=True)
class Options:
    """How an audit measures.

    threshold: calibrated ratio below which a sample is a copy. k: neighbours of MQ and Carlini's ratio; None: 50, or
    all training images where they are fewer. members: images of each side in membership inference, at most. auditors,
    auditor_options: plug-ins that measure more, as in `audit.auditors` and `audit.options`.
    """

    threshold: float = 0.3
    k: int | None = None
    members: int = 2000
    seed: int = 0
    device: torch.device | str = "cpu"
    memory_mb: int = MEMORY_MB
    auditors: str = "none"
    auditor_options: str = ""

    def __post_init__(self) -> None:
        """Raises as `require_threshold`."""
        require_threshold(self.threshold)


@dataclass(frozen=True)
class Evidence:
    """What a plug-in of `audit.auditors` may look at.

    model: where it lies. images: its own, float32 [N, C, H, W] in [0, 1]. data: the real images. denoiser: opens the
    model itself, its U-Net, noise schedule and fold factor; None where it has no losses or the audit leaves them alone.
    options: how to measure, the device and seed among it.
    """

    model: Path
    images: Tensor
    data: AuditData
    denoiser: Callable[[], Denoiser | None]
    options: Options


@dataclass(frozen=True)
class Background:
    """What is known of the model's training beside its weights; nothing for a model from elsewhere.

    groups: sample IDs (int64) by what training made of them, for the histograms of losses. rows: of metrics.jsonl.
    dropped: int64, the IDs of samples never trained on, as a copy of each was (`data.duplicates = drop`).
    """

    training: schema.Training | None = None
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()
    skip_by_timestep: tuple[np.ndarray, np.ndarray] | None = None
    dropped: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def distinct_rows(store: SampleStore) -> np.ndarray:
    """int64: the first row of every distinct image, ascending."""
    return np.sort(np.unique(store.content_hashes, return_index=True)[1])


def spread_rows(stores: Sequence[SampleStore], most: int) -> list[Tensor]:
    """int64 rows of each store: at most `most` distinct images in all, evenly spread over them all."""
    distinct = [torch.from_numpy(distinct_rows(store)) for store in stores]
    counts = [len(rows) for rows in distinct]
    chosen = torch.zeros(sum(counts), dtype=torch.bool)
    chosen[evenly_spread(len(chosen), most)] = True
    return [rows[part] for rows, part in zip(distinct, chosen.split(counts), strict=True)]


def evenly_spread(count: int, most: int) -> Tensor:
    """int64: at most `most` of 0..count-1, evenly spread."""
    return torch.from_numpy(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
