"""What a run's folder tells an audit beside the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ret_fl.audit import schema
from ret_fl.audit.inputs import AuditData, Background
from ret_fl.config import RunConfig, off_default
from ret_fl.data.sources import load_splits
from ret_fl.diffusion.text_to_image import data_read
from ret_fl.ledger import ShardLedger
from ret_fl.rundir import RunDir


def background_of(run: RunDir, data: AuditData) -> Background:
    """What a run's folder tells beside the model. Its sample IDs count only where `data` is what it was trained on."""
    config, rows = run.read_config(), run.rows()
    changed = off_default(config)
    images = sum(row["images"] for row in rows)
    measured = [row for row in rows if "train_loss" in row or "held_out_loss" in row]
    last = measured[-1] if measured else {}
    skips = _skips_by_timestep(config, rows)
    training = schema.Training(
        settings={s.key: s.value for s in changed if s.key not in ("out", "resume", "state-dir")},
        rounds=rows[-1]["round"] if rows else 0,
        images=images,
        moved=sum(row["moved"] for row in rows),
        skip_rate=sum(row["skip_rate"] * row["images"] for row in rows) / max(images, 1),
        failures=sum(row["failures"] for row in rows),
        final_train_loss=last.get("train_loss"),
        final_held_out_loss=last.get("held_out_loss"),
        epsilon=rows[-1].get("epsilon") if rows else None,
        delta=rows[-1].get("delta") if rows else None,
        skips=schema.SkipCurve(timesteps=skips[0].tolist(), share=skips[1].tolist()) if skips else None,
    )
    groups, dropped = {}, np.empty(0, np.int64)
    if load_splits(data_read(config)).train.fingerprint != data.train.fingerprint:
        warnings.warn(f"{run.path.name} was trained on other images than those it is audited against", stacklevel=2)
    elif run.ledger.is_file():
        ledger = ShardLedger.load(run.ledger)
        groups, dropped = _tails(ledger, config.report_tail), np.flatnonzero(~ledger.visited())
    return Background(training, groups, rows, skips, dropped)


def _tails(ledger: ShardLedger, share: float) -> dict[str, np.ndarray]:
    """Sample IDs by their losses in training: the lowest `share`, the highest, and the others."""
    ratio = ledger.log_loss_ratio()
    known = np.flatnonzero(~np.isnan(ratio))
    order = known[np.argsort(ratio[known])]
    tail = round(share * len(order))
    if not tail:
        return {}
    groups = {"memorized": order[:tail], "high-loss": order[-tail:], "others": order[tail:-tail]}
    return {name: np.sort(ids) for name, ids in groups.items()}


def _skips_by_timestep(config: RunConfig, rows: Sequence[dict[str, list[int]]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Timesteps, and the share of draws skipped there over the whole run; None where nothing was gated."""
    counted = [row for row in rows if "level_draws" in row]
    if not counted or config.agc.mode == "off":
        return None
    draws, skips = (np.sum([row[key] for row in counted], axis=0) for key in ("level_draws", "level_skips"))
    timesteps = (np.arange(len(draws)) + 0.5) * config.diffusion.timesteps / len(draws)
    return timesteps[draws > 0], (skips / np.maximum(draws, 1))[draws > 0]
