"""`ret-fl sample`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl.cli_options import DeviceOption, ThreadsOption, stop

if TYPE_CHECKING:
    import torch

    from ret_fl.audit.pipelines import Draw
    from ret_fl.diffusion.ensemble import How


class Drawn(StrEnum):
    choose = "choose"
    average = "average"


DRAWN = 64
"""Images drawn at once."""
GUIDANCE = 7.5


def sample(
    model: Annotated[
        Path, typer.Argument(help="A run's folder, or a diffusers pipeline folder: unconditional or text-to-image.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="For text-to-image. Repeatable, used in turn.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=f"For text-to-image: scale of the guidance. [default: a run's own; else {GUIDANCE}]",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Image i of a seed starts from the same noise always.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    label: Annotated[
        int | None,
        typer.Option(min=0, help="Class-conditional: this class only. [default: all in turn]", show_default=False),
    ] = None,
    ensemble: Annotated[
        Drawn | None,
        typer.Option(
            help="Of proxies that were never averaged: each image from one, chosen by share of samples, one in memory "
            "at a time; or from the average of all K predictions, all in memory. [default: the run's own]",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        int | None,
        typer.Option(min=0, help="Of proxies that were never averaged: draw from this shard's.", show_default=False),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="A .png for a grid, a .npy for uint8 [N, C, H, W], or a folder for one PNG an image.")
    ] = Path("samples.png"),
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
) -> None:
    """Draw images from a trained model."""
    from rich.progress import Progress

    from ret_fl.audit.pipelines import asked_at_once, is_text_to_image, locate
    from ret_fl.audit.shelf import draw_missing
    from ret_fl.config import ConfigError
    from ret_fl.devices import limit_threads, resolve_device
    from ret_fl.pictures import save_images

    limit_threads(threads)
    how: How | None = ensemble.value if ensemble else None
    try:
        place = resolve_device(device)
    except ConfigError as error:
        raise stop(error) from None
    try:
        kind, folder = locate(model)
        if kind == "images":
            raise ValueError("it holds images")
        by_text = is_text_to_image(folder)
        folder = _member(model, folder, how, shard)
        if by_text:
            if label is not None:
                raise stop("--label: a text-to-image model has no classes, give it a --prompt")
            draw = _from_text(model, folder, prompt or [], guidance, seed, steps, place)
        else:
            _refuse_text(model, prompt, guidance)
            draw = _from_noise(folder, seed, steps, place, label, how)
        size = asked_at_once(folder, DRAWN, how)
    except (OSError, ValueError) as error:
        raise stop(f"{model} holds no model that ret-fl can draw from: {error}") from None
    try:
        with Progress() as progress:
            task = progress.add_task("drawing", total=count)
            images = draw_missing(draw, count, size, None, lambda done, _: progress.update(task, completed=done))
    except ValueError as error:
        raise stop(str(error) if label is None else f"--label: {error}") from None
    save_images(images, out)
    typer.echo(f"{count} images: {out}")


def _member(model: Path, folder: Path, how: How | None, shard: int | None) -> Path:
    """The folder to draw from: that of one proxy of an ensemble where a shard is named."""
    from ret_fl.diffusion.ensemble import is_ensemble, read_ensemble

    if not is_ensemble(folder):
        if how is not None or shard is not None:
            option = "--ensemble" if how is not None else "--shard"
            raise stop(f"{option}: {model} is one model; only a run with aggregate-every=0 keeps its proxies apart")
        return folder
    if shard is None:
        return folder
    if how is not None:
        raise stop("--shard draws from one proxy alone: leave out --ensemble")
    members = read_ensemble(folder).members
    if shard >= len(members):
        raise stop(f"--shard {shard}: {model} has the shards 0..{len(members) - 1}")
    return members[shard]


def _refuse_text(model: Path, prompt: list[str] | None, guidance: float | None) -> None:
    """Say which option does nothing for a model that is told no text."""
    for option, given in (("--prompt", prompt), ("--guidance", guidance is not None)):
        if given:
            raise stop(f"{option}: {model} is no text-to-image model, it draws without text")


def _from_text(
    model: Path,
    folder: Path,
    prompts: list[str],
    guidance: float | None,
    seed: int,
    steps: int,
    device: torch.device,
) -> Draw:
    from ret_fl.audit.pipelines import text_sampler
    from ret_fl.auditing import is_run
    from ret_fl.rundir import RunDir

    if guidance is None:
        guidance = RunDir.existing(model).read_config().text.guidance if is_run(model) else GUIDANCE
    return text_sampler(folder, prompts, guidance, seed, steps, device)[0]


def _from_noise(folder: Path, seed: int, steps: int, device: torch.device, label: int | None, how: How | None) -> Draw:
    from ret_fl.audit.pipelines import pixel_sampler

    return pixel_sampler(folder, seed, steps, device, label, how)[0]
