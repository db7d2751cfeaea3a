"""Charts of an audit as matplotlib figures, and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from ret_fl.audit.losses import spans_decades
from ret_fl.audit.schema import Audit, Interval, LossHistogram
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
ZERO_MARGIN = 0.03
"""Room left of 0 on an axis of shares, as a part of the axis: a point at 0 is whole."""

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


def _panel(height: float = PANEL[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(PANEL[0], height))
    return figure, figure.subplots()


def interval_figure(rows: Sequence[tuple[str, Interval, str]]) -> Figure:
    """Shares with their intervals, one line each: (label, interval, colour)."""
    with style():
        figure, axes = _panel(0.75 + 0.36 * len(rows))
        for i, (_, share, colour) in enumerate(rows):
            axes.errorbar(share.value, i, xerr=error_bars(share), fmt="o", color=colour, ms=6, lw=2, capsize=3)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="copies (square-root axis)")
        share_axis(axes, 1.15 * max(share.high for _, share, _ in rows), apart=0.25)  # long labels leave little room
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
        _legend_above(figure, axes)
    return figure


def _legend_above(figure: Figure, axes: Axes) -> None:
    """A legend that hides nothing: a line an entry, for which the figure grows."""
    entries = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.2 * len(entries[0]))
    figure.legend(*entries, loc="outside upper left")


def _quantities(axes: Axes, audit: Audit, label: str, colour: str, line: str) -> None:
    points = [(m.tau, m.generated) for m in audit.replication.memorized]
    axes.plot(*zip(*points, strict=True), line, color=colour, ms=4, lw=1.6, label=label)


def loss_figure(histograms: Sequence[LossHistogram]) -> Figure:
    """Losses of groups of samples, each group's bars adding up to 100 %."""
    low, *_, high = histograms[0].edges
    log = spans_decades(low, high)
    with style():
        figure, axes = _panel()
        for group in histograms:
            colour, count = GROUP_COLOURS.get(group.group, AMBER), sum(group.counts)
            share = np.divide(group.counts, count)
            axes.stairs(share, group.edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(share, group.edges, color=colour, lw=1.5, label=f"{group.group} ({count:,})")
        axes.set(xlabel="denoising loss" + (" (log axis)" if log else ""), ylabel="share of the group", ylim=(0, None))
        if log:
            axes.set_xscale("log")
            _plain_log_ticks(axes, "x")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend_above(figure, axes)
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


def share_axis(axes: Axes, right: float, apart: float = 0.15) -> None:
    """Shares on x, by their square root: copy rates of a few percent stand apart, and 0 has its place and a margin.

    apart: the least room from tick to tick, as a share of the axis.
    """
    right = max(0.01, right)
    axes.set_xscale(
        "function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    )
    axes.set_xlim(-(ZERO_MARGIN**2) * right, right)
    ticks = [0.0]
    for tick in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1):
        if tick <= right and math.sqrt(tick) - math.sqrt(ticks[-1]) > apart * math.sqrt(right):
            ticks.append(tick)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(_percent_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())


def error_bars(share: Interval) -> list[list[float]]:
    """An interval as matplotlib's `xerr` of one point."""
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
