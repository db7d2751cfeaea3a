"""The `ret-fl` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl import cli_audit, cli_data, cli_deploy, cli_doctor, cli_policies, cli_sample, cli_serve, cli_status
from ret_fl.cli_options import (
    INTERRUPTED,
    AppOption,
    OutOption,
    PresetOption,
    SetOption,
    VerboseOption,
    check_data,
    check_plugins,
    plural,
    run_settings,
    stop,
    wide_console,
)

if TYPE_CHECKING:
    from ret_fl.config import RunConfig
    from ret_fl.rundir import RunDir

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train image diffusion models that do not copy their training data (Redistribute Ensemble Training).",
    epilog="Start with: ret-fl run --preset simulations/presets/digits.toml",
)


@app.command()
def run(
    preset: PresetOption = None,
    changes: SetOption = None,
    out: OutOption = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Go on with an interrupted run.")] = None,
    engine: Annotated[
        str, typer.Option(help="'flwr': Flower's simulation, clients in parallel; 'inline': all in this process.")
    ] = "flwr",
    nodes: Annotated[
        int, typer.Option(min=0, help="Clients to simulate; 0: one a shard. With fewer, shards take turns.")
    ] = 0,
    app_folder: AppOption = Path(),
    verbose: VerboseOption = False,
) -> None:
    """Train: K shards, K proxies, one averaged model, and pictures and numbers of what came out.

    Any setting of `ret-fl config` can be changed by --set or in a preset. Ctrl-C is safe: --resume goes on after the
    last finished round.
    """
    from ret_fl.config import ConfigError
    from ret_fl.engines import ENGINES, RunFailedError, check_app

    if engine not in ENGINES:
        raise stop(f"--engine must be one of {', '.join(ENGINES)} (got {engine!r})")
    try:
        app_path = check_app(app_folder)
        directory, config = (
            _resumed(resume, preset, changes, app_path) if resume else _begun(preset, changes, out, app_path)
        )
    except (ConfigError, OSError) as error:
        raise stop(error) from None
    try:
        _drive(engine, app_path, directory, config, nodes or config.shards, resuming=bool(resume), verbose=verbose)
    except RunFailedError as error:
        raise stop(error) from None
    except KeyboardInterrupt:
        raise stop(f"\nstopped; go on with: ret-fl run --resume {directory.path}", INTERRUPTED) from None
    typer.secho(f"\nResults: {directory.path}", fg=typer.colors.GREEN, bold=True)
    for file, what in (
        ("audit/report.html", "does it copy? copies, quality, leakage"),
        ("summary.md", "what came out, on one page"),
        ("final", "the model, for diffusers"),
        ("samples.png", "images it draws"),
        ("copies.png", "those closest to a training image, beside it"),
        ("curves.png", "loss, skips, moves"),
    ):
        if (directory.path / file).exists():
            typer.echo(f"  {file:<18} {what}")
    typer.echo(next(line for line in directory.summary.read_text().splitlines()[1:] if line).replace("**", ""))


def _begun(
    preset: Path | None, changes: list[str] | None, out: Path | None, app_path: Path
) -> tuple[RunDir, RunConfig]:
    from ret_fl.settings import new_run

    settings = run_settings(preset, changes, app_path)
    check_data(settings)
    return new_run(settings, out)


def _resumed(resume: Path, preset: Path | None, changes: list[str] | None, app_path: Path) -> tuple[RunDir, RunConfig]:
    from ret_fl.checkpoint import any_checkpoint
    from ret_fl.rundir import RunDir
    from ret_fl.settings import change_run, from_options

    run, settings = RunDir.existing(resume), from_options(preset, changes)
    check_plugins(run.read_config().to_flat() | settings, app_path, dealt=any_checkpoint(run.checkpoints))
    return change_run(resume, settings)


def _drive(
    engine: str, app_path: Path, directory: RunDir, config: RunConfig, nodes: int, *, resuming: bool, verbose: bool
) -> None:
    from ret_fl.engines import ENGINES
    from ret_fl.progress import RunProgress

    shards, rounds = plural(config.shards, "shard"), plural(config.num_server_rounds, "round")
    typer.echo(f"{directory.path}: {shards}, {rounds}, engine {engine}")
    with RunProgress(directory, config.num_server_rounds, quiet=verbose):
        ENGINES[engine](app_path, directory, config, nodes, resuming, verbose)


@app.command()
def config(
    section: Annotated[
        str, typer.Argument(help="Only settings that begin so: agc, data, ...", show_default=False)
    ] = "",
    preset: PresetOption = None,
    changes: SetOption = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print as a preset file, to edit and give to --preset.")] = False,
) -> None:
    """Every setting, or those of one SECTION: value, what is allowed, what it means."""
    from ret_fl.config import ConfigError, RunConfig, describe
    from ret_fl.settings import from_options

    try:
        chosen = RunConfig.from_flat(from_options(preset, changes))
    except ConfigError as error:
        raise stop(error) from None
    if toml:
        from ret_fl.settings import to_toml

        typer.echo(to_toml({k: v for k, v in chosen.to_flat().items() if k.startswith(section)}), nl=False)
        return
    settings = [s for s in describe(chosen) if s.key.startswith(section)]
    if not settings:
        raise stop(f"no setting begins with {section!r}")
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "allowed", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "setting")
    above = ""
    for s in settings:
        prefix = s.key.rpartition(".")[0]
        if prefix != above:
            above = prefix
            table.add_section()
            table.add_row(f"[bold]{prefix}", "", "", "")
        value = f'"{s.value}"' if isinstance(s.value, str) else str(s.value).lower()
        table.add_row(s.key, value, s.allowed.replace("[", "\\["), s.meaning.replace("[", "\\["))
    wide_console().print(table)


@app.command()
def presets(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Tell all of these presets.")] = None,
    app_folder: AppOption = Path(),
) -> None:
    """The presets of simulations/presets, controls last; of those named, command, data and cost.

    Sizes are counted and computed by `python -m benchmarks.recipes`, which on a GPU measures a step, too, and for
    text-to-image by `python -m benchmarks.text_to_image`.
    """
    from ret_fl.config import ConfigError
    from ret_fl.engines import check_app
    from ret_fl.presets import all_presets, named

    try:
        found = named(all_presets(check_app(app_folder)), names or [])
    except ConfigError as error:
        raise stop(error) from None
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    console = wide_console()
    if not names:
        table = Table(box=None, pad_edge=False, show_header=False)
        for preset in found:
            table.add_row(f"[bold]{preset.name}", escape(preset.title))
        console.print(table)
        console.print(f"\nCommand, data and size of one: ret-fl presets {found[0].name}", highlight=False)
        return
    for preset in found:
        console.print(f"[bold]{preset.name}[/]  {escape(preset.title)}", highlight=False)
        for line in (preset.command, f"data: {preset.data}", f"size: {preset.size}", ""):
            console.print(Padding(escape(line), (0, 0, 0, 4), expand=False), highlight=False)


app.command()(cli_sample.sample)


@app.command()
def show(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder.")],
    sample: Annotated[int, typer.Option(min=-1, help="What the ledger knows of this sample ID.")] = -1,
) -> None:
    """What a run did: rounds, shards, the samples it found memorized or badly fitted."""
    from ret_fl.config import ConfigError
    from ret_fl.show import show_run, show_sample

    try:
        if sample >= 0:
            show_sample(run_dir, sample)
        else:
            show_run(run_dir)
    except ConfigError as error:
        raise stop(error) from None


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="FILE.toml [OPTIONS]",
)
def study(context: typer.Context) -> None:
    """Train and audit a grid of methods, datasets and seeds, and write pages of results; --help says how."""
    import os
    import subprocess
    import sys

    from ret_fl.config import ConfigError
    from ret_fl.engines import app_environment, check_app

    try:
        folder = check_app(Path())
    except ConfigError as error:
        raise stop(error) from None
    command = [sys.executable, "-P", "-m", "simulations.study", *context.args]
    raise typer.Exit(subprocess.run(command, env=os.environ | app_environment(folder), check=False).returncode)


app.command()(cli_audit.audit)
app.command()(cli_audit.report)
app.command()(cli_policies.policies)
app.command()(cli_status.status)
app.command()(cli_doctor.doctor)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_deploy.app, name="deploy")
app.command()(cli_serve.serve_samples)
