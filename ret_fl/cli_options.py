"""What the commands of `ret-fl` share."""

from __future__ import annotations

from typing import Annotated

import typer

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, help="CPU threads. [default: OMP_NUM_THREADS, else 1]", show_default=False)
]


def stop(message: object, code: int = 1) -> typer.Exit:
    """Say in red what is wrong, and give what to raise."""
    typer.secho(str(message), fg=typer.colors.RED, err=True)
    return typer.Exit(code)
