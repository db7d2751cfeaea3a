"""`ret-fl data check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl.cli_options import PresetOption, SetOption, stop, wide_console

if TYPE_CHECKING:
    from ret_fl.config import RunConfig
    from ret_fl.data.check import DataCheck, Groups

app = typer.Typer(no_args_is_help=True, help="Datasets.")
FINDINGS = 3
"""Exit code for data that can be used but has something to look at."""


@app.callback()
def data() -> None:
    """Datasets."""


@app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="DATA", show_default=False)] = "",
    preset: PresetOption = None,
    changes: SetOption = None,
    near: Annotated[
        bool,
        typer.Option("--near/--no-near", help="Look for near-duplicates, by pHash unless data.near-duplicates is set."),
    ] = True,
    bits: Annotated[
        int, typer.Option(min=0, max=31, help="Bits of 64 in which the hashes of near-duplicates differ at most.")
    ] = 4,
    shown: Annotated[int, typer.Option(min=0, help="Examples named of each finding.")] = 5,
) -> None:
    """Read a dataset as a run would, and say what is in it and what is wrong with it.

    DATA is a folder of images, parquet files, a save_to_disk folder, CIFAR's .tar.gz or folder, a hub dataset as
    owner/name, or a built-in source; without it, what --preset and --set say.

    Counts by split and class, sizes and modes, unreadable images, exact and near-duplicates, and the fingerprint by
    which server and clients agree that they have the same data. 60,000 images of 32x32 take about a minute.

    Captions are read, and counted, where model.init-from is a text-to-image model, or is not on this machine.

    Exit code: 0 nothing to report, 1 it cannot be used, 3 there are unreadable images or duplicates, or no captions
    for a text-to-image model.

    Examples:

        ret-fl data check photos --set data.image-size=64

        ret-fl data check --preset simulations/presets/cifar10.toml

        ret-fl data check digits --set data.near-duplicates=cosine --set data.near-threshold=.98
    """
    from ret_fl.config import ConfigError
    from ret_fl.data.check import check_data
    from ret_fl.diffusion.text_to_image import data_read, wants_captions

    try:
        config = _settings(what, preset, changes)
        text = wants_captions(config)
        read = data_read(config) if text is False else config.data
        found = check_data(read, near=bits if near else None, text=text)
    except ConfigError as error:
        raise stop(error) from None
    _print(found, shown)
    if found.problems():
        raise typer.Exit(FINDINGS)


def _settings(what: str, preset: Path | None, changes: list[str] | None) -> RunConfig:
    from ret_fl.config import RunConfig
    from ret_fl.dataspec import is_builtin, require_named, source_of
    from ret_fl.settings import from_options

    settings = from_options(preset, changes)
    if what:
        require_named(what, None, None)
        builtin = is_builtin(what)
        settings |= {"data.source": what if builtin else source_of(what), "data.path": "" if builtin else what}
    return RunConfig.from_flat(settings)


def _print(found: DataCheck, shown: int) -> None:
    from rich.table import Table

    console = wide_console()
    channels, height, width = found.image_shape
    console.print(f"{channels}x{height}x{width} as trained on; files: ", end="", highlight=False)
    console.print(", ".join(f"{count:,} of {form}" for form, count in list(found.originals.items())[:10]))
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for split in found.counts:
        table.add_column(split, justify="right")
    table.add_row("all", *(f"{count:,}" for count in found.counts.values()))
    classes = list(found.classes.values())
    for label in range(len(classes[0]) if classes else 0):
        table.add_row(str(label), *(f"{counts[label]:,}" for counts in classes))
    console.print(table)
    if told := found.told:
        console.print(
            f"{told.captions:,} captions, {told.distinct:,} distinct; {told.several:,} images have several",
            highlight=False,
        )
    console.print(f"fingerprint {found.fingerprint}", highlight=False)
    if found.untold:
        console.print(f"fingerprint {found.untold} without captions, unless model.init-from draws from text")
    problems = found.problems()
    if not problems:
        looked = "" if found.near is not None else " (near-duplicates not looked for)"
        typer.secho(f"nothing to report{looked}", fg=typer.colors.GREEN)
    for problem in problems:
        typer.secho(problem, fg=typer.colors.YELLOW)
    _examples("unreadable", list(found.unreadable[:shown]))
    for kind, groups in (("equal", found.exact), ("alike", found.near or [])):
        _examples(kind, _named(groups, found, shown))


def _named(groups: Groups, found: DataCheck, shown: int) -> list[str]:
    most = 6
    return [
        ", ".join(found.name(int(row)) for row in rows[:most]) + (", ..." if len(rows) > most else "")
        for rows in groups[:shown]
    ]


def _examples(kind: str, lines: list[str]) -> None:
    for line in lines:
        typer.echo(f"  {kind}: {line}")
