"""The copy-quality plane: copy rates against quality, beside a training that merely ends earlier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ret_fl.audit.counterparts import headline, same_features, same_fidelity
from ret_fl.audit.plots import BLUE, GREEN, MUTED, PANEL, PLUM, error_bars, share_axis, short, style
from ret_fl.audit.schema import Audit, Fidelity, Interval
from ret_fl.pictures import RED

PLANE_QUALITIES = ("frechet", "precision")
NEAR_PLACES = 8
"""The first places for a label lie beside its point, all others want a line to it."""


@dataclass(frozen=True)
class _Point:
    label: str
    rate: Interval
    floor: Interval | None
    fidelity: Fidelity

    def lies_on(self, other: _Point) -> bool:
        """Whether it is the same model, as the last checkpoint of a training is the trained model."""
        return (self.rate, self.fidelity) == (other.rate, other.fidelity)


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
    own = [point for point in own if point not in base]
    stops = [point for point in curve if not any(point.lies_on(other) for other in own + base)]
    if not own + base + curve:
        raise ValueError("no audit has both a copy rate and fidelity: audit with a reference set and held-out images")
    named = own + base + (stops if len(stops) < 3 else [stops[0], stops[-1]])
    with style():
        figure = Figure(figsize=(PANEL[0] * len(qualities), 3.6))
        panels = figure.subplots(1, len(qualities), squeeze=False)[0]
        for axes, quality in zip(panels, qualities, strict=True):
            _draw_plane(axes, quality, own, base, curve, [i for i, point in enumerate(curve) if point in stops])
        if panels[0].get_legend_handles_labels()[0]:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(qualities) + 1)
        for axes, quality in zip(panels, qualities, strict=True):
            place_labels(axes, [(p.label, p.rate.value, getattr(p.fidelity, quality)) for p in named])
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
    axes: Axes,
    quality: str,
    own: Sequence[_Point],
    base: Sequence[_Point],
    curve: Sequence[_Point],
    marked: Sequence[int],
) -> None:
    """marked: which points of the curve are drawn as such, and not as an audit of `own` or `base`."""
    points = [*own, *base, *curve]
    _floor_line(axes, points)
    real = _real_line(axes, quality, points)
    if curve:
        x, y = [p.rate.value for p in curve], [getattr(p.fidelity, quality) for p in curve]
        axes.plot(x, y, "-o", color=MUTED, ms=4, lw=1.2, markevery=list(marked), label="one training, stopped early")
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
    _quality_axis(axes, [getattr(p.fidelity, quality) for p in points] + real, math.inf if frechet else 1)
    axes.set_xlabel("copy rate (square-root axis)")
    axes.set_ylabel("Fréchet distance (less is better)" if frechet else "precision (more is better)")
    corner, mark = (0.01, "◣good") if frechet else (0.99, "◤good")
    axes.text(
        0.005, corner, mark, transform=axes.transAxes, va="bottom" if frechet else "top", color=GREEN, weight="bold"
    )


def _quality_axis(axes: Axes, values: Sequence[float], most: float) -> None:
    """Room above and below for labels and for the word in the good corner."""
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or 0.1 * abs(high) or 0.1
    beyond = 0.4 * room  # where no value can lie, as below 0
    axes.set_ylim(max(low - room, -beyond), min(high + room, most + beyond))


def _floor_line(axes: Axes, points: Sequence[_Point]) -> None:
    """The floor of the first audit that has one: the same data give the same to all."""
    floor = next((point.floor for point in points if point.floor is not None), None)
    if floor is None:
        return
    axes.axvspan(floor.low, floor.high, color=GREEN, alpha=0.1, lw=0)
    axes.axvline(floor.value, color=GREEN, lw=1.2, ls="--", label="real held-out images")


def _real_line(axes: Axes, quality: str, points: Sequence[_Point]) -> list[float]:
    """What training images score in the samples' place, drawn and returned; the same data give the same to all."""
    real = [r for p in points if (r := getattr(p.fidelity, f"real_{quality}")) is not None and math.isfinite(r)][:1]
    for value in real:
        axes.axhline(value, color=MUTED, lw=1, ls=":", label="training images")
    return real


def place_labels(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each label where it hides least: no other label, no point, no line. A far one is tied to its point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    centres, strokes = axes.transData.transform([(x, y) for _, x, y in points]), _strokes(axes)
    taken: list[Bbox] = [text.get_window_extent() for text in axes.texts]
    for (label, x, y), centre in zip(points, centres, strict=True):
        text = axes.annotate(label, (x, y), (0, 0), textcoords="offset points", va="bottom", fontsize=8.5,
                             annotation_clip=False, in_layout=False,
                             arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkB": 3})  # fmt: skip
        size = Text.get_window_extent(text).size  # of the words alone, without the line to the point
        places = [(offset, Bbox([centre + offset, centre + offset + size])) for offset in _offsets(*size)]
        covered = [
            1000 * (not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0))
            + 100 * sum(box.overlaps(other) for other in taken)
            + 20 * _inside(box, centres)
            + _inside(box.padded(2), strokes)
            + 8 * (i >= NEAR_PLACES)
            for i, (_, box) in enumerate(places)
        ]
        best = int(np.argmin(covered))
        offset, box = places[best]
        text.set_position(tuple(offset * 72 / figure.dpi))
        if text.arrow_patch is not None:
            text.arrow_patch.set_visible(best >= NEAR_PLACES)
        taken.append(box)


def _offsets(width: float, height: float) -> list[np.ndarray]:
    """Places of a text's lower left corner around a point, in pixels: beside it, then farther and farther away."""
    return [
        np.array(place)
        for gap in (10, 22, 36, 52)
        for place in (
            (gap, 0.6 * gap), (gap, -0.6 * gap - height), (-width / 2, gap), (-width / 2, -gap - height),
            (-gap - width, 0.6 * gap), (-gap - width, -0.6 * gap - height), (gap, -height / 2),
            (-gap - width, -height / 2),
        )
    ]  # fmt: skip


def _strokes(axes: Axes) -> np.ndarray:
    """Pixels [n, 2] along all lines and error bars, but for parts whose ends are not both finite."""
    paths = [np.asarray(line.get_transform().transform(line.get_xydata())) for line in axes.lines]
    bars = [bar for bar in axes.collections if isinstance(bar, LineCollection)]
    paths += [axes.transData.transform(ends) for bar in bars for ends in bar.get_segments()]
    pieces = [np.linspace(a, b, 2 + int(np.hypot(*(b - a)) / 2)) for path in paths for a, b in pairwise(path)
              if np.isfinite([a, b]).all()]  # fmt: skip
    return np.concatenate([np.empty((0, 2)), *pieces])


def _inside(box: Bbox, pixels: np.ndarray) -> int:
    return int(((box.min <= pixels) & (pixels <= box.max)).all(1).sum())
