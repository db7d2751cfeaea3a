"""What the commands of `ret-fl` share."""

from __future__ import annotations

import os
import sys
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


def read_settings(preset: Path | None, changes: list[str] | None) -> dict[str, Scalar]:
    """Those of a preset, with --set on top. Raises `ConfigError`."""
    from ret_fl.settings import parse_change, read_preset

    flat = read_preset(preset) if preset else {}
    return flat | dict(parse_change(text) for text in changes or [])


def stop(message: object, code: int = 1) -> typer.Exit:
    """Say in red what is wrong, and give what to raise."""
    typer.secho(str(message), fg=typer.colors.RED, err=True)
    return typer.Exit(code)


def wide_console() -> Console:
    """A console for tables: in a file or a pipe there is no width to fit, unless COLUMNS names one."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
