"""Grids of images and curves of a run, for PNG files and for pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

matplotlib.use("Agg", force=False)

PAIRS = 16
"""Closest samples shown beside their training image."""
SIDE = 64
"""Small images are enlarged to about this side, pixels kept sharp."""
INK, RED = "#1f2933", "#b42318"
"""Main lines of a chart, and what they are to be told from."""
NAMED_SHARDS = 6
"""A chart names its shards up to this many."""


def _array(images: Tensor) -> np.ndarray:
    """float [N, C, H, W] in [0, 1] -> uint8 [N, h, w, 3], enlarged by a whole factor."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
    factor = max(1, SIDE // pixels.shape[1])
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def image_grid(images: Tensor, columns: int = 0) -> Image.Image:
    """RGBA sheet of images, float [N, C, H, W] in [0, 1], gaps transparent; near-square unless `columns` is given."""
    pixels = _array(images)
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    gap, (height, width) = 2, pixels.shape[1:3]
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), 255, np.uint8)
    sheet[..., 3] = 0
    for i, tile in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255
    return Image.fromarray(sheet)


def save_grid(images: Tensor, path: Path, columns: int = 0) -> None:
    """A grid of images: float [N, C, H, W] in [0, 1]; near-square unless `columns` is given."""
    image_grid(images, columns).convert("RGB").save(path)


def save_images(images: Tensor, out: Path) -> None:
    """Save by the name of `out`: .png a grid, .npy uint8 [N, C, H, W], anything else a folder of PNG files."""
    if out.suffix == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images, out)
        return
    pixels = (images * 255).round().byte().numpy()
    if out.suffix == ".npy":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, pixels)
        return
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(out / f"{i:06d}.png")


@dataclass(frozen=True)
class Pairs:
    """Generated images float [n, C, H, W] in [0, 1], the training image each is closest to, the ratio [n]
    (NaN where there is none)."""

    title: str
    generated: Tensor
    originals: Tensor
    ratio: Tensor


def closest_pairs(
    title: str, generated: Tensor, originals: Tensor, ratio: Tensor, index: Tensor, count: int = PAIRS
) -> Pairs:
    """The `count` samples of lowest ratio, one for each training image: a model often copies the same one.

    generated, originals: float [G, C, H, W]; ratio: [G]; index: int64 [G], which training image `originals` are.
    """
    order = ratio.argsort()
    _, first = np.unique(index[order].numpy(), return_index=True)
    chosen = order[torch.from_numpy(np.sort(first))[:count]]
    return Pairs(title, generated[chosen], originals[chosen], ratio[chosen])


def save_pairs(panels: Sequence[Pairs], path: Path) -> None:
    """Generated images above their training images, ratios above each pair; several panels stand side by side."""
    columns = 8 if len(panels) == 1 else 4
    blocks = math.ceil(max(len(p.ratio) for p in panels) / columns)
    figure = Figure(figsize=(1.15 * columns * len(panels), 2.5 * blocks), layout="constrained")
    for panel, part in zip(panels, figure.subfigures(1, len(panels), squeeze=False, wspace=0.06)[0], strict=True):
        part.suptitle(panel.title, fontsize=11)
        _draw_pairs(part, panel, blocks, columns)
    figure.savefig(path, dpi=130)


def _draw_pairs(figure: SubFigure, panel: Pairs, blocks: int, columns: int) -> None:
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for line in range(2 * blocks):
        grid[line][0].set_ylabel(("generated", "training")[line % 2], fontsize=8)
    for i, (upper, lower) in enumerate(zip(_array(panel.generated), _array(panel.originals), strict=True)):
        line, column = 2 * (i // columns), i % columns
        grid[line][column].imshow(upper)
        grid[line + 1][column].imshow(lower)
        if math.isfinite(ratio := float(panel.ratio[i])):
            grid[line][column].set_title(f"r = {ratio:.2f}", fontsize=8, pad=2)


def save_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss of every shard and of the averaged model over the rounds; skips, moves and quarantine if there were any."""
    parts = [("denoising loss", "mean squared error", plot_losses)]
    if any(row["skip_rate"] for row in rows):
        parts.append(("draws skipped by the gate", "share", plot_skips))
    if any(row["moved"] or row["quarantined"] for row in rows):
        parts.append(("redistribution", "samples", plot_moves))
    figure = Figure(figsize=(max(6, 4 * len(parts)), 3.6), layout="constrained")
    for axes, (title, unit, plot) in zip(figure.subplots(1, len(parts), squeeze=False).flat, parts, strict=True):
        plot(axes, rows)
        axes.set(title=title, ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def plot_losses(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Loss of every shard and of the averaged model, or proxies' mean, over the rounds, on a log axis."""
    _plot_shards(axes, rows, "loss")
    whose = "averaged model" if any(row.get("aggregated", True) for row in rows) else "mean of the proxies"
    for key, style, colour in (("train_loss", "-o", INK), ("held_out_loss", "--o", RED)):
        seen = [(row["round"], row[key]) for row in rows if key in row]
        if seen:
            name = f"{whose}, {key.removesuffix('_loss').replace('_', '-')}"
            axes.plot(*zip(*seen, strict=True), style, color=colour, ms=3, lw=1.4, label=name)
    axes.set(xlabel="round", yscale="log")


def plot_skips(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Share of draws AGC skipped, by shard and in all, over the rounds."""
    _plot_shards(axes, rows, "skip_rate")
    axes.plot([row["round"] for row in rows], [row["skip_rate"] for row in rows], color=INK, lw=1.8, label="all")
    axes.set(xlabel="round", ylim=(0, None))


def plot_moves(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Samples moved after each round, and samples in quarantine, if there were any."""
    rounds = [row["round"] for row in rows]
    axes.step(rounds, [row["moved"] for row in rows], where="mid", label="samples moved after the round")
    if any(row["quarantined"] for row in rows):
        axes.plot(rounds, [row["quarantined"] for row in rows], label="samples in quarantine")
    axes.set(xlabel="round", ylim=(0, None))


def plot_sizes(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Samples of every shard over the rounds."""
    _plot_shards(axes, rows, "samples", drawstyle="steps-post")
    axes.set(xlabel="round")


def _plot_shards(axes: Axes, rows: Sequence[dict[str, Any]], key: str, **line: Any) -> None:
    shards = sorted({s for row in rows for s in row["shards"]}, key=int)
    for i, shard in enumerate(shards):
        seen = [(row["round"], row["shards"][shard][key]) for row in rows if shard in row["shards"]]
        many = f"each of {len(shards)} shards" if i == 0 else None
        label = f"shard {shard}" if len(shards) <= NAMED_SHARDS else many
        axes.plot(*zip(*seen, strict=True), lw=0.9, alpha=0.75, label=label, **line)
