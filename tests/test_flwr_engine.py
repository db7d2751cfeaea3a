"""`ret-fl run` through Flower's real simulation engine: the same result as inline, honest exit codes, nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PLAIN, ROOT, TINY, run_server

from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.rundir import RunDir

pytestmark = pytest.mark.flower

MARK = "RET_FL_TEST_RUN"


def processes_of(mark: str) -> list[str]:
    """Command lines of living processes that inherited our mark: SuperLink, Ray, actors, whatever they started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # not ours to read, or gone
            continue
    return found


@dataclass
class Answer:
    """How `ret-fl run` ended."""

    code: int
    stdout: str
    stderr: str
    mark: str


def run_flwr(
    out: Path,
    settings: Mapping[str, Scalar],
    after_round: tuple[int, Callable[[str], None] | None] | None = None,
    options: Sequence[str] | None = None,
) -> Answer:
    """`ret-fl run` in its own process, into `out` or by `options`.

    after_round: once that round is recorded something is done to it; None is SIGTERM.
    """
    mark = uuid.uuid4().hex
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-c", "from ret_fl.cli import app; app()", "run", "--app", str(ROOT)]
    command += options or ["--out", str(out)]
    process = subprocess.Popen(
        [*command, *sets],
        env=os.environ | {MARK: mark, "HOME": str(out.parent), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if after_round:
        round, act = after_round
        while process.poll() is None and len(RunDir(out).rows()) < round:
            time.sleep(0.2)
        if act:
            act(mark)
        else:
            process.terminate()
    stdout, stderr = process.communicate(timeout=400)
    return Answer(process.returncode, stdout, stderr, mark)


def assert_nothing_is_left(mark: str) -> None:
    deadline = time.monotonic() + 20  # processes that were told to end may take a moment
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


TWO_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
names = ("server.app", "clients.training")
print(list(ThreadPoolExecutor(2).map(lambda name: import_module(name).app is not None, names)))
"""


def test_both_apps_load_at_once_as_the_simulation_engine_has_it() -> None:
    """And with the ClientApp what it loads for its first order."""
    answer = subprocess.run([sys.executable, "-c", TWO_THREADS], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == "[True, True]\n", answer.stderr


def test_flowers_engine_trains_the_same_model_as_the_inline_one(tmp_path: Path) -> None:
    settings = TINY | {"agc.t-max": 1000, "wait-seconds": 300}
    answer = run_flwr(tmp_path / "flwr", settings)
    assert answer.code == 0, answer.stderr
    assert "round 2/2" in answer.stdout
    assert_nothing_is_left(answer.mark)
    inline = run_server(RunConfig.from_flat(settings), tmp_path / "inline")
    flwr = RunDir(tmp_path / "flwr")
    ours, theirs = load_latest(flwr.checkpoints), load_latest(inline.checkpoints)
    assert ours.round == theirs.round == 2
    assert ours.weights.keys() == theirs.weights.keys()
    for name, value in ours.weights.items():
        np.testing.assert_allclose(value, theirs.weights[name], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(ours.ledger.visits, theirs.ledger.visits)
    np.testing.assert_array_equal(ours.ledger.shard, theirs.ledger.shard)
    assert [r["bytes_up"] for r in flwr.rows()] == [r["bytes_up"] for r in inline.rows()]
    assert flwr.summary.is_file()


def test_a_run_that_fails_under_flower_exits_with_the_reason(tmp_path: Path) -> None:
    """`flwr run` itself exits with 0 here."""
    diverging: Mapping[str, Scalar] = {"optimizer.lr": 1e12, "optimizer.warmup-steps": 0, "local-epochs": 4}
    answer = run_flwr(tmp_path / "run", TINY | PLAIN | diverging | {"wait-seconds": 300})
    assert answer.code == 1
    for words in ("optimizer.lr", "quorum", str(tmp_path / "run" / "flower.log")):
        assert words in answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr
    assert not (tmp_path / "run" / "summary.md").exists()
    assert_nothing_is_left(answer.mark)


@pytest.mark.slow
def test_a_killed_ray_actor_stops_the_run_with_the_reason_and_it_goes_on(tmp_path: Path) -> None:
    """Flower's simulation starts no actor anew: every later order fails, the quorum stops the run, --resume goes on."""
    settings = TINY | PLAIN | {"wait-seconds": 300, "num-server-rounds": 4, "local-epochs": 60}
    out = tmp_path / "run"

    def kill_actors(mark: str) -> None:
        actors = [p for p in psutil.process_iter(["name"]) if "ray::ClientAppActor" in p.name()]
        ours = [p for p in actors if f"{MARK}={mark}".encode() in Path(f"/proc/{p.pid}/environ").read_bytes()]
        assert ours
        for process in ours:
            process.kill()

    answer = run_flwr(out, settings, after_round=(1, kill_actors))
    assert answer.code == 1
    assert "quorum" in answer.stderr
    assert "--resume" in answer.stderr
    assert_nothing_is_left(answer.mark)
    stopped = load_latest(out / "checkpoints")
    assert 1 <= stopped.round < 4
    stopped.ledger.check()
    command = ["--resume", str(out)]
    resumed = run_flwr(out, {}, options=command)
    assert resumed.code == 0, resumed.stderr
    assert [row["round"] for row in RunDir(out).rows()] == [1, 2, 3, 4]
    undisturbed = run_server(RunConfig.from_flat(settings), tmp_path / "undisturbed")
    for name, value in load_latest(undisturbed.checkpoints).weights.items():
        found = load_latest(out / "checkpoints").weights[name]
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_ending_the_command_ends_all_that_it_started(tmp_path: Path) -> None:
    """SuperLink, Ray and its actors, though each has a session of its own; and the run can go on."""
    answer = run_flwr(tmp_path / "run", TINY | {"wait-seconds": 300, "num-server-rounds": 500}, after_round=(1, None))
    assert answer.code not in (0, 1)
    assert_nothing_is_left(answer.mark)
    assert load_latest(tmp_path / "run" / "checkpoints").round >= 1
