"""Where every sample was in every round, and how it fared there: history/round-00012.npz in a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ret_fl.ledger import ShardLedger
from ret_fl.rounds import RoundSummary


@dataclass(frozen=True)
class Phase:
    """One round. shard: int32 [N], the shard of each sample while it trained; visits, skips: uint32 [N], in this round,
    as far as reports tell (`report = full`: of all samples). lost: int32, shards that were not trained in it.
    """

    round: int
    shard: NDArray[np.int32]
    visits: NDArray[np.uint32]
    skips: NDArray[np.uint32]
    lost: NDArray[np.int32]


def phase_of(summary: RoundSummary, ledger: ShardLedger) -> Phase:
    """The round a summary is about; `ledger` is as that round left it, its moves made."""
    shard = ledger.shard.copy()
    shard[summary.moves.ids] = summary.moves.source
    visits, skips = np.zeros(len(ledger), np.uint32), np.zeros(len(ledger), np.uint32)
    for report in summary.reports:
        visits[report.ids], skips[report.ids] = report.visits, report.skips
    lost = sorted(set(range(ledger.num_shards)) - {report.shard for report in summary.reports})
    return Phase(summary.round, shard, visits, skips, np.array(lost, np.int32))


def save_phase(folder: Path, phase: Phase) -> None:
    """Write a round into the folder; one that was there is replaced."""
    folder.mkdir(exist_ok=True)
    path = _file(folder, phase.round)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, shard=phase.shard, visits=phase.visits, skips=phase.skips, lost=phase.lost)
    temporary.replace(path)


def read_phases(folder: Path) -> Iterator[Phase]:
    """Every round that is there, in order."""
    for path in sorted(folder.glob("round-*.npz")):
        with np.load(path, allow_pickle=False) as saved:
            columns = {name: saved[name] for name in ("shard", "visits", "skips", "lost")}
        yield Phase(round=int(path.stem.removeprefix("round-")), **columns)


@dataclass(frozen=True)
class SampleRound:
    """One sample in one round, as in `Phase`; trained: whether its shard was."""

    round: int
    shard: int
    visits: int
    skips: int
    trained: bool


def follow(folder: Path, sample: int) -> Iterator[SampleRound]:
    """One sample in every round that is there, in order; the samples of no more than one round are in memory."""
    for phase in read_phases(folder):
        shard = int(phase.shard[sample])
        counts = int(phase.visits[sample]), int(phase.skips[sample])
        yield SampleRound(phase.round, shard, *counts, trained=shard not in phase.lost)


def forget_phases_after(folder: Path, round: int) -> None:
    """Remove what a resumed run does again."""
    for path in folder.glob("round-*.npz"):
        if int(path.stem.removeprefix("round-")) > round:
            path.unlink()


def _file(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05d}.npz"
