"""What a finished run hands over: the model, pictures, and a page that says what came out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from logging import ERROR, INFO
from typing import Any

import numpy as np
import torch
from flwr.common.logger import log

from ret_fl import pictures
from ret_fl.audit.finding import find_copies
from ret_fl.audit.folder import NUMBERS, PAGE, save_audit
from ret_fl.audit.inputs import Options
from ret_fl.audit.schema import Audit
from ret_fl.audit.tables import VARIANTS
from ret_fl.audit.verdict import verdict
from ret_fl.audit.words import percent, with_interval
from ret_fl.auditing import Drawing, data_of, draw, measure
from ret_fl.config import RunConfig, off_default
from ret_fl.data.sources import DataSplits
from ret_fl.devices import resolve_device
from ret_fl.diffusion.models import fold_factor
from ret_fl.diffusion.text_to_image import is_stable_diffusion
from ret_fl.handover import save_model
from ret_fl.ledger import ShardLedger
from ret_fl.loading import foreign_plugins
from ret_fl.packing import State
from ret_fl.rounds import ShardState
from ret_fl.rundir import RunDir


def finish(
    run: RunDir,
    config: RunConfig,
    data: DataSplits,
    weights: State,
    shards: Sequence[ShardState],
    ledger: ShardLedger,
) -> None:
    """Write final/, samples.npy, the pictures, the audit and summary.md into the run's folder.

    Model and shards as `save_model` takes them.
    """
    save_model(run.final, config, data.train, weights, shards, ledger)
    rows = run.rows()
    pictures.save_curves(rows, run.path / "curves.png")
    for old in (run.samples, run.path / "samples.png", run.path / "copies.png", run.audit / NUMBERS, run.audit / PAGE):
        old.unlink(missing_ok=True)  # of an earlier end of this run
    audit: Audit | str = "No audit: `samples = 0`."
    if config.samples:
        try:
            audit = _audited(run, config)
        except (ValueError, OSError, RuntimeError) as error:  # the model is trained and saved: that is not lost
            log(ERROR, "the audit failed", exc_info=error)
            audit = f"**The audit failed: {error}** Again, from this folder: `ret-fl audit .`"
    run.summary.write_text(_summary(run, config, data, ledger, rows, audit))


def _audited(run: RunDir, config: RunConfig) -> Audit:
    """Draw images, audit them, and keep both in the run's folder."""
    log(INFO, "drawing %d images", config.samples)
    drawing = Drawing.at_end(config)
    options = Options(
        seed=config.seed,
        device=resolve_device(config.device),
        auditors=config.audit.auditors,
        auditor_options=config.audit.options,
    )
    generated = draw(run.path, run.audit, drawing, options)
    np.save(run.samples, (generated.images * 255).round().to(torch.uint8).numpy())
    pictures.save_grid(generated.images[:100], run.path / "samples.png")
    audit, shown = measure(
        run.path, generated, data_of(config), options=options, on_stage=lambda stage: log(INFO, "audit: %s", stage)
    )
    if shown.worst is not None:
        pictures.save_pairs([shown.worst], run.path / "copies.png")
    save_audit(run.audit, audit, shown)
    return audit


def _summary(
    run: RunDir,
    config: RunConfig,
    data: DataSplits,
    ledger: ShardLedger,
    rows: list[dict[str, Any]],
    audit: Audit | str,
) -> str:
    last = rows[-1] if rows else {}
    measured = [row for row in rows if "held_out_loss" in row]
    lines = [f"# {config.name}", "", *_copy_lines(audit), "", "| | |", "|---|---|"]
    facts: list[tuple[str, str]] = [
        ("rounds", f"{last.get('round', 0)}, {config.shards} shards of {', '.join(map(str, ledger.sizes()))} samples"),
        ("images trained on", f"{sum(row['images'] for row in rows):,}"),
        ("loss, last round", "not told, under dp.mode" if config.private else f"{last.get('loss', math.nan):.4f}"),
        ("skipped, last round", f"{last.get('skip_rate', 0):.1%} of draws"),
        ("samples moved", f"{sum(row['moved'] for row in rows):,}"),
        ("in quarantine at the end", f"{int((ledger.probability < 1).sum()):,} of {len(ledger):,}"),
        ("failed shard rounds", f"{sum(row['failures'] for row in rows)}"),
        ("sent to / from clients", f"{_size(rows, 'bytes_down')} / {_size(rows, 'bytes_up')}"),
        ("time in rounds", f"{sum(row['seconds'] for row in rows):.0f} s"),
    ]
    if measured:
        train, held = measured[-1].get("train_loss"), measured[-1].get("held_out_loss")
        whose = "final model" if config.averages else "proxies, their mean"
        whose += " (EMA, which trails the raw weights in short runs)" if config.ema.decay else ""
        told = {name: f"{loss:.4f}" for name, loss in (("train", train), ("held-out", held)) if loss is not None}
        facts.append((f"loss of the {whose}, {' / '.join(told)}", " / ".join(told.values())))
    if "epsilon" in last:
        facts.append(("differential privacy of a shard", f"epsilon {last['epsilon']:.4g} at delta {last['delta']:g}"))
    facts += [("plug-in", told) for told in foreign_plugins(config)]
    if "canary_auc" in last:
        facts.append(("canaries found by loss", f"AUC {last['canary_auc']:.2f} (.5 is guessing)"))
    if data.unreadable:
        facts.append(("unreadable images skipped", f"{len(data.unreadable)}: {', '.join(data.unreadable[:5])}"))
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines += ["", "![Training](curves.png)", ""]
    if run.samples.is_file():
        drawn = "final model" if config.averages else f"ensemble (`ensemble={config.ensemble}`)"
        lines += [f"Samples of the {drawn}:", "", "![Samples](samples.png)", ""]
    if isinstance(audit, Audit):
        lines += [
            _what_is_closest(audit),
            "",
            "![Closest](copies.png)",
            "",
        ]
    lines += _how_to_open(config, data)
    changed = off_default(config)
    lines += ["## Settings that differ from the defaults", ""]
    lines += [f"- `{s.key} = {s.value!r}`" for s in changed if s.key not in ("out", "resume", "state-dir")]
    return "\n".join(lines) + "\n"


def _copy_lines(audit: Audit | str) -> list[str]:
    if isinstance(audit, str):
        return [audit]
    lines = [f"**{verdict(audit)}**"]
    _, copies = find_copies(audit.replication.copy_rates)
    if copies is not None:
        how = f"Copy rate ({VARIANTS[copies.variant]}) {with_interval(copies.rate)}"
        lines.append(f"{how}, {copies.distinct} distinct training images copied.")
        if copies.canary is not None:
            lines[-1] += f" Copies of canaries: {percent(copies.canary)}."
        if copies.floor is not None:
            lines[-1] += f" Real held-out images score {percent(copies.floor.value)}: that is the floor."
    return ["\n\n".join([*lines, "The whole audit: [audit/report.html](audit/report.html)."])]


def _what_is_closest(audit: Audit) -> str:
    text = "The samples closest to a training image with that image below, one for each training image."
    _, copies = find_copies(audit.replication.copy_rates)
    if copies is None:
        return f"{text} Without reference images none of them can be called a copy:"
    return (
        f"{text} r is the squared distance to it over that to the nearest reference image, "
        f"{VARIANTS[copies.variant]}; below {copies.threshold:g} it counts as a copy:"
    )


def _size(rows: list[dict[str, Any]], key: str) -> str:
    return f"{sum(row[key] for row in rows) / 1e6:,.1f} MB"


def _how_to_open(config: RunConfig, data: DataSplits) -> list[str]:
    more = ["More images, from this folder: `ret-fl sample . --count 64 --out more.png`.", ""]
    if is_stable_diffusion(config.model.init_from):
        return _how_to_draw_from_text(config, data)
    final = "final" if config.averages else "final/shard-0"
    whose = "" if config.averages else f"  # one of {config.shards} proxies"
    folded = fold_factor(config.model, data.train.image_shape)
    steps = min(100, config.diffusion.timesteps)
    unfold = [f"images = torch.nn.functional.pixel_shuffle(images, {folded})  # the U-Net works on folded pixels"]
    if config.model.class_conditional:
        return [
            *more[:-1],
            "It draws all classes in turn, or that of `--label`. Without ret-fl, from this folder (diffusers'",
            "`DDPMPipeline` opens it, but cannot pass class labels):",
            "",
            "```python",
            "import torch",
            "from diffusers import DDPMPipeline",
            "",
            f'pipeline = DDPMPipeline.from_pretrained("{final}"){whose}',
            "unet, scheduler = pipeline.unet.eval(), pipeline.scheduler",
            "labels = torch.arange(16) % unet.config.num_class_embeds",
            "images = torch.randn(16, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)",
            f"scheduler.set_timesteps({steps})",
            "with torch.no_grad():",
            "    for t in scheduler.timesteps:",
            "        images = scheduler.step(unet(images, t, class_labels=labels).sample, t, images).prev_sample",
            *(unfold if folded > 1 else []),
            "images = (images / 2 + 0.5).clamp(0, 1)  # [16, C, H, W]",
            "```",
            "",
        ]
    return [
        *more,
        "Without ret-fl, from this folder:",
        "",
        "```python",
        "import torch",
        "from diffusers import DDPMPipeline",
        "",
        f'pipeline = DDPMPipeline.from_pretrained("{final}"){whose}',
        f'images = pipeline(batch_size=16, num_inference_steps={steps}, output_type="np").images',
        "images = torch.from_numpy(images).permute(0, 3, 1, 2)  # [16, C, H, W] in [0, 1]",
        *(unfold if folded > 1 else []),
        "```",
        "",
    ]


def _how_to_draw_from_text(config: RunConfig, data: DataSplits) -> list[str]:
    prompt = data.train.captions[0][0] if data.train.captions else ""
    if config.lora.rank:
        side = data.train.image_shape[1]
        opened = [
            f"pipeline = StableDiffusionPipeline.from_pretrained({config.model.init_from!r})",
            'pipeline.load_lora_weights("final", weight_name="pytorch_lora_weights.safetensors")',
            f"image = pipeline({prompt!r}, height={side}, width={side}).images[0]",
        ]
    else:
        opened = [
            'pipeline = StableDiffusionPipeline.from_pretrained("final")',
            f"image = pipeline({prompt!r}).images[0]",
        ]
    return [
        f"More images, from this folder: `ret-fl sample . --prompt {shlex.quote(prompt)} --out more.png`.",
        "",
        "Without ret-fl, from this folder:",
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        "",
        *opened,
        "```",
        "",
    ]
