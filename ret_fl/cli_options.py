"""What the commands of `ret-fl` share."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, help="CPU threads. [default: OMP_NUM_THREADS, else 1]", show_default=False)
]


def stop(message: object, code: int = 1) -> typer.Exit:
    """Say in red what is wrong, and give what to raise."""
    typer.secho(str(message), fg=typer.colors.RED, err=True)
    return typer.Exit(code)


def wide_console() -> Console:
    """A console for tables: in a file or a pipe there is no width to fit, unless COLUMNS names one."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
