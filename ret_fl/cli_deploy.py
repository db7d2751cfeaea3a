"""`ret-fl deploy`: kits for real hosts, and a whole federation on loopback to try out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl.cli_options import (
    INTERRUPTED,
    AppOption,
    OutOption,
    PresetOption,
    SetOption,
    VerboseOption,
    check_data,
    plural,
    run_settings,
    stop,
)

if TYPE_CHECKING:
    from ret_fl.config import Scalar
    from ret_fl.deploy.federation import Federation
    from ret_fl.deploy.local import LocalFederation

app = typer.Typer(
    no_args_is_help=True,
    help="Run on several machines: certificates, keys and start-up files for every host; or all of it on loopback.",
)


@app.command()
def example() -> None:
    """Print a federation file to start from."""
    from ret_fl.deploy.federation import EXAMPLE

    typer.echo(EXAMPLE, nl=False)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="As `ret-fl deploy example` prints one.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the kit. An old one is brought up to date: its CA, node keys and signing key stay."
        ),
    ] = Path("kit"),
) -> None:
    """Make the kit: one folder a host with its keys, certificates, systemd unit, compose file and start script.

    Run it again after a change of the federation file or the preset it names, and to renew certificates.
    """
    from ret_fl.config import ConfigError
    from ret_fl.deploy.federation import read_federation
    from ret_fl.deploy.kit import write_kit

    try:
        federation = read_federation(file)
        kit = write_kit(federation, out)
    except (ConfigError, OSError) as error:
        raise stop(error) from None
    typer.secho(f"{kit.path}", bold=True)
    for folder, what in _contents(federation):
        typer.echo(f"  {folder:<16} {what}")


def _contents(federation: Federation) -> list[tuple[str, str]]:
    """What the kit's folders are for, in the order they are needed."""
    there = f"as {federation.folder}/kit"
    lines = [("superlink/", f"to {federation.superlink.host}, {there}-superlink")]
    if samples := federation.samples:
        lines.append(("samples/", f"to {samples.host}, {there}-samples: what serves the samples"))
    for host in federation.hosts:
        nodes = ", ".join(node.name for node in federation.on(host))
        lines.append((f"{host.name}/", f"to host {host.name}, {there}: SuperNodes {nodes}"))
    lines.append(("operator/", "stays with whoever submits runs: FLWR_HOME for `flwr`"))
    if federation.tls:
        lines.append(("operator/register", "registers the SuperNodes' keys, once the SuperLink runs"))
        lines.append(("ca/", "lock away: whoever has ca.key can pose as the SuperLink"))
    lines.append(("kubernetes.yaml", "all of it on a cluster; the folders become secrets"))
    return lines


@app.command()
def local(
    shards: Annotated[int, typer.Option(min=1, help="Shards, each with a SuperNode of its own.")] = 3,
    tls: Annotated[bool, typer.Option("--tls/--no-tls", help="TLS and node authentication.")] = True,
    stay: Annotated[
        bool, typer.Option("--stay", help="Train nothing; be there for runs of yours, until Ctrl-C.")
    ] = False,
    preset: PresetOption = None,
    changes: SetOption = None,
    out: OutOption = None,
    app_folder: AppOption = Path(),
    verbose: VerboseOption = False,
) -> None:
    """Start SuperLink and SuperNodes on loopback from a kit of their own, train on them, and end them all.

    They are what runs on separate hosts: processes of their own that speak HTTPS and prove who they are. Client
    processes are started anew for every order, so a round takes several seconds more than with `ret-fl run`.
    """
    from ret_fl.config import ConfigError
    from ret_fl.engines import RunFailedError, check_app

    if stay and (preset or changes or out):
        raise stop(
            "--stay trains nothing: leave out --preset, --set and --out; the `flwr run` it prints takes settings"
        )
    try:
        app_path = check_app(app_folder)
        if stay:
            _stay(app_path, shards, tls=tls)
        else:
            settings = {"min-nodes": shards} | run_settings(preset, changes, app_path) | {"shards": shards}
            _train(app_path, settings, out, tls=tls, verbose=verbose)
    except (ConfigError, OSError, RunFailedError) as error:
        raise stop(error) from None
    except KeyboardInterrupt:
        raise stop("\nstopped: nothing is left running", 0 if stay else INTERRUPTED) from None


def _train(app_path: Path, settings: dict[str, Scalar], out: Path | None, *, tls: bool, verbose: bool) -> None:
    from ret_fl.deploy.local import local_federation
    from ret_fl.engines import submit
    from ret_fl.progress import RunProgress
    from ret_fl.settings import new_run

    check_data(settings)
    directory, config = new_run(settings, out)
    with (
        _temporary() as folder,
        local_federation(folder, config.shards, directory.path / "flower.log", tls=tls, say=typer.echo) as running,
    ):
        typer.echo(_describe(running))
        rounds = plural(config.num_server_rounds, "round")
        typer.echo(f"{directory.path}: {plural(config.shards, 'shard')}, {rounds}")
        with RunProgress(directory, config.num_server_rounds, quiet=verbose):
            submit(app_path, directory, config, running.environment, verbose=verbose)
    typer.secho(f"\nAll processes ended. Results: {directory.path}", fg=typer.colors.GREEN, bold=True)


def _stay(app_path: Path, shards: int, *, tls: bool) -> None:
    from ret_fl.deploy.local import local_federation

    with (
        _temporary() as folder,
        local_federation(folder, shards, folder / "flower.log", tls=tls, say=typer.echo) as running,
    ):
        typer.echo(_describe(running))
        typer.echo(f"Log: {folder / 'flower.log'}\nSubmit a run, in another terminal:\n")
        typer.echo(f"    export FLWR_HOME={running.kit.operator}")
        typer.echo(
            f"    flwr run {app_path} --stream --run-config 'shards={shards} out=\"{Path.cwd() / 'runs' / 'local'}\"'"
        )
        typer.echo("    flwr list\n\nCtrl-C ends everything and deletes the folder.")
        running.wait()


def _describe(running: LocalFederation) -> str:
    federation = running.federation
    how = "TLS, keys registered" if federation.tls else "no TLS: anyone on this machine can join"
    nodes = ", ".join(node.name for node in federation.supernodes)
    return f"ready: SuperLink {federation.superlink.address} ({how}), SuperNodes {nodes}"


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ret-fl-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
