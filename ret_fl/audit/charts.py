"""The charts of report.html, each with its title and what it shows in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from ret_fl.audit import plots
from ret_fl.audit.counterparts import headline
from ret_fl.audit.losses import loss_histograms
from ret_fl.audit.plane import plane_features, plane_panel, plane_points
from ret_fl.audit.schema import Audit
from ret_fl.audit.tables import VARIANTS
from ret_fl.audit.words import number, percent, with_interval


@dataclass(frozen=True)
class Chart:
    svg: Markup
    title: str
    alt: str
    note: str = ""


def rates_chart(audit: Audit, baseline: Audit | None, others: Sequence[Audit]) -> Chart | None:
    """Copy rates and floors as intervals on one axis, the model's own first."""
    first = headline(audit)
    if first is None:
        return None
    rows = [(f"this model, {VARIANTS[r.variant]}", r.rate, plots.RED) for r in audit.replication.copy_rates]
    rows += [("real held-out images (floor)", first.floor, plots.GREEN)] if first.floor else []
    compared = [] if baseline is None else [(baseline, plots.BLUE)]
    compared += [(other, plots.PLUM) for other in others if other != baseline]
    for other, colour in compared:
        rate = headline(other) if other != audit else None
        rows += [(plots.short(other.model.name), rate.rate, colour)] if rate else []
    alt = "; ".join(f"{label}: {with_interval(share)}" for label, share, _ in rows)
    note = "Bars are 95 % intervals. Where they overlap, the rates may be the same."
    return _chart(plots.interval_figure(rows), "rates", "Copy rates with their uncertainty", alt, note)


def quantity_chart(audit: Audit, baseline: Audit | None) -> Chart | None:
    """MQ over tau, or None where it was not measured."""
    memorized = audit.replication.memorized
    if not memorized:
        return None
    alt = "; ".join(f"tau {m.tau:g}: {percent(m.generated)}, floor {percent(m.floor)}" for m in memorized)
    dashed = "Only what rises above the dashed line is more than real images that were never trained on would score."
    missing = "Without held-out images nobody knows how much of it real images that were never trained on would score."
    note = missing if all(m.floor is None for m in memorized) else dashed
    with_points = baseline if baseline is not None and baseline != audit and baseline.replication.memorized else None
    return _chart(plots.quantity_figure(audit, with_points), "mq", "Memorized quantity by threshold", alt, note)


def loss_chart(losses: Mapping[str, np.ndarray]) -> Chart | None:
    """Losses of samples by group, or None without finite ones."""
    known = loss_histograms(losses)
    if not known:
        return None
    alt = "; ".join(f"{g.group}: {sum(g.counts):,} samples, median loss {number(g.median)}" for g in known)
    note = (
        "Memorized and high-loss are the samples of lowest and highest mean log-ratio in training, an equal share of "
        f"them at either end, whether or not anything was memorized. Bars of each group add up to 100 %."
        f"{_told_apart(losses)}"
    )
    return _chart(plots.loss_figure(known), "losses", "Losses of training samples", alt, note)


def _told_apart(losses: Mapping[str, np.ndarray]) -> str:
    """Whether nearly all memorized samples lose less than nearly all others."""
    groups = {name: values[np.isfinite(values)] for name, values in losses.items() if np.isfinite(values).any()}
    if not {"memorized", "others"} <= set(groups):
        return ""
    if np.quantile(groups["memorized"], 0.9) < np.quantile(groups["others"], 0.1):
        return " Memorized samples lose little because the model knows them by heart."
    return " The groups overlap: these losses do not tell the samples that training took for memorized from others."


def skip_chart(skip_by_timestep: tuple[np.ndarray, np.ndarray] | None) -> Chart | None:
    """Share of draws skipped over timesteps, or None where none is known."""
    if skip_by_timestep is None:
        return None
    timesteps, share = (np.asarray(values, float) for values in skip_by_timestep)
    known = np.isfinite(share)
    if not known.any():
        return None
    most = int(np.nanargmax(share))
    alt = f"Most skipped at timestep {timesteps[most]:.0f}: {percent(float(share[most]))} of draws"
    note = "Draws whose loss is far below the usual at their timestep are skipped, as they teach only what is known."
    figure = plots.skip_figure(timesteps[known], share[known])
    return _chart(figure, "skips", "Skip rate over timesteps", alt, note)


def movement_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Empty where nothing moved and no shard changed its size: there is nothing to see."""
    charts = []
    moved, quarantined = sum(row["moved"] for row in rows), [row["quarantined"] for row in rows]
    if moved or any(quarantined):
        alt = f"{moved:,} samples moved in all; {quarantined[-1]:,} in quarantine after the last round"
        charts.append(_chart(plots.move_curves(rows), "moves", "Samples moved and quarantined", alt))
    if len({(shard, part["samples"]) for row in rows for shard, part in row["shards"].items()}) > _shards(rows):
        last = ", ".join(f"shard {shard}: {part['samples']:,}" for shard, part in rows[-1]["shards"].items())
        charts.append(
            _chart(plots.size_curves(rows), "sizes", "Samples of each shard", f"After the last round: {last}")
        )
    return charts


def _shards(rows: Sequence[dict[str, Any]]) -> int:
    return len({shard for row in rows for shard in row["shards"]})


def curve_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Loss and skip rate over the rounds; empty without rounds."""
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    fall = f"From {number(first['loss'])} in round {first['round']} to {number(last['loss'])} in round {last['round']}"
    charts = [_chart(plots.loss_curves(rows), "loss", "Loss over rounds", fall)]
    if any(row["skip_rate"] for row in rows):
        alt = f"{percent(last['skip_rate'])} of draws skipped in the last round"
        charts.append(_chart(plots.skip_curves(rows), "skipping", "Skip rate over rounds", alt))
    return charts


def plane_charts(
    audit: Audit, baseline: Audit | None, others: Sequence[Audit], early_stop: Sequence[Audit]
) -> list[Chart]:
    """Empty unless there are at least two points: one alone tells nothing."""
    audits = [audit, *others]
    everything = [*audits, *([baseline] if baseline else []), *early_stop]
    points = plane_points(everything, plane_features(everything))
    if len({point.label for point in points}) < 2:
        return []
    charts = []
    for quality, title in (("frechet", "Copy rate and Fréchet distance"), ("precision", "Copy rate and precision")):
        alt = "; ".join(
            f"{p.label}: copy rate {percent(p.rate.value)}, {quality} {number(getattr(p.fidelity, quality))}"
            for p in points
        )
        charts.append(_chart(plane_panel(quality, audits, baseline, early_stop), quality, title, alt))
    return charts


def _chart(figure: Figure, name: str, title: str, alt: str, note: str = "") -> Chart:
    return Chart(Markup(plots.svg(figure, name)), title, alt, note)
