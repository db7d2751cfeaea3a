"""What the commands of `ret-fl` share."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ret_fl.config import Scalar

INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, help="CPU threads. [default: OMP_NUM_THREADS, else 1]", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, as in --set agc.mem-ratio=2. Repeatable."),
]
PresetOption = Annotated[
    Path | None, typer.Option("--preset", metavar="FILE.toml", help="Settings to start from; --set goes on top.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder of the results. [default: runs/<time>-<name>]", show_default=False)
]
AppOption = Annotated[Path, typer.Option("--app", help="The Flower app: this repository or an edited copy.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show Flower's log instead of progress.")]


def stop(message: object, code: int = 1) -> typer.Exit:
    """Say in red what is wrong, and give what to raise."""
    typer.secho(str(message), fg=typer.colors.RED, err=True)
    return typer.Exit(code)


def plural(count: int, thing: str) -> str:
    """'1 shard', '2 shards'."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def wide_console() -> Console:
    """A console for tables: in a file or a pipe there is no width to fit, unless COLUMNS names one."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def run_settings(preset: Path | None, changes: list[str] | None, app: Path = Path()) -> dict[str, Scalar]:
    """Settings of a new run, with all plug-ins checked before any folder is made (the config alone cannot)."""
    from ret_fl.settings import from_options

    settings = from_options(preset, changes)
    check_plugins(settings, app)
    return settings


def check_plugins(settings: Mapping[str, Scalar], app: Path, *, dealt: bool = False) -> None:
    """Raise `ConfigError` for a plug-in, strategy or accountant that is not there.

    dealt: whether the run's samples are dealt already.
    """
    from ret_fl.aggregation import make_base
    from ret_fl.config import RunConfig
    from ret_fl.engines import find_app_code
    from ret_fl.loading import points_of, require_plugins
    from ret_fl.redistribution import parse_policy

    find_app_code(app)
    config = RunConfig.from_flat(settings)
    require_plugins(config, points_of(dealt))
    parse_policy(config.redistribution.policy, config.redistribution.options)
    make_base(config)


def check_data(settings: dict[str, Scalar]) -> None:
    """Say what the data is, or what is wrong with it, before any folder is made and any engine started."""
    from ret_fl.config import RunConfig
    from ret_fl.data.sources import deal, load_splits
    from ret_fl.devices import resolve_device
    from ret_fl.diffusion.models import check_pretrained_schedule
    from ret_fl.diffusion.text_to_image import data_read, require_captions

    config = RunConfig.from_flat(settings)
    resolve_device(config.device)
    check_pretrained_schedule(config.model, config.diffusion)
    data = load_splits(data_read(config))
    require_captions(config, data.train)
    deal(config, data)
    typer.echo(data.describe())
    load_splits.cache_clear()  # training has the memory to itself
