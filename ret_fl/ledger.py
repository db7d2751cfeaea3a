"""The ledger: which shard owns which sample, and what is known of each sample.

The server alone writes it. Whatever happens to clients, replies or the server, every sample is in exactly one shard:
`shard` holds one number a sample, and moves are applied all together or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ret_fl.protocol import TrainReport

Ids = NDArray[np.int64]


class LedgerError(ValueError):
    """Moves or a report that do not fit the ledger. Nothing was changed."""


@dataclass(frozen=True)
class Moves:
    """Samples that change shard: ids int64 [m], from shard `source` int32 [m] to shard `target` int32 [m]."""

    ids: Ids
    source: NDArray[np.int32]
    target: NDArray[np.int32]

    @classmethod
    def none(cls) -> Moves:
        return cls.between(np.empty(0, np.int64), 0, 0)

    @classmethod
    def between(cls, ids: Ids, source: int, target: int) -> Moves:
        """All of `ids` go from one shard to another."""
        ids = np.asarray(ids, np.int64)
        return cls(ids, np.full(len(ids), source, np.int32), np.full(len(ids), target, np.int32))

    @classmethod
    def join(cls, parts: list[Moves]) -> Moves:
        if not parts:
            return cls.none()
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def without(self, taken: Ids) -> Moves:
        """The moves of samples not in `taken`."""
        rest = ~np.isin(self.ids, taken)
        return Moves(self.ids[rest], self.source[rest], self.target[rest])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class ShardLedger:
    """One row a sample, N in all; `num_shards` = K.

    shard: int32 [N] in [0, K). visits, skips: int64 [N], how often it was drawn and how often AGC skipped it.
    recent_visits, recent_skips: the same since the sample last moved (the paper's counters).
    draws: int64 [N] and log_ratio_sum: float64 [N], its log-ratios so far (ret_fl/mitigation/losslog.py).
    usual: float32 [N], its mean log-ratio early in training, when none is memorized; NaN until that is known.
    strength: float32 [N] in [0, 1], next-visit augmentation. probability: float32 [N] in (0, 1], of being visited, less
    in quarantine. copies: float32 [N], at least 1, by which orders divide it (`data.duplicates`); infinite: dropped.
    """

    shard: NDArray[np.int32]
    num_shards: int
    visits: Ids
    skips: Ids
    recent_visits: Ids
    recent_skips: Ids
    draws: Ids
    log_ratio_sum: NDArray[np.float64]
    usual: NDArray[np.float32]
    strength: NDArray[np.float32]
    probability: NDArray[np.float32]
    copies: NDArray[np.float32]

    @classmethod
    def start(cls, shard: NDArray[np.int32], num_shards: int) -> ShardLedger:
        """A fresh ledger with the given shards: int [N] in [0, num_shards)."""
        n = len(shard)

        def counter() -> Ids:
            return np.zeros(n, np.int64)

        ledger = cls(
            shard=np.asarray(shard, np.int32).copy(),
            num_shards=num_shards,
            visits=counter(),
            skips=counter(),
            recent_visits=counter(),
            recent_skips=counter(),
            draws=counter(),
            log_ratio_sum=np.zeros(n),
            usual=np.full(n, np.nan, np.float32),
            strength=np.zeros(n, np.float32),
            probability=np.ones(n, np.float32),
            copies=np.ones(n, np.float32),
        )
        ledger.check()
        return ledger

    def __len__(self) -> int:
        return len(self.shard)

    def ids(self, shard: int) -> Ids:
        """The samples of a shard, ascending: int64 [n]."""
        return np.flatnonzero(self.shard == shard).astype(np.int64)

    def sizes(self) -> Ids:
        """Samples in each shard: int64 [K]."""
        return np.bincount(self.shard, minlength=self.num_shards)

    def visited(self) -> NDArray[np.bool_]:
        """Which samples are ever visited: bool [N], false for dropped duplicates."""
        return np.isfinite(self.copies)

    def ordered(self) -> NDArray[np.float32]:
        """The probability of a visit that orders name for each sample: float32 [N] in [0, 1]."""
        return self.probability / self.copies

    def log_loss_ratio(self) -> NDArray[np.float32]:
        """Mean log-ratio of each sample over all its draws: float32 [N], NaN where there was none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.log_ratio_sum / self.draws).astype(np.float32)

    def settle_usual(self) -> None:
        """Take each sample's mean log-ratio so far for its usual one, for good; what has one keeps it."""
        self.usual = np.where(np.isnan(self.usual), self.log_loss_ratio(), self.usual)

    def skip_rate(self) -> NDArray[np.float64]:
        """Share of its visits at which each sample was skipped since it last moved: float64 [N]."""
        return self.recent_skips / np.maximum(self.recent_visits, 1)

    def check(self) -> None:
        """Raise `LedgerError` unless every sample is in exactly one of the K shards and every row is in range."""
        n = len(self.shard)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "num_shards" and value.shape != (n,):
                raise LedgerError(f"ledger column {f.name} has shape {value.shape}, expected ({n},)")
        if n and not (self.shard.min() >= 0 and self.shard.max() < self.num_shards):
            raise LedgerError(f"shard numbers must be in 0..{self.num_shards - 1}")
        if int(self.sizes().sum()) != n:
            raise LedgerError(f"shards hold {int(self.sizes().sum())} samples, the data has {n}")
        if not ((self.probability > 0) & (self.probability <= 1)).all():
            raise LedgerError("visit probabilities must be in (0, 1]")
        if not (self.copies >= 1).all():
            raise LedgerError("a sample has at least one copy, itself")
        if (self.skips > self.visits).any():
            raise LedgerError("a sample cannot be skipped more often than it was visited")

    def check_report(self, report: TrainReport) -> None:
        """Raise `LedgerError` if a report speaks of a shard or of samples that it does not own."""
        if not 0 <= report.shard < self.num_shards:
            raise LedgerError(f"report of shard {report.shard}, but shards are 0..{self.num_shards - 1}")
        for ids in (report.ids, report.memorized, report.high_loss):
            known = (ids >= 0) & (ids < len(self))
            foreign = ids[~known] if not known.all() else ids[self.shard[ids] != report.shard]
            if len(foreign):
                raise LedgerError(f"shard {report.shard} reports samples it does not own: {foreign[:5].tolist()}")
        if len(np.unique(report.ids)) != len(report.ids):
            raise LedgerError(f"shard {report.shard} reports a sample twice")
        if (report.skips > report.visits).any() or (report.visits < 0).any() or (report.skips < 0).any():
            raise LedgerError(f"shard {report.shard} reports impossible visit or skip counts")
        if (report.draws < 0).any() or not np.isfinite(report.log_ratio_sum).all():
            raise LedgerError(f"shard {report.shard} reports impossible losses")
        if np.isnan(report.strength).any():
            raise LedgerError(f"shard {report.shard} reports impossible augmentation strengths")

    def absorb(self, report: TrainReport) -> None:
        """Add what a client learned of its samples; refuses foreign samples, then changes nothing."""
        self.check_report(report)
        ids = report.ids
        self.visits[ids] += report.visits
        self.skips[ids] += report.skips
        self.recent_visits[ids] += report.visits
        self.recent_skips[ids] += report.skips
        self.draws[ids] += report.draws
        self.log_ratio_sum[ids] += report.log_ratio_sum
        self.strength[ids] = np.clip(report.strength, 0, 1)

    def check_moves(self, moves: Moves) -> None:
        """Raise `LedgerError` for moves of unknown, foreign or doubled samples, or to a shard that is not there."""
        ids = moves.ids
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= len(self):
            raise LedgerError(f"moves of unknown samples: {ids[(ids < 0) | (ids >= len(self))][:5].tolist()}")
        if len(np.unique(ids)) != len(ids):
            raise LedgerError("a sample cannot move twice at once")
        if (self.shard[ids] != moves.source).any():
            raise LedgerError(f"moves from shards that do not own them: {ids[self.shard[ids] != moves.source][:5]}")
        if moves.target.min() < 0 or moves.target.max() >= self.num_shards:
            told = np.unique(moves.target)
            raise LedgerError(f"shard numbers must be in 0..{self.num_shards - 1} (moves go to {told})")

    def apply(self, moves: Moves) -> None:
        """Move samples, all or none. Raises as `check_moves`."""
        self.check_moves(moves)
        ids = moves.ids
        if not len(ids):
            return
        after = self.shard.copy()
        after[ids] = moves.target
        replace(self, shard=after).check()
        self.shard = after
        self.recent_visits[ids] = 0
        self.recent_skips[ids] = 0

    def save(self, path: Path) -> None:
        """Write all columns to an .npz (no pickle), with log_loss_ratio for readers' convenience."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(file, log_loss_ratio=self.log_loss_ratio(), **columns)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> ShardLedger:
        """Read and check a ledger written by `save`; one of a version without `copies` and `usual` has none."""
        with np.load(path, allow_pickle=False) as saved:
            columns = {f.name: saved[f.name] for f in fields(cls) if f.name in saved and f.name != "num_shards"}
            columns.setdefault("copies", np.ones(len(saved["shard"]), np.float32))
            columns.setdefault("usual", np.full(len(saved["shard"]), np.nan, np.float32))
            ledger = cls(num_shards=int(saved["num_shards"]), **columns)
        ledger.check()
        return ledger
