"""`ret-fl audit` and `ret-fl report`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ret_fl.cli_options import INTERRUPTED, DeviceOption, ThreadsOption, stop, wide_console

if TYPE_CHECKING:
    from ret_fl.audit.attacks import Stage
    from ret_fl.auditing import Drawn


class Colours(StrEnum):
    auto = "auto"
    grey = "grey"
    rgb = "rgb"


def audit(
    models: Annotated[
        list[Path],
        typer.Argument(help="A run's folder, a diffusers pipeline folder, a folder of images, or a .npy of images."),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Training images: a run's folder (its own split), a folder of images, a .npy, parquet files or "
            "CIFAR's .tar.gz; where no such path exists, digits, mnist, glyphs, patches or faces (split as a run does "
            "by default: a fifth held out, half of the rest for reference), or a hub dataset as owner/name. [default: "
            "those of the first MODEL that is a run]",
            show_default=False,
        ),
    ] = "",
    reference: Annotated[
        str,
        typer.Option(
            help="Real images never trained on, 1.25 times as many as --data at best: as many calibrate the copy rate, "
            "the others are its floor. Without them no copy rate."
        ),
    ] = "",
    held_out: Annotated[str, typer.Option(help="Further real images never trained on, for floors and quality.")] = "",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Images to draw. [default: a run's own number; else 1000]", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Image i of a seed starts from the same noise always. [default: a run's own; else 0]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps. [default: a run's own number; else 50]", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For text-to-image: one prompt a line, used in turn. [default: captions of --data, if it is a run's, "
            "drawn at random]",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0, help="For text-to-image: scale of the guidance. [default: a run's own; else 7.5]", show_default=False
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Image model for similarity and quality: a transformers folder (CLIP, DINOv2), a TorchScript file "
            "(SSCD), or 'inception', 'sscd' or 'clip', which are looked for on this machine. Repeatable. CLIP also "
            "scores how samples fit their prompts.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Which of the MODELs the others are compared with.")
    ] = None,
    early_stop: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MODEL",
            help="For the curve of merely training less: a run whose every checkpoint is audited too, or a model of "
            "less training. Repeatable, in order.",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Calibrated distance ratio below which a sample is a copy.")
    ] = 0.3,
    image_size: Annotated[int, typer.Option(min=0, help="Side that images in files are brought to; 0 keeps.")] = 0,
    channels: Annotated[Colours, typer.Option(help="Colour that images in files are brought to.")] = Colours.auto,
    members: Annotated[int, typer.Option(min=10, help="Images of each side in membership inference, at most.")] = 2000,
    leakage: Annotated[bool, typer.Option(help="Attack the model by its losses, where it has any.")] = True,
    auditor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A plug-in that measures more (`ret-fl policies`), by its name or as package.module:name; or 'none'. "
            "Repeatable. [default: those of the run, if MODEL is one]",
            show_default=False,
        ),
    ] = None,
    auditor_options: Annotated[
        str, typer.Option(metavar="KEY = VALUE, ...", help="Settings of the --auditor plug-ins.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the audit. [default: audit/ in a run, if all is measured as at its end; else audits/]",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    memory_mb: Annotated[int, typer.Option(min=1, help="Memory for distances beyond the images themselves.")] = 512,
) -> None:
    """Does a model copy its training images? Copies, quality and leakage, into audit.json and report.html.

    Interrupted, it goes on with the images drawn so far. Several MODELs are compared on the same data, and drawn from
    alike: 1000 images, seed 0, 50 steps unless told otherwise.

    Examples:

        ret-fl audit runs/mine

        ret-fl audit runs/mine runs/central --baseline runs/central

        ret-fl audit someones-pipeline --data photos --reference other-photos --image-size 64
    """
    from ret_fl.audit.inputs import Options
    from ret_fl.audit.tables import comparison_table
    from ret_fl.audit.verdict import verdict
    from ret_fl.auditing import (
        SAMPLES,
        Drawing,
        audit_folder,
        audit_model,
        is_run,
        open_data,
        own_auditors,
        own_drawing,
        prompts_of,
    )
    from ret_fl.comparison import checkpoint_models, compare
    from ret_fl.dataspec import told_split
    from ret_fl.devices import limit_threads, resolve_device
    from ret_fl.engines import find_app_code

    if missing := [str(model) for model in models if not model.exists()]:
        raise stop(f"{missing[0]} does not exist: name a run, a pipeline, a folder of images or a .npy")
    if baseline is not None and baseline not in models:
        raise stop(f"--baseline {baseline} is not among the models: name it as one of them, too")
    limit_threads(threads)
    find_app_code(Path())
    source = data or next((str(m) for m in models if is_run(m)), "")
    alone = len(models) == 1 and not early_stop
    folder = out or Path("audits")
    try:
        if not source:
            raise ValueError(
                "--data is missing: name the training images (no MODEL is a run of ret-fl, which knows them)"
            )
        named: dict[str, Any] = {"samples": samples, "seed": seed, "steps": steps, "guidance": guidance}
        drawing = replace(
            own_drawing(models[0]) if alone else Drawing(),
            **{name: value for name, value in named.items() if value is not None},
            image_size=image_size, channels=channels.value,
        )  # fmt: skip
        asked = _prompts(prompts) if prompts else prompts_of(source, drawing.samples)
        drawing = replace(drawing, prompts=asked)
        options = Options(
            threshold=threshold, members=members, seed=drawing.seed, device=resolve_device(device), memory_mb=memory_mb
        )
        if auditor:
            options = replace(options, auditors="+".join(auditor), auditor_options=auditor_options)
        elif auditor_options:
            raise ValueError("--auditor-options: name the --auditor they are for")
        elif alone:
            options = own_auditors(models[0], options)
        if alone:
            folder = out or audit_folder(
                models[0], drawing, options, source, reference or None, held_out or None,
                features=features or (), leakage=leakage,
            )  # fmt: skip
        if split := told_split(source):
            typer.echo(split)
        with _progress() as (on_stage, on_drawn):
            if alone:
                audits = [
                    audit_model(
                        models[0], source, reference=reference or None, held_out=held_out or None,
                        features=features or (), out=folder, drawing=drawing, options=options, leakage=leakage,
                        on_stage=on_stage, on_drawn=on_drawn,
                    )
                ]  # fmt: skip
                base = None
            else:
                real = open_data(source, reference or None, held_out or None, drawing)
                curve = checkpoint_models(early_stop or (), folder / "checkpoints")
                audits, base = compare(
                    models, real, folder, baseline=baseline, early_stop=curve, features=features or (),
                    drawing=drawing, options=options, leakage=leakage, on_stage=on_stage, on_drawn=on_drawn,
                )  # fmt: skip
    except (ValueError, OSError) as error:
        raise stop(error) from None
    except KeyboardInterrupt:
        kept = any(folder.glob(f"**/{SAMPLES}/*/*.npz"))
        told = f"the images drawn so far are kept in {folder}, and the same command goes on with them" if kept else ""
        raise stop(f"\ninterrupted; {told or 'no images were drawn yet'}", INTERRUPTED) from None
    if len(audits) > 1:
        wide_console().print(comparison_table(audits, base))
    for found in audits:
        for text in found.warnings:
            _warn(f"{found.model.name}: {text}")
    for found in audits:
        typer.secho(verdict(found, base if found is not base else None), bold=True)
    typer.secho(f"\nResults: {folder}", fg=typer.colors.GREEN, bold=True)
    if alone and out is None and is_run(models[0]) and folder != models[0] / "audit":
        typer.echo(f"It measures otherwise than the audit at the run's end, which stays as it is in {models[0]}/audit.")
    for path in sorted([*folder.glob("*.html"), *folder.glob("*/report.html"), *folder.glob("*.png")]):
        typer.echo(f"  {path.relative_to(folder)}")


def report(
    audits: Annotated[list[Path], typer.Argument(help="Folders of audits, or of runs that have one.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Which of them the others are compared with.")
    ] = None,
    early_stop: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Audits of one training at growing lengths, in order.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="[default: report.html in the first]", show_default=False)
    ] = None,
) -> None:
    """Write report.html again from audits made before, of one or of several side by side. Nothing is measured."""
    from ret_fl.audit.counterparts import other_data_warning
    from ret_fl.audit.folder import PAGE, find_audit, load_audit
    from ret_fl.audit.report import write_report
    from ret_fl.audit.tables import comparison_table
    from ret_fl.audit.verdict import verdict

    if baseline is not None and baseline not in audits:
        raise stop(f"--baseline {baseline} is not among the audits: name it as one of them, too")
    try:
        found = [load_audit(folder) for folder in audits]
        curve = [load_audit(folder)[0] for folder in early_stop or ()]
        page = out or find_audit(audits[0]) / PAGE
    except (ValueError, OSError) as error:
        raise stop(error) from None
    numbers = [audit for audit, _ in found]
    base = numbers[audits.index(baseline)] if baseline is not None else None
    main, pictures = next(((a, p) for a, p in found if a is not base), found[0])
    others = [a for a in numbers if a is not main]
    if mixed := other_data_warning([main, *others, *curve]):
        _warn(mixed)
    write_report(page, main, pictures, baseline=base if base is not main else None, others=others, early_stop=curve)
    if len(numbers) > 1:
        wide_console().print(comparison_table(numbers, base))
    typer.secho(verdict(main, base if base is not main else None), bold=True)
    typer.echo(f"report: {page}")


def _warn(text: str) -> None:
    typer.secho(f"warning: {text}", fg=typer.colors.YELLOW, err=True)


def _prompts(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())


@contextmanager
def _progress() -> Iterator[tuple[Stage, Drawn]]:
    """A bar while images are drawn, a spinner while something is measured."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("opening", total=None)

        def on_stage(stage: str) -> None:
            progress.update(task, description=stage, total=None)
            if not progress.console.is_terminal:
                typer.echo(stage)

        def on_drawn(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield on_stage, on_drawn
