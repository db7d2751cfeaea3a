"""Studies: a grid of methods, datasets and seeds, each trained by the real apps, audited, and set side by side.

    python -m simulations.study simulations/studies/small.toml          # also: ret-fl study FILE.toml

A study file names settings common to all runs, datasets, and methods as settings on top, those of a control by its
name. Every cell (dataset, method, seed) trains on the inline engine in a process of its own with one thread; at each
of the method's points, given as shares of the whole training, the model is audited with the sampling noise of its seed.
Done cells are in the results file, and are not run again; a cell that was broken off goes on after its last round.
Under a learning-rate schedule, which knows its end, every point is a training of its own.

A table `[pretraining]` makes it a study of fine-tuning: a model is trained by these settings on each dataset first, and
all methods and seeds start from it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ret_fl.config import ConfigError, RunConfig
from ret_fl.rundir import RunDir
from simulations.grid import Cell, CellWaitsError, Pretraining, Study
from simulations.results import ResultsFile, Row, measured, same_training

POLL_SECONDS = 2.0
ROW = "row.jsonl"


def _train(folder: Path, config: RunConfig) -> RunDir:
    """Train on the inline engine what is not trained yet of `config`, in a new folder or going on in an old one."""
    from clients.app import app as client_app
    from ret_fl.settings import change_run, new_run
    from server.app import app as server_app
    from simulations.inline import run_inline

    if (folder / "config.json").is_file():
        run, config = change_run(folder, {"num-server-rounds": config.num_server_rounds})
        flat = config.to_flat() | {"resume": str(folder)}
    else:
        run, config = new_run(config.to_flat(), folder)
        flat = config.to_flat()
    run_inline(server_app, client_app, flat, config.shards)
    return run


def run_cell(cell: Cell, root: Path, results: ResultsFile) -> None:
    """Train and audit what is missing of a cell, in this process; each point is kept in its `point_folder`."""
    from ret_fl.audit.folder import NUMBERS, PICTURES, load_audit

    more = cell.rate(results)
    if not _pretrained(cell, root):
        first = Pretraining(cell.study, cell.dataset)
        _train(root / first.name, first.config())
    for share in cell.missing(results):
        config = cell.config(share, more)
        kept, folder = point_folder(root / cell.name, share), cell.folder(root, share)
        point = ResultsFile(kept / ROW)
        if point.find(cell.key, share, config):
            continue  # audited before the study was broken off
        placed = config
        if cell.study.pretraining:
            start = Pretraining(cell.study, cell.dataset).path(root)
            placed = RunConfig.from_flat(config.to_flat() | {"model.init-from": str(start)})
        if (folder / "config.json").is_file():
            _require_same(cell, RunDir.existing(folder), placed)
        run = _train(folder, placed)
        audit, _ = load_audit(run.audit)
        row = Row(
            dataset=cell.dataset,
            method=cell.method,
            seed=cell.seed,
            share=share,
            settings=point.difference(config),
            **measured(audit, run.rows()),
        )
        kept.mkdir(parents=True, exist_ok=True)
        for name in (NUMBERS, PICTURES):
            shutil.copy2(run.audit / name, kept / name)
        point.add([row])


def _require_same(cell: Cell, run: RunDir, config: RunConfig) -> None:
    """A folder of an earlier training is gone on with only if it is the same one, and not already further."""
    if not same_training(run.read_config(), config):
        raise ConfigError(f"{run.path} holds a run with other settings than {cell.name} has now: remove that folder")
    rows = run.rows()
    if rows and rows[-1]["round"] > config.num_server_rounds:
        raise ConfigError(
            f"{run.path} is at round {rows[-1]['round']} already, {cell.name} wants to be audited at "
            f"{config.num_server_rounds}: remove that folder to train it again"
        )


def point_folder(folder: Path, share: float) -> Path:
    """Where a cell keeps the row and the audit of a point."""
    return folder / "points" / f"{share:.4f}"


# Running a study


class CellsFailedError(RuntimeError):
    """Some cells of a study failed; the message names them and their logs."""


def run_study(path: Path, root: Path, results_path: Path, jobs: int) -> None:
    """Run what is missing. Raises `CellsFailedError` at the end if some failed; the others are done then."""
    study, results = Study.read(path), ResultsFile(results_path)
    root.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in study.cells() if cell.missing(results)]
    failed: list[str] = []
    running: dict[Future[int], tuple[Cell, subprocess.Popen[bytes]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
    work = sum(cell.length for cell in waiting)
    finished, count = 0.0, len(waiting)
    with Progress(*columns, *times, speed_estimate_period=600) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("study", total=work or 1, completed=0 if work else 1)
        try:
            while waiting or running:
                for cell in [c for c in waiting if _ready(c, results)]:
                    pretraining = {c.dataset for c, _ in running.values() if not _pretrained(c, root)}
                    if len(running) == jobs or cell.dataset in pretraining:
                        continue
                    waiting.remove(cell)
                    process = _start(path, cell, root, results_path)
                    running[pool.submit(process.wait)] = cell, process
                if not running:
                    failed += [f"{cell.name}: the run whose skips it takes over failed" for cell in waiting]
                    break
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    cell, process = running.pop(future)
                    finished += cell.length
                    if process.returncode:
                        failed.append(f"{cell.name}: see {root / cell.name}.log")
                    for share in cell.missing(results):
                        results.take(ResultsFile(point_folder(root / cell.name, share) / ROW))
                now = sum(cell.trained(root) for cell, _ in running.values())
                left = count - len(waiting) - len(running)
                progress.update(task, completed=finished + now, description=f"{left}/{count} trainings")
        finally:
            for _, process in running.values():
                process.terminate()
    if failed:
        raise CellsFailedError("these failed, the rest is done:\n  " + "\n  ".join(failed))


def _pretrained(cell: Cell, root: Path) -> bool:
    """Whether what a cell starts from is there; the first cell of a dataset trains it."""
    return not cell.study.pretraining or Pretraining(cell.study, cell.dataset).done(root)


def _ready(cell: Cell, results: ResultsFile) -> bool:
    try:
        cell.rate(results)
    except CellWaitsError:
        return False
    return True


def _start(path: Path, cell: Cell, root: Path, results_path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simulations.study", str(path), "--out", str(root)]
    command += ["--results", str(results_path), "--cell", cell.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (root / f"{cell.name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def main(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The study, as in simulations/studies/.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the trainings. [default: runs/study-<name>]", show_default=False)
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Results. [default: docs/results/<name>.jsonl]", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, one thread each.")] = os.cpu_count() or 1,
    render_only: Annotated[bool, typer.Option("--render", help="Only write the pages of what is there.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Only say what is done and what is missing.")] = False,
    cell_name: Annotated[str, typer.Option("--cell", metavar="NAME", help="Train this cell only, here.")] = "",
) -> None:
    """Train and audit a grid of methods, datasets and seeds, and set them side by side.

    Results are pages, figures and a JSON-lines file; what is in that file is not run again, so a study goes on where
    it was broken off, on this machine or another.
    """
    from simulations.pages import write_pages

    root = (out or Path("runs") / f"study-{file.stem}").absolute()
    results_path = (results or Path("docs/results") / f"{file.stem}.jsonl").absolute()
    try:
        study = Study.read(file)
        if cell_name:
            found = ResultsFile(results_path)
            run_cell(_named(study, cell_name), root, found)
            return
        if listing:
            _list(study, ResultsFile(results_path))
            return
        if not render_only:
            run_study(file.absolute(), root, results_path, jobs)
        page = write_pages(study, file, ResultsFile(results_path), root)
    except (ConfigError, CellsFailedError, CellWaitsError, ValueError) as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    typer.echo(f"Results: {page}")


def _named(study: Study, name: str) -> Cell:
    cells = {cell.name: cell for cell in study.cells()}
    if name not in cells:
        raise ConfigError(f"--cell: no {name!r} in this study; it has {', '.join(cells)}")
    return cells[name]


def _list(study: Study, results: ResultsFile) -> None:
    for cell in study.cells():
        missing = cell.missing(results)
        state = "done" if not missing else "missing at " + ", ".join(f"{share:g}" for share in missing)
        typer.echo(f"{cell.name:<40} {state}")


if __name__ == "__main__":
    typer.run(main)
