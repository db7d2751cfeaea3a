"""Results of a study: one row for every trained and audited point, and what they say over seeds.

A results file is JSON lines. Its first line holds the defaults every setting had when the file was begun, each other
line one `Row`, whose settings are those that differ. So a row is told from a stale one even after defaults changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import stdtrit

from ret_fl.audit.schema import Audit, Interval
from ret_fl.audit.whitened import WhitenedPixels
from ret_fl.config import RunConfig, Scalar
from ret_fl.files import write_atomically

LOCAL = (
    "name", "out", "resume", "state-dir", "data.cache-dir", "device", "threads", "keep-checkpoints", "min-nodes",
    "wait-seconds", "round-timeout", "retries", "patience", "audit.auditors", "audit.options",
)  # fmt: skip
"""Settings that say where and how a run is made, not what comes out."""


class Row(BaseModel):
    """One model of a study, audited. Shares lie in [0, 1]; intervals of one row are those of its audit.

    share: the images seen over those of the study's whole training. settings: those off the file's defaults.
    similarity: the 95th percentile in whitened pixels, None in rows made before it was measured.
    canary_auc: how well losses in training found the canaries (`canaries_found`); None where that was not recorded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    dataset: str
    method: str
    seed: int
    share: float
    images: int
    settings: dict[str, Scalar]
    rounds: int
    skip_rate: float
    moved: int
    quarantined: int
    mq_15: float
    mq_15_floor: float | None
    cr: Interval
    cr_floor: Interval
    cr_shift: float
    canary_copies: float
    distinct: int
    fd: float
    kid: float
    precision: float
    recall: float
    confident: float | None
    fd_real: float | None
    precision_real: float | None
    auc: float | None
    similarity: float | None = None
    similarity_floor: float | None = None
    seconds: float
    canary_auc: float | None = None

    @property
    def cell(self) -> tuple[str, str, int]:
        return self.dataset, self.method, self.seed


def measured(audit: Audit, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a `Row` keeps of a run's audit and of its metrics.jsonl. Raises `ValueError` where the audit lacks it."""
    rates = {rate.variant: rate for rate in audit.replication.copy_rates}
    if "pixels" not in rates or rates["pixels"].floor is None or not audit.fidelity or audit.training is None:
        raise ValueError(
            "a study needs copy rate, held-out floor and fidelity: keep data.reference on and data.held-out above 0, "
            "and draw at least a few samples"
        )
    quality, pixels = audit.fidelity[0], rates["pixels"]
    low = next((m for m in audit.replication.memorized if math.isclose(m.tau, 0.15)), None)
    alike = next((s for s in audit.similarity if s.features == WhitenedPixels.name), None)
    by_loss = [m for m in audit.leakage.membership if m.attack == "loss"] if audit.leakage else []
    return {
        "images": audit.training.images,
        "rounds": audit.training.rounds,
        "skip_rate": audit.training.skip_rate,
        "moved": audit.training.moved,
        "quarantined": rows[-1]["quarantined"],
        "mq_15": low.generated if low else math.nan,
        "mq_15_floor": low.floor if low else None,
        "cr": pixels.rate,
        "cr_floor": pixels.floor,
        "cr_shift": rates["shift"].rate.value if "shift" in rates else pixels.rate.value,
        "canary_copies": pixels.canary or 0.0,
        "distinct": pixels.distinct,
        "fd": quality.frechet,
        "kid": quality.kid,
        "precision": quality.precision,
        "recall": quality.recall,
        "confident": quality.confident,
        "fd_real": quality.real_frechet,
        "precision_real": quality.real_precision,
        "auc": by_loss[0].auc.value if by_loss else None,
        "similarity": alike.percentile_95 if alike else None,
        "similarity_floor": alike.floor_percentile_95 if alike else None,
        "seconds": sum(row["seconds"] for row in rows),
        "canary_auc": rows[-1].get("canary_auc"),
    }


class ResultsFile:
    """The rows of one study on disk; a row of the same cell and share replaces an earlier one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        # a half-written last line cannot be: the file is written whole
        self.defaults: dict[str, Scalar] = json.loads(lines[0])["defaults"] if lines else _training(RunConfig())
        self.rows = [Row.model_validate_json(line) for line in lines[1:]]

    def difference(self, config: RunConfig) -> dict[str, Scalar]:
        """The settings of `config` that differ from the file's defaults; a newer setting counts only off its own."""
        before = _training(RunConfig()) | self.defaults
        return {k: v for k, v in _training(config).items() if before.get(k) != v}

    def find(self, cell: tuple[str, str, int], share: float, config: RunConfig) -> Row | None:
        """The row of that cell and share if it was made with these settings, and as long; idle settings may differ."""
        for row in self.rows:
            own = row.cell == cell and math.isclose(row.share, share) and row.rounds == config.num_server_rounds
            if own and _at_work(self._settings(row)) == _at_work(_training(config)):
                return row
        return None

    def _settings(self, row: Row) -> dict[str, Scalar]:
        """All settings a row of this file was made with; those of today that it does not know have their defaults."""
        today = _training(RunConfig())
        return {k: v for k, v in (today | self.defaults | row.settings).items() if k in today}

    def take(self, other: ResultsFile) -> None:
        """Take in the rows of another file, whose defaults may be others."""
        before = _training(RunConfig()) | self.defaults
        for row in other.rows:
            settings = {k: v for k, v in other._settings(row).items() if before.get(k) != v}
            self.add([row.model_copy(update={"settings": settings})])

    def add(self, rows: Sequence[Row]) -> None:
        """Take in rows and write the file, sorted so that versions of it compare line by line."""
        for row in rows:
            self.rows = [r for r in self.rows if not (r.cell == row.cell and math.isclose(r.share, row.share))]
            self.rows.append(row)
        self.rows.sort(key=lambda r: (*r.cell, r.share))
        lines = [json.dumps({"defaults": self.defaults}), *(row.model_dump_json() for row in self.rows)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "\n".join(lines) + "\n")


def _training(config: RunConfig) -> dict[str, Scalar]:
    """The settings that decide what comes out; the seed and the length are a row's own."""
    own = (*LOCAL, "seed", "num-server-rounds")
    return {k: v for k, v in config.to_flat().items() if k not in own and not k.startswith("service.")}


def same_training(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configs, but for seed and length, come to the same training; idle settings may differ."""
    return _at_work(_training(one)) == _at_work(_training(other))


def _at_work(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Settings without those that do nothing beside the others."""
    policy = str(settings["redistribution.policy"]).split("+")
    seen = settings["data.duplicates"] != "keep" or settings["partition.clusters"] != "any"
    idle = {
        "data.near-": not seen or settings["data.near-duplicates"] == "off",
        "data.canary-": settings["data.canaries"] == 0,
        "agc.": settings["agc.mode"] == "off",
        "taa.": settings["taa.mode"] == "off",
        "quarantine.": "quarantine" not in policy,
        "redistribution.": policy == ["none"],
        "dp.": settings["dp.mode"] == "off",
        "ensemble": settings["aggregate-every"] != 0,
    }
    keep = ("agc.mode", "taa.mode", "redistribution.policy", "dp.mode")
    return {k: v for k, v in settings.items() if k in keep or not any(k.startswith(p) and idle[p] for p in idle)}


# Over seeds


@dataclass(frozen=True)
class Point:
    """Rows of one method at one share, all seeds."""

    rows: Sequence[Row]

    @property
    def share(self) -> float:
        return self.rows[0].share

    def mean(self, value: Callable[[Row], float | None]) -> float:
        """Mean over seeds; NaN where nothing was measured."""
        found = [v for row in self.rows if (v := value(row)) is not None]
        return float(np.mean(found)) if found else math.nan

    def interval(self, value: Callable[[Row], float | None]) -> tuple[float, float] | None:
        """95 % Student interval of the mean over seeds; None for fewer than two."""
        found = [v for row in self.rows if (v := value(row)) is not None]
        if len(found) < 2:
            return None
        half = float(stdtrit(len(found) - 1, 0.975) * np.std(found, ddof=1) / math.sqrt(len(found)))
        return float(np.mean(found)) - half, float(np.mean(found)) + half

    @property
    def cr(self) -> float:
        return self.mean(lambda r: r.cr.value)

    @property
    def fd(self) -> float:
        return self.mean(lambda r: r.fd)

    @property
    def precision(self) -> float:
        return self.mean(lambda r: r.precision)


def cr_interval(point: Point) -> tuple[float, float]:
    """Interval of the copy rate: over seeds where there are several, else that of the one audit; within [0, 1]."""
    found = point.interval(lambda r: r.cr.value)
    low, high = found if found else (point.rows[0].cr.low, point.rows[0].cr.high)
    return max(0.0, low), min(1.0, high)


def curve(rows: Sequence[Row], dataset: str, method: str) -> list[Point]:
    """The points of a method on a dataset along its training, each with all the seeds that got that far.

    Points of fewer seeds than the whole training's are left out: a mean over other seeds is no point of the curve.
    """
    own = [r for r in rows if r.dataset == dataset and r.method == method]
    shares = sorted({round(r.share, 6) for r in own})
    points = [Point([r for r in own if math.isclose(r.share, share, abs_tol=1e-6)]) for share in shares]
    most = len(at_share(points, 1.0).rows) if any(math.isclose(p.share, 1) for p in points) else 1
    return [point for point in points if len(point.rows) >= most or point.share > 1]


def at_share(points: Sequence[Point], share: float) -> Point:
    """The point of a curve at that share. Raises `KeyError` if there is none."""
    found = next((p for p in points if math.isclose(p.share, share, abs_tol=1e-6)), None)
    if found is None:
        raise KeyError(f"no point at {share:g} of the images")
    return found


def own_seeds(point: Point) -> set[int]:
    """The seeds that a point has rows of."""
    return {row.seed for row in point.rows}


def of_seeds(points: Sequence[Point], seeds: set[int]) -> list[Point]:
    """The points of a curve that have rows of all these seeds, of theirs alone."""
    return [Point([r for r in p.rows if r.seed in seeds]) for p in points if seeds <= own_seeds(p)]


def at_precision(points: Sequence[Point], precision: float) -> tuple[float, float, float] | None:
    """(share, copy rate, Frechet distance) where a curve first reaches a precision, between its points on a line."""
    before: Point | None = None
    for point in points:
        if point.precision >= precision:
            if before is None:
                return point.share, point.cr, point.fd
            weight = (precision - before.precision) / (point.precision - before.precision)
            pairs = ((before.share, point.share), (before.cr, point.cr), (before.fd, point.fd))
            share, cr, fd = (a + weight * (b - a) for a, b in pairs)
            return share, cr, fd
        before = point
    return None


def early_stop_fd(central: Sequence[Point], cr: float) -> float:
    """The best Frechet distance central training has while it copies no more than `cr`.

    Its checkpoints, and the lines between them; before the first checkpoint that copies more. Where every checkpoint
    copies more, the least copying one stands in, which flatters early stopping.
    """
    allowed = [p.fd for p in central if p.cr <= cr]
    crossings = [
        a.fd + (cr - a.cr) / (b.cr - a.cr) * (b.fd - a.fd)
        for a, b in pairwise(central)
        if (a.cr - cr) * (b.cr - cr) < 0
    ]
    found = allowed + crossings
    return min(found) if found else min(central, key=lambda p: p.cr).fd
