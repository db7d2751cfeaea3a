"""The folder of a run: its files, by name, and how a run is begun or taken up again."""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ret_fl.config import ConfigError, RunConfig
from ret_fl.files import read_lines, write_atomically

LOCK_SECONDS = 0.2


def is_deployed() -> bool:
    """Whether this process is the ServerApp of a deployed federation; a simulation's is flwr-simulation."""
    return Path(sys.argv[0]).name == "flwr-serverapp"


def resume_command(folder: str | Path, *, deployed: bool) -> str:
    """The command that goes on with the run in `folder`; a deployed federation's is given where it was begun."""
    if deployed:
        return f"flwr run . --stream --run-config 'resume=\"{folder}\"'"
    return f"ret-fl run --resume {folder}"


class RunDir:
    """config.json, metrics.jsonl, events.jsonl, ledger.npz and so on: every file of a run, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.privacy = self.path / "privacy.jsonl"
        self.ledger = self.path / "ledger.npz"
        self.history = self.path / "history"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.samples = self.path / "samples.npy"
        self.tensorboard = self.path / "tb"
        self.audit = self.path / "audit"
        self.summary = self.path / "summary.md"

    @classmethod
    def choose(cls, config: RunConfig, out: Path | None = None) -> RunDir:
        """The folder of a new run. Raises `ConfigError` if a run lives there already."""
        named = out or Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.name}")
        run = cls(named.expanduser())
        if run.config.exists():
            raise ConfigError(f"{run.path} holds a run already: choose another --out, or go on with --resume {named}")
        return run

    @classmethod
    def begin(cls, config: RunConfig) -> RunDir:
        """A new folder with the config in it. Raises `ConfigError` if a run lives there already."""
        run = cls.choose(config)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        return run

    @classmethod
    def existing(cls, path: str | Path) -> RunDir:
        """The folder of an earlier run. Raises `ConfigError` if it is none."""
        run = cls(Path(path).expanduser())
        if not run.config.is_file():
            raise ConfigError(f"{run.path} is not the folder of a run: it has no config.json")
        return run

    @contextmanager
    def locked(self, wait: float) -> Iterator[None]:
        """Be the only one that writes the run, on this machine; the lock goes with the process, however it ends.

        Raises `ConfigError` if another process still has it after `wait` seconds, as a ServerApp may whose SuperLink
        was killed.
        """
        deadline = time.monotonic() + wait
        folder = os.open(self.path, os.O_RDONLY)
        try:
            while not _lock(folder):
                if time.monotonic() > deadline:
                    raise ConfigError(f"another process is writing {self.path}: end it, or wait until it is done")
                time.sleep(LOCK_SECONDS)
            yield
        finally:
            os.close(folder)

    def in_use(self) -> bool:
        """Whether a process of this machine has the run `locked`."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            return not _lock(folder)
        finally:
            os.close(folder)

    def resume_command(self) -> str:
        """The command that goes on with the run, for the engine that it was last begun on, by events.jsonl."""
        from ret_fl.events import was_deployed  # it loads flwr, which `--help` has no use for

        return resume_command(self.path, deployed=was_deployed(read_lines(self.events, skip_torn=True)))

    def read_config(self) -> RunConfig:
        """The run's settings; paths into the folder follow it where it was moved to. Raises `ConfigError`."""
        try:
            flat = json.loads(self.config.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.config} is damaged: {error}") from None
        before, state = flat.get("out"), flat.get("state-dir")
        if before and state and Path(state).is_relative_to(before):
            flat["state-dir"] = str(self.path / Path(state).relative_to(before))
        return RunConfig.from_flat(flat | {"out": str(self.path)})

    def write_config(self, config: RunConfig) -> None:
        flat = config.to_flat() | {"resume": "", "out": str(self.path)}
        write_atomically(self.config, json.dumps(flat, indent=2) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, a dict a finished round; a half-written last line is left out.

        A loss that was not told (dp.mode), null in the file, is NaN: plots and exporters leave it out.
        """
        rows = read_lines(self.metrics)
        for told in (part for row in rows for part in (row, *row.get("shards", {}).values())):
            if told.get("loss", 0.0) is None:
                told["loss"] = math.nan
        return rows


def _lock(folder: int) -> bool:
    """Lock an open folder, until it is closed; False where another process has."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
