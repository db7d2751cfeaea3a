"""What a finished run hands over: the model, pictures, and a page that says what came out."""

from __future__ import annotations

from logging import INFO
from typing import Any

import numpy as np
import torch
from flwr.common.logger import log
from torch import Tensor

from ret_fl import pictures
from ret_fl.audit.replication import CopyReport, copy_report
from ret_fl.config import RunConfig, describe
from ret_fl.data.sources import DataSplits
from ret_fl.devices import resolve_device
from ret_fl.diffusion.models import build_unet, fold_factor
from ret_fl.diffusion.objective import make_scheduler
from ret_fl.diffusion.sampling import draw_images, save_pipeline
from ret_fl.ledger import ShardLedger
from ret_fl.protocol import State
from ret_fl.recorder import ema_state
from ret_fl.rundir import RunDir


def finish(run: RunDir, config: RunConfig, data: DataSplits, weights: State, ledger: ShardLedger) -> None:
    """Write final/, samples.npy, the pictures and summary.md into the run's folder."""
    store = data.train
    unet = build_unet(config.model, store.image_shape, store.num_classes, config.seed)
    unet.load_state_dict(ema_state(weights))
    scheduler = make_scheduler(config.diffusion)
    fold = fold_factor(config.model, store.image_shape)
    save_pipeline(run.final, unet, scheduler, fold)
    rows = run.rows()
    pictures.save_curves(rows, run.path / "curves.png")
    copies = None
    if config.samples:
        log(INFO, "drawing %d images", config.samples)
        images = draw_images(
            unet,
            scheduler,
            config.samples,
            seed=config.seed,
            steps=config.sample_steps,
            fold=fold,
            device=resolve_device(config.device),
        )
        np.save(run.samples, (images * 255).round().to(torch.uint8).numpy())
        pictures.save_grid(images[:100], run.path / "samples.png")
        copies = _copies(run, data, images)
    run.summary.write_text(_summary(run, config, data, ledger, rows, copies))


def _copies(run: RunDir, data: DataSplits, images: Tensor) -> CopyReport | None:
    if data.reference is None:
        return None
    canaries = data.canaries if len(data.canaries) else None
    report = copy_report(images, data.train.unit(), data.reference.unit(), canaries=canaries)
    originals = data.train.unit(report.index)
    pairs = pictures.closest_pairs("", images, originals, report.ratio, report.index)
    pictures.save_pairs([pairs], run.path / "copies.png")
    return report


def _summary(
    run: RunDir,
    config: RunConfig,
    data: DataSplits,
    ledger: ShardLedger,
    rows: list[dict[str, Any]],
    copies: CopyReport | None,
) -> str:
    last = rows[-1] if rows else {}
    measured = [row for row in rows if "train_loss" in row]
    lines = [f"# {config.name}", "", *_copy_lines(data, copies), "", "| | |", "|---|---|"]
    facts: list[tuple[str, str]] = [
        ("rounds", f"{last.get('round', 0)}, {config.shards} shards of {', '.join(map(str, ledger.sizes()))} samples"),
        ("images trained on", f"{sum(row['images'] for row in rows):,}"),
        ("loss, last round", f"{last.get('loss', float('nan')):.4f}"),
        ("skipped, last round", f"{last.get('skip_rate', 0):.1%} of draws"),
        ("samples moved", f"{sum(row['moved'] for row in rows):,}"),
        ("in quarantine at the end", f"{int((ledger.probability < 1).sum()):,} of {len(ledger):,}"),
        ("failed shard rounds", f"{sum(row['failures'] for row in rows)}"),
        ("sent to / from clients", f"{_size(rows, 'bytes_down')} / {_size(rows, 'bytes_up')}"),
        ("time in rounds", f"{sum(row['seconds'] for row in rows):.0f} s"),
    ]
    if measured and "held_out_loss" in measured[-1]:
        train, held = measured[-1]["train_loss"], measured[-1]["held_out_loss"]
        facts.append(("loss of the final model, train / held-out", f"{train:.4f} / {held:.4f}"))
    if data.unreadable:
        facts.append(("unreadable images skipped", f"{len(data.unreadable)}: {', '.join(data.unreadable[:5])}"))
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines += ["", "![Training](curves.png)", ""]
    if config.samples:
        lines += ["Samples of the final model:", "", "![Samples](samples.png)", ""]
    if copies is not None:
        lines += [
            "The samples closest to a training image with that image below, one for each training image. r is the "
            "squared distance to it over that to the nearest reference image; below 0.3 it counts as a copy:",
            "",
            "![Closest](copies.png)",
            "",
        ]
    lines += _how_to_open(config, data)
    changed = [s for s, d in zip(describe(config), describe(), strict=True) if s.value != d.value]
    lines += ["## Settings that differ from the defaults", ""]
    lines += [f"- `{s.key} = {s.value!r}`" for s in changed if s.key not in ("out", "resume", "state-dir")]
    return "\n".join(lines) + "\n"


def _copy_lines(data: DataSplits, copies: CopyReport | None) -> list[str]:
    if copies is None:
        return ["No copy rate: it needs `samples` > 0 and `data.reference = true`."]
    count = len(copies.ratio)
    text = (
        f"**Copy rate {copies.rate:.2%}** (95 % interval {copies.low:.2%} to {copies.high:.2%}, {count} samples, "
        f"{copies.distinct} distinct training images copied)."
    )
    if copies.canary_rate is not None:
        text += f" Copies of canaries: {copies.canary_rate:.2%}."
    if data.reference is not None and len(data.held_out):
        floor = copy_report(data.held_out.unit(), data.train.unit(), data.reference.unit())
        text += f" Real held-out images score {floor.rate:.2%}: at or below that, nothing is copied."
    return [text]


def _size(rows: list[dict[str, Any]], key: str) -> str:
    return f"{sum(row[key] for row in rows) / 1e6:,.1f} MB"


def _how_to_open(config: RunConfig, data: DataSplits) -> list[str]:
    more = ["More images, from this folder: `ret-fl sample . --count 64 --out more.png`.", ""]
    if config.model.class_conditional:
        return [*more, "It draws all classes in turn; diffusers' own `DDPMPipeline` cannot pass class labels.", ""]
    folded = fold_factor(config.model, data.train.image_shape)
    steps = min(100, config.diffusion.timesteps)
    unfold = [f"images = torch.nn.functional.pixel_shuffle(images, {folded})  # the U-Net works on folded pixels"]
    return [
        *more,
        "Without ret-fl, from this folder:",
        "",
        "```python",
        "import torch",
        "from diffusers import DDPMPipeline",
        "",
        'pipeline = DDPMPipeline.from_pretrained("final")',
        f'images = pipeline(batch_size=16, num_inference_steps={steps}, output_type="np").images',
        "images = torch.from_numpy(images).permute(0, 3, 1, 2)  # [16, C, H, W] in [0, 1]",
        *(unfold if folded > 1 else []),
        "```",
        "",
    ]
