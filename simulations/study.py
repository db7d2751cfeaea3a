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

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.rundir import RunDir
from ret_fl.settings import flatten, read_preset
from simulations.results import LOCAL, ResultsFile, Row, measured, same_training

POLL_SECONDS = 2.0
ROW = "row.jsonl"


CONTROLS = Path(__file__).parent / "presets" / "controls"
EARLY_STOPPING = "early-stopping"
NOT_A_CONTROLS = ("name", "num-server-rounds")
"""Settings of a control's preset that a study has of its own. How far a method trains its points say."""


@cache
def control_settings(name: str) -> Mapping[str, Scalar]:
    """What a control sets; not what the benchmark sets that its preset runs on. Of '' nothing.

    Raises `ConfigError` for one that there is not, and for one that only trains less: how far is not the control's.
    """
    if not name:
        return {}
    if name == EARLY_STOPPING:
        raise ConfigError(
            f'control = "{name}": its length is the study\'s. Write control = "central" with points = [0.2]'
        )
    path = CONTROLS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONTROLS.glob("*.toml")))
        raise ConfigError(f"no control {name!r}; there are {known}")
    return {k: v for k, v in read_preset(path, within=CONTROLS).items() if k not in NOT_A_CONTROLS}


class Part(BaseModel):
    """A table of a study file; keys are dashed, unknown ones refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True
    )


class Method(Part):
    """label: its name in tables. control: the name of a control (simulations/presets/controls) whose settings go on top
    of the study's and the dataset's. set: settings on top of all. points: shares of the whole training at which it is
    audited; first_seed_points: further ones, for the study's first seed only. datasets: fewer than the study's. seeds:
    others than the study's, on all datasets or on those that a table names. skips_of: for agc.mode "random", the
    method whose share of skipped draws is taken over."""

    label: str
    control: str = ""
    set: dict[str, Any] = {}
    points: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    first_seed_points: list[Annotated[float, Field(gt=0)]] = []
    datasets: list[str] = []
    seeds: list[int] | dict[str, list[int]] = []
    skips_of: str = ""

    def seeds_on(self, dataset: str, otherwise: list[int]) -> list[int]:
        """The seeds on a dataset; those of the study where there are no others."""
        own = self.seeds.get(dataset, []) if isinstance(self.seeds, dict) else self.seeds
        return own or otherwise


class Study(Part):
    """A study file. baseline: the method others are compared with. about: a paragraph for the page of results.

    pretraining: settings, on top of the study's and a dataset's, of the model that fine-tuning starts from.
    """

    title: str
    about: str = ""
    seeds: list[int] = Field([0], min_length=1)
    baseline: str = "central"
    summary: bool = False
    settings: dict[str, Any] = {}
    pretraining: dict[str, Any] = {}
    datasets: dict[str, dict[str, Any]] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises `ConfigError` naming what is wrong in the file."""
        try:
            with path.open("rb") as file:
                study = cls.model_validate(tomllib.load(file))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ConfigError(f"{path}: " + "; ".join(problems)) from None
        study._check(path)
        return study

    def _check(self, path: Path) -> None:
        for name, method in self.methods.items():
            by_dataset = list(method.seeds) if isinstance(method.seeds, dict) else []
            for key, named in (("datasets", method.datasets), ("seeds", by_dataset)):
                for dataset in named:
                    if dataset not in self.datasets:
                        raise ConfigError(f"{path}: methods.{name}.{key}: no dataset {dataset!r} in this study")
            if method.skips_of and method.skips_of not in self.methods:
                raise ConfigError(f"{path}: methods.{name}.skips-of: no method {method.skips_of!r} in this study")
        for cell in self.cells():
            try:
                cell.config()
                if self.pretraining:
                    Pretraining(self, cell.dataset).config()
            except ConfigError as error:
                raise ConfigError(f"{path}: methods.{cell.method}, datasets.{cell.dataset}: {error}") from None

    def cells(self) -> Iterator[Cell]:
        """Every cell, the first seed of all methods first, so that a broken-off study has a whole table early."""
        every = [
            (seed, dataset, name)
            for dataset in self.datasets
            for name, method in self.methods.items()
            if dataset in (method.datasets or self.datasets)
            for seed in method.seeds_on(dataset, self.seeds)
        ]
        for seed, dataset, name in sorted(every, key=lambda cell: cell[0]):
            yield Cell(self, dataset, name, seed)


@dataclass(frozen=True)
class Cell:
    """One training: a method on a dataset with a seed."""

    study: Study
    dataset: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.method}-s{self.seed}"

    @property
    def key(self) -> tuple[str, str, int]:
        return self.dataset, self.method, self.seed

    @property
    def points(self) -> list[float]:
        method = self.study.methods[self.method]
        return sorted(method.points + (method.first_seed_points if self.seed == self.study.seeds[0] else []))

    def config(self, share: float = 1.0, more: Mapping[str, Scalar] | None = None) -> RunConfig:
        """The settings of its training up to `share` of the study's rounds.

        `model.init-from` of fine-tuning is a name that says what was pretrained; `Pretraining.path` knows where.
        """
        study, method = self.study, self.study.methods[self.method]
        flat = flatten(study.settings) | flatten(study.datasets[self.dataset])
        flat |= dict(control_settings(method.control)) | flatten(method.set)
        own: dict[str, Scalar] = {"name": self.name, "seed": self.seed, "threads": 1}
        if study.pretraining:
            own["model.init-from"] = Pretraining(study, self.dataset).name
        whole = RunConfig.from_flat(flat | own | dict(more or {}))
        rounds = max(1, round(share * whole.num_server_rounds))
        return whole.model_copy(update={"num_server_rounds": rounds})

    def folder(self, root: Path, share: float) -> Path:
        """Where it trains up to `share`."""
        scheduled = self.config().optimizer.schedule != "constant"
        return root / self.name / f"{share:g}x" if scheduled else root / self.name

    @property
    def length(self) -> float:
        """How long it trains in all, in whole trainings."""
        return sum(self.points) if self.config().optimizer.schedule != "constant" else self.points[-1]

    def trained(self, root: Path) -> float:
        """How far it is, as `length`."""
        rows = [RunDir(folder).rows() for folder in {self.folder(root, share) for share in self.points}]
        return sum(r[-1]["round"] for r in rows if r) / self.config().num_server_rounds

    def rate(self, results: ResultsFile) -> dict[str, Scalar]:
        """The rate of a random control: as many skips below t-max as the method it stands beside had.

        Raises `LookupError` while that method's row is missing.
        """
        model = self.study.methods[self.method].skips_of
        if not model:
            return {}
        beside = Cell(self.study, self.dataset, model, self.seed)
        row = results.find(beside.key, 1.0, beside.config())
        if row is None:
            raise LookupError(f"{self.name} waits for {beside.name}")
        config = self.config()
        return {"agc.random-rate": min(0.95, row.skip_rate * config.diffusion.timesteps / config.agc.t_max)}

    def missing(self, results: ResultsFile) -> list[float]:
        """The points that are not in the results yet."""
        try:
            more = self.rate(results)
        except LookupError:
            return self.points
        return [share for share in self.points if results.find(self.key, share, self.config(share, more)) is None]


@dataclass(frozen=True)
class Pretraining:
    """The model that fine-tuning starts from on a dataset: one for all methods and seeds."""

    study: Study
    dataset: str

    @property
    def name(self) -> str:
        """Tells models of other settings apart; settings that a later version adds change it not."""
        named = {k: v for k, v in self._settings().items() if k not in LOCAL}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
        return f"pretrained-{self.dataset}-{digest}"

    def _settings(self) -> dict[str, Scalar]:
        study = self.study
        return flatten(study.settings) | flatten(study.datasets[self.dataset]) | flatten(study.pretraining)

    def config(self) -> RunConfig:
        return RunConfig.from_flat(self._settings() | {"threads": 1, "samples": 0})

    def path(self, root: Path) -> Path:
        """The folder that `model.init-from` takes."""
        return root / self.name / "final"

    def done(self, root: Path) -> bool:
        return (root / self.name / "summary.md").is_file()  # written last

    def train(self, root: Path) -> None:
        """In this process; goes on with what was broken off."""
        if not self.done(root):
            _train(root / self.name, self.config())


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
    if cell.study.pretraining:
        Pretraining(cell.study, cell.dataset).train(root)
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
    except LookupError:
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
    except (ConfigError, CellsFailedError, ValueError) as error:
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
