"""Charts of an audit as matplotlib figures, and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from ret_fl.audit.schema import Audit, CopyRate, Fidelity, Interval
from ret_fl.pictures import INK, RED, plot_losses, plot_moves, plot_sizes, plot_skips

MUTED, GRID, BLUE, GREEN, AMBER, PLUM = "#5b6672", "#d5dae0", "#1d5fbf", "#0b7a5c", "#9a5b00", "#7a3fa0"
COLOURS = {
    INK: "--ink", RED: "--red", MUTED: "--muted", GRID: "--grid", BLUE: "--blue", GREEN: "--green", AMBER: "--amber",
    PLUM: "--plum",
}  # fmt: skip
"""Every colour a chart may use, and the CSS variable that replaces it in a page: dark pages give other values."""
GROUP_COLOURS = {"memorized": RED, "high-loss": BLUE, "others": MUTED}
PANEL = (4.2, 2.9)
LABEL_LENGTH = 28
HEADLINE_THRESHOLD = 0.3

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[BLUE, GREEN, AMBER, PLUM]),
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # names of models are no formulas
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """The look of all charts; figures must be made and saved within it."""
    with matplotlib.rc_context(_STYLE | more):
        yield


def svg(figure: Figure, name: str) -> str:
    """An <svg> element to stand within HTML, as wide as its place; `name` keeps its ids apart from other charts'."""
    file = io.StringIO()
    with style(**{"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"| xmlns(?::xlink)?="[^"]*"', "", text, count=4)
    text = re.sub(r"""( id="|href="#|url\(#)""", rf"\1{name}-", text)
    text = re.sub(r"(?<=px )'[^;\"]*(?=[;\"])", "system-ui, sans-serif", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    return text.strip()


def short(name: str) -> str:
    """A name that fits beside a point."""
    name = " ".join(name.split())
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


def headline(audit: Audit) -> CopyRate | None:
    """The copy rate that stands for the model: by pixels, at .3 if that was measured."""
    pixels = [rate for rate in audit.replication.copy_rates if rate.variant == "pixels"]
    usual = [rate for rate in pixels if rate.threshold == HEADLINE_THRESHOLD]
    return next(iter(usual + pixels + audit.replication.copy_rates), None)


def _panel(height: float = PANEL[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(PANEL[0], height))
    return figure, figure.subplots()


def interval_figure(rows: Sequence[tuple[str, Interval, str]]) -> Figure:
    """Shares with their intervals, one line each: (label, interval, colour)."""
    with style():
        figure, axes = _panel(0.75 + 0.36 * len(rows))
        for i, (_, share, colour) in enumerate(rows):
            axes.errorbar(share.value, i, xerr=_error(share), fmt="o", color=colour, ms=6, lw=2, capsize=3)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="share of copies (square-root axis)")
        _share_axis(axes, 1.15 * max(share.high for _, share, _ in rows))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def quantity_figure(audit: Audit, baseline: Audit | None) -> Figure:
    """MQ over tau: of the model, of real held-out images, of the baseline."""
    with style():
        figure, axes = _panel()
        _quantities(axes, audit, short(audit.model.name), RED, "-o")
        if baseline is not None:
            _quantities(axes, baseline, short(baseline.model.name), BLUE, "-s")
        floor = [(m.tau, m.floor) for m in audit.replication.memorized if m.floor is not None]
        if floor:
            axes.plot(*zip(*floor, strict=True), "--", color=MUTED, lw=1.6, label="real held-out images (floor)")
        axes.set(xlabel="threshold tau", ylabel="share below tau", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend()
    return figure


def _quantities(axes: Axes, audit: Audit, label: str, colour: str, line: str) -> None:
    points = [(m.tau, m.generated) for m in audit.replication.memorized]
    axes.plot(*zip(*points, strict=True), line, color=colour, ms=4, lw=1.6, label=label)


def loss_figure(losses: Mapping[str, np.ndarray]) -> Figure:
    """Histograms of the losses of groups of samples, each group's bars adding up to 100 %."""
    groups = {name: values[np.isfinite(values)] for name, values in losses.items()}
    groups = {name: values for name, values in groups.items() if len(values)}
    everything = np.concatenate(list(groups.values()))
    low, high = float(everything.min()), float(everything.max())
    log = low > 0 and high > 10 * low
    edges = np.geomspace(low, high, 31) if log else np.linspace(low, max(high, np.nextafter(low, np.inf)), 31)
    with style():
        figure, axes = _panel()
        for name, values in groups.items():
            colour = GROUP_COLOURS.get(name, AMBER)
            counts = np.histogram(values, np.linspace(low, low + 1, 31) if high <= low else edges)[0]
            axes.stairs(counts / len(values), edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(counts / len(values), edges, color=colour, lw=1.5, label=f"{name} ({len(values):,})")
        axes.set(xlabel="denoising loss" + (" (log axis)" if log else ""), ylabel="share of the group", ylim=(0, None))
        if log:
            axes.set_xscale("log")
            _plain_log_ticks(axes, "x")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend()
    return figure


def skip_figure(timesteps: np.ndarray, share: np.ndarray) -> Figure:
    """Share of draws skipped over the timesteps they were drawn at."""
    with style():
        figure, axes = _panel()
        axes.fill_between(timesteps, share, color=RED, alpha=0.2, lw=0)
        axes.plot(timesteps, share, color=RED, lw=1.6)
        axes.set(xlabel="timestep (0: hardly any noise)", ylabel="share of draws skipped", ylim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
    return figure


def loss_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Loss of the shards and of the averaged model over the rounds."""
    figure = _curves(rows, plot_losses, "denoising loss (log axis)")
    _plain_log_ticks(figure.axes[0], "y")
    return figure


def skip_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Share of draws skipped over the rounds."""
    figure = _curves(rows, plot_skips, "share of draws skipped")
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(_percent_tick))
    return figure


def move_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Samples moved and quarantined over the rounds."""
    return _curves(rows, plot_moves, "samples")


def size_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Samples of each shard over the rounds."""
    return _curves(rows, plot_sizes, "samples of the shard")


def _curves(rows: Sequence[dict[str, Any]], plot: Callable[[Axes, Sequence[dict[str, Any]]], None], y: str) -> Figure:
    with style():
        figure, axes = _panel()
        plot(axes, rows)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = len(axes.get_legend_handles_labels()[0])
        if labels:
            axes.legend(ncols=2 if labels > 3 else 1)
    return figure


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


PLANE_QUALITIES = ("frechet", "precision")


def plane_points(audits: Sequence[Audit], features: str | None) -> list[_Point]:
    """What of `audits` has a place in the plane: a copy rate, and fidelity in these features."""
    points = []
    for audit in audits:
        rate = headline(audit)
        fidelity = next((f for f in audit.fidelity if f.features == features), None)
        if rate is not None and fidelity is not None and math.isfinite(fidelity.frechet):
            points.append(_Point(short(audit.model.name), rate.rate, rate.floor, fidelity))
    return points


def plane_features(audits: Sequence[Audit]) -> str | None:
    """The features most audits were measured in; of equally common ones, the first named."""
    names = [f.features for audit in audits if headline(audit) for f in audit.fidelity]
    return max(names, key=names.count, default=None)


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
            axes.errorbar(p.rate.value, getattr(p.fidelity, quality), xerr=_error(p.rate), fmt=marker, color=colour,
                          ms=size, lw=1.2, capsize=2.5)  # fmt: skip
    frechet = quality == "frechet"
    _share_axis(axes, 1.5 * max(p.rate.high for p in points))
    _quality_axis(axes, [getattr(p.fidelity, quality) for p in points])
    axes.set_xlabel("copy rate (square-root axis)")
    axes.set_ylabel("Fréchet distance (less is better)" if frechet else "precision (more is better)")
    corner, mark = (0.01, "◣good") if frechet else (0.99, "◤good")
    axes.text(
        0.005, corner, mark, transform=axes.transAxes, va="bottom" if frechet else "top", color=GREEN, weight="bold"
    )


def _share_axis(axes: Axes, right: float) -> None:
    """Shares on x, by their square root: copy rates of a few percent stand apart, and 0 has its place."""
    right = max(0.01, right)
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, right)
    ticks = [0.0]
    for tick in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1):
        if tick <= right and math.sqrt(tick) - math.sqrt(ticks[-1]) > 0.15 * math.sqrt(right):
            ticks.append(tick)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(_percent_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())


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


def _error(share: Interval) -> list[list[float]]:
    return [[max(0.0, share.value - share.low)], [max(0.0, share.high - share.value)]]


def _percent_tick(value: float, _: object = None) -> str:
    return f"{100 * value:.4g} %"


def _plain_log_ticks(axes: Axes, which: str) -> None:
    """Ticks of a log axis as plain numbers, minor ones at 2 and 5 when the axis spans few decades."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    few = high < 100 * low
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    shown = {2, 5} if few else set()
    axis.set_minor_formatter(
        FuncFormatter(
            lambda value, _: f"{value:g}" if round(value / 10 ** math.floor(math.log10(value))) in shown else ""
        )
    )
