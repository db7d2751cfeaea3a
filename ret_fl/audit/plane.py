"""The copy-quality plane: copy rates against quality, beside a training that merely ends earlier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from ret_fl.audit.counterparts import headline, same_features, same_fidelity
from ret_fl.audit.plots import BLUE, GREEN, MUTED, PANEL, PLUM, error_bars, share_axis, short, style
from ret_fl.audit.schema import Audit, Fidelity, Interval
from ret_fl.pictures import RED

PLANE_QUALITIES = ("frechet", "precision")


@dataclass(frozen=True)
class _Point:
    label: str
    rate: Interval
    floor: Interval | None
    fidelity: Fidelity


def plane_figure(audits: Sequence[Audit], baseline: Audit | None, early_stop: Sequence[Audit]) -> Figure:
    """The copy-quality plane: copy rate against Frechet distance and against precision, side by side.

    A method is better than training less only if it lies on the good side of the early-stop curve.

    Args:
        audits: points with labels, the first one emphasised; audits without copy rate or fidelity are left out.
        baseline: drawn as a square.
        early_stop: audits of one training at growing lengths, in that order: a line.

    Raises:
        ValueError: no audit has both a copy rate and fidelity in the features of the others.
    """
    return _plane(PLANE_QUALITIES, audits, baseline, early_stop)


def plane_panel(quality: str, audits: Sequence[Audit], baseline: Audit | None, early_stop: Sequence[Audit]) -> Figure:
    """One panel of `plane_figure` as a figure of its own: quality is 'frechet' or 'precision'."""
    return _plane((quality,), audits, baseline, early_stop)


def _plane(
    qualities: Sequence[str], audits: Sequence[Audit], baseline: Audit | None, early_stop: Sequence[Audit]
) -> Figure:
    features = plane_features([*audits, *([baseline] if baseline else []), *early_stop])
    own, base, curve = (plane_points(group, features) for group in (audits, [baseline] if baseline else [], early_stop))
    base = [point for point in base if point not in own]
    named = own + base + [point for point in curve if point not in own + base]
    if not named:
        raise ValueError("no audit has both a copy rate and fidelity: audit with a reference set and held-out images")
    with style():
        figure = Figure(figsize=(PANEL[0] * len(qualities), 3.6))
        panels = figure.subplots(1, len(qualities), squeeze=False)[0]
        for axes, quality in zip(panels, qualities, strict=True):
            _draw_plane(axes, quality, own, base, curve)
        if panels[0].get_legend_handles_labels()[0]:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(qualities) + 1)
        for axes, quality in zip(panels, qualities, strict=True):
            _place_labels(axes, [(p.label, p.rate.value, getattr(p.fidelity, quality)) for p in named])
    return figure


def plane_points(audits: Sequence[Audit], features: Fidelity | None) -> list[_Point]:
    """What of `audits` has a place in the plane: a copy rate, and fidelity in the same features as `features`."""
    points = []
    for audit in audits:
        rate = headline(audit)
        fidelity = same_fidelity(features, audit) if features is not None else None
        if rate is not None and fidelity is not None and math.isfinite(fidelity.frechet):
            points.append(_Point(short(audit.model.name), rate.rate, rate.floor, fidelity))
    return points


def plane_features(audits: Sequence[Audit]) -> Fidelity | None:
    """A fidelity in the features most audits were measured in; of equally common ones, the first."""
    found = [f for audit in audits if headline(audit) for f in audit.fidelity]
    return max(found, key=lambda own: sum(same_features(own, other) for other in found), default=None)


def _draw_plane(
    axes: Axes, quality: str, own: Sequence[_Point], base: Sequence[_Point], curve: Sequence[_Point]
) -> None:
    points = [*own, *base, *curve]
    _floor_line(axes, points)
    _real_line(axes, quality, points)
    if curve:
        x, y = [p.rate.value for p in curve], [getattr(p.fidelity, quality) for p in curve]
        axes.plot(x, y, "-o", color=MUTED, ms=4, lw=1.2, label="one training, stopped early")
    groups: tuple[tuple[Sequence[_Point], str, str, int], ...] = (
        (own[:1], RED, "o", 8),
        (own[1:], PLUM, "o", 6),
        (base, BLUE, "s", 7),
    )
    for group, colour, marker, size in groups:
        for p in group:
            axes.errorbar(p.rate.value, getattr(p.fidelity, quality), xerr=error_bars(p.rate), fmt=marker, color=colour,
                          ms=size, lw=1.2, capsize=2.5)  # fmt: skip
    frechet = quality == "frechet"
    share_axis(axes, 1.5 * max(p.rate.high for p in points))
    _quality_axis(axes, [getattr(p.fidelity, quality) for p in points])
    axes.set_xlabel("copy rate (square-root axis)")
    axes.set_ylabel("Fréchet distance (less is better)" if frechet else "precision (more is better)")
    corner, mark = (0.01, "◣good") if frechet else (0.99, "◤good")
    axes.text(
        0.005, corner, mark, transform=axes.transAxes, va="bottom" if frechet else "top", color=GREEN, weight="bold"
    )


def _quality_axis(axes: Axes, values: Sequence[float]) -> None:
    """Room above and below for labels and for the word in the good corner."""
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(low - room, high + room)


def _floor_line(axes: Axes, points: Sequence[_Point]) -> None:
    """The floor of the first audit that has one: the same data give the same to all."""
    floor = next((point.floor for point in points if point.floor is not None), None)
    if floor is None:
        return
    axes.axvspan(floor.low, floor.high, color=GREEN, alpha=0.1, lw=0)
    axes.axvline(floor.value, color=GREEN, lw=1.2, ls="--", label="real held-out images")


def _real_line(axes: Axes, quality: str, points: Sequence[_Point]) -> None:
    real = next((r for p in points if (r := getattr(p.fidelity, f"real_{quality}")) is not None), None)
    if real is not None:
        axes.axhline(real, color=MUTED, lw=1, ls=":", label="training images")


def _place_labels(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each label on the first side of its point where it hides no other label and no point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    centres = axes.transData.transform([(x, y) for _, x, y in points])
    taken: list[Any] = []
    for (label, x, y), centre in zip(points, centres, strict=True):
        best: tuple[int, Annotation] | None = None
        for dx, dy in ((8, 5), (8, -5), (0, 10), (0, -10), (-8, 5), (-8, -5), (8, 16), (8, -16), (-8, 16), (-8, -16)):
            text = axes.annotate(
                label, (x, y), (dx, dy), textcoords="offset points", fontsize=8.5, annotation_clip=False,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top", in_layout=False,
            )  # fmt: skip
            box = text.get_window_extent()
            hidden = sum(box.overlaps(other) for other in taken)
            hidden += sum(box.contains(*other) for other in centres if tuple(other) != tuple(centre))
            hidden += not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1)
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hidden, text)
            else:
                text.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[1].get_window_extent())
