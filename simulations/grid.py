"""What a study trains: its file, and the cells of its grid.

A cell is a method on a dataset with a seed; simulations/study.py runs them.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.rundir import RunDir
from ret_fl.settings import flatten, read_preset
from simulations.results import LOCAL, ResultsFile

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


class CellWaitsError(Exception):
    """A cell cannot start yet: what it needs to know of another is not in the results."""


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

        Raises `CellWaitsError` while that method's row is missing.
        """
        model = self.study.methods[self.method].skips_of
        if not model:
            return {}
        beside = Cell(self.study, self.dataset, model, self.seed)
        row = results.find(beside.key, 1.0, beside.config())
        if row is None:
            raise CellWaitsError(
                f"{self.name} waits for {beside.name}, which is not in the results yet: run that cell first"
            )
        config = self.config()
        return {"agc.random-rate": min(0.95, row.skip_rate * config.diffusion.timesteps / config.agc.t_max)}

    def missing(self, results: ResultsFile) -> list[float]:
        """The points that are not in the results yet."""
        try:
            more = self.rate(results)
        except CellWaitsError:
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
