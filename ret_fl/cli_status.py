"""`ret-fl status`: a run or a SuperLink, live."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl.cli_options import stop, wide_console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType


def status(
    target: Annotated[
        str, typer.Argument(metavar="RUN_DIR|SUPERLINK", help="A run's folder; or a SuperLink of Flower's config.")
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Print it once; so it is, too, where there is no terminal.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    prometheus: Annotated[
        str,
        typer.Option(metavar="[HOST:]PORT", help="Show nothing; answer Prometheus at /metrics there until Ctrl-C."),
    ] = "",
) -> None:
    """How a run is doing now: shards, nodes, their speed, when they were last heard of, losses, skips; Ctrl-C ends it.

    RUN_DIR is read where the server writes it. A SUPERLINK is asked by `flwr`: its last runs, its SuperNodes, and how
    the newest run is doing, by its log. With the kit's operator folder as FLWR_HOME the federation's name is such a
    SUPERLINK.
    """
    from rich.live import Live

    from ret_fl.config import ConfigError
    from ret_fl.rundir import RunDir
    from ret_fl.status import read_status, render
    from ret_fl.superlink_status import superlink_status

    look: Callable[[], tuple[RenderableType, bool]]
    if Path(target).expanduser().exists():

        def look() -> tuple[RenderableType, bool]:
            found = read_status(RunDir.existing(target))
            return render(found), found.finished

    elif "/" in target:
        raise stop(f"no folder {target}: a run has none before its server has begun it")
    else:

        def look() -> tuple[RenderableType, bool]:
            return superlink_status(target), False

    console = wide_console()
    try:
        if prometheus:
            _export(target, prometheus)
            return
        shown, over = look()
        if once or not console.is_terminal or over:
            console.print(shown)
            return
        with Live(shown, console=console, auto_refresh=False) as live:
            while not over:
                time.sleep(every)
                shown, over = look()
                live.update(shown, refresh=True)
    except ConfigError as error:
        unknown = not Path(target).expanduser().exists() and "not found in the Flower configuration" in str(error)
        nowhere = f"no folder {target} (yet), nor such a SuperLink: " if unknown else ""
        raise stop(f"{nowhere}{error}") from None
    except KeyboardInterrupt:
        return


def _export(target: str, address: str) -> None:
    from ret_fl.config import ConfigError
    from ret_fl.rundir import RunDir

    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"--prometheus takes PORT or HOST:PORT (got {address!r})")
    try:
        from ret_fl.prometheus import serve
    except ModuleNotFoundError:
        raise ConfigError(
            "--prometheus needs the package prometheus-client: pip install 'ret-fl[prometheus]'"
        ) from None
    if not Path(target).expanduser().is_dir():
        typer.echo(f"waiting for {target}: a run's server makes it when it begins")
    while not Path(target).expanduser().is_dir():
        time.sleep(1)
    run = RunDir.existing(target)
    typer.echo(f"http://{host or '127.0.0.1'}:{port}/metrics: {run.path}")
    serve(run, host or "127.0.0.1", int(port))
