"""A run that was killed and resumed is the run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_server
from flwr.app import Context, Message
from outcomes import (
    APART,
    PHASED,
    RET_FL,
    SETTINGS,
    Killed,
    Outcome,
    Tiny,
    assert_same_outcome,
    killed_at,
    killing,
    uninterrupted,
)
from PIL import Image

import ret_fl.checkpoint
import ret_fl.recorder
from ret_fl.checkpoint import Checkpoint, load_latest, save_checkpoint
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.ledger import ShardLedger
from ret_fl.rundir import RunDir
from ret_fl.settings import change_run, to_toml

# --- killed anywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("round", "shard"), [(1, 0), (3, 1)])
def test_a_run_killed_while_clients_train_loses_nothing(tiny: Tiny, tmp_path: Path, round: int, shard: int) -> None:
    config, out = tiny(SETTINGS), tmp_path / "run"
    killed_at(config, out, round, shard)
    assert load_latest(out / "checkpoints").round == round - 1
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


def test_a_resumed_run_trains_each_shard_where_its_moments_are(tiny: Tiny, tmp_path: Path) -> None:
    config, out = tiny({"num-server-rounds": 2}), tmp_path / "run"
    killed_at(config, out, 2, 0)
    checkpoint = load_latest(out / "checkpoints")
    assert checkpoint.home == {0: 0, 1: 1}
    save_checkpoint(out / "checkpoints", replace(checkpoint, home={0: 1, 1: 0}), keep=2)
    resumed = run_server(config, out, resume=True)
    assert [row["shards"][shard]["partition"] for row in resumed.rows()[1:] for shard in "01"] == [1, 0]


def test_a_run_killed_in_every_round_goes_on_with_its_proxies_between_averages(tiny: Tiny, tmp_path: Path) -> None:
    config, out = tiny(PHASED), tmp_path / "run"
    killed_at(config, out, 1, 1)
    for round in (2, 3, 4):
        with pytest.raises(Killed):
            run_server(config, out, killing(round, 1), resume=True)
    resumed = Outcome.of(run_server(config, out, resume=True))
    assert [row["shards"]["0"]["start"] for row in resumed.rows] == ["global", "proxy", "global", "proxy"]
    assert_same_outcome(resumed, uninterrupted(config))


def test_a_run_killed_in_every_round_goes_on_with_proxies_that_are_never_averaged(tiny: Tiny, tmp_path: Path) -> None:
    config, out = tiny(APART), tmp_path / "run"
    killed_at(config, out, 1, 1)
    for round in (2, 3, 4):
        with pytest.raises(Killed):
            run_server(config, out, killing(round, 1), resume=True)
    resumed = Outcome.of(run_server(config, out, resume=True))
    assert {row["shards"][shard]["start"] for row in resumed.rows for shard in "01"} == {"sent"}
    assert sum(row["moved"] for row in resumed.rows) > 0
    assert_same_outcome(resumed, uninterrupted(config))


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_proxies_stay_together_or_apart_when_a_run_is_resumed(
    tiny: Tiny, tmp_path: Path, before: int, after: int
) -> None:
    killed_at(tiny(SETTINGS, {"aggregate-every": before}), tmp_path / "run", 2, 0)
    with pytest.raises(ConfigError, match=f"aggregate-every={before} cannot become {after}"):
        change_run(tmp_path / "run", {"aggregate-every": after})


def _before_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
        if checkpoint.round == 3:
            raise Killed
        return save_checkpoint(folder, checkpoint, keep)

    monkeypatch.setattr(ret_fl.recorder, "save_checkpoint", save)


def _within_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = ret_fl.checkpoint.sync

    def die(path: Path) -> None:
        if path.parent.name == ".round-00003.tmp":
            path.write_bytes(path.read_bytes()[:100])
            raise Killed
        sync(path)

    monkeypatch.setattr(ret_fl.checkpoint, "sync", die)


def _after_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    save = ShardLedger.save

    def die(self: ShardLedger, path: Path) -> None:
        if path.parent.name == "run" and (path.parent / "checkpoints" / "round-00003").exists():
            raise Killed
        save(self, path)

    monkeypatch.setattr(ShardLedger, "save", die)


@pytest.mark.parametrize("moment", [_before_checkpoint, _within_checkpoint, _after_checkpoint])
def test_a_run_killed_while_a_round_is_recorded_loses_nothing(
    tiny: Tiny, tmp_path: Path, moment: Callable[[pytest.MonkeyPatch], None]
) -> None:
    config, out = tiny(SETTINGS), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        moment(patch)
        run_server(config, out)
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


def test_a_process_killed_by_the_system_resumes_by_command(tiny: Tiny, tmp_path: Path) -> None:
    """The inline engine's process, SIGKILL in the middle of a round, `ret-fl run --resume`."""
    config, out = tiny(PHASED), tmp_path / "run"
    settings = tmp_path / "run.toml"
    settings.write_text(to_toml(config.to_flat() | {"out": str(out), "state-dir": str(out / "proxies")}))
    die = (
        "import os, signal, clients.training as clients\n"
        "train = clients.train_proxy\n"
        "def dying(trainer, order, *rest):\n"
        "    if (order.round, order.shard) == (3, 1): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return train(trainer, order, *rest)\n"
        "clients.train_proxy = dying\n"
    )

    def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    engine = die + "from simulations.inline import main\nmain()\n"
    assert python(engine, str(settings), str(config.shards)).returncode == -signal.SIGKILL
    assert load_latest(out / "checkpoints").round == 2
    command = ["run", "--engine", "inline", "--app", str(ROOT), "--resume", str(out)]
    resumed = python(RET_FL, *command)
    assert resumed.returncode == 0, resumed.stderr
    assert "round 4/4" in resumed.stdout
    assert "round 2/4" not in resumed.stdout
    assert_same_outcome(Outcome.of(RunDir(out)), uninterrupted(config))


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_anew(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def nobody(message: Message, context: Context) -> Message:
        raise Killed

    with pytest.raises(Killed):
        run_server(tiny(SETTINGS), out, nobody)
    assert_same_outcome(Outcome.of(run_server(tiny(), out, resume=True)), uninterrupted(tiny(SETTINGS)))


def test_a_run_folder_can_be_moved(tiny: Tiny, tmp_path: Path) -> None:
    killed_at(tiny(PHASED), tmp_path / "here", round=4, shard=1)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert_same_outcome(Outcome.of(run_server(tiny(), moved, resume=True)), uninterrupted(tiny(PHASED)))
    assert not (tmp_path / "here").exists()


def test_a_run_that_another_process_writes_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    """As after the SuperLink was killed, while its ServerApp still lives."""
    config, out = tiny(SETTINGS), tmp_path / "run"
    killed_at(config, out, 3, 0)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ret_fl.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).locked(0):\n    print('locked', flush=True)\n    time.sleep(600)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert other.stdout is not None and other.stdout.readline() == b"locked\n"
    with pytest.raises(ConfigError, match=r"another process is writing .*run"):
        run_server(config, out, resume=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    other.kill()
    other.communicate()
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


# --- changes on the way -----------------------------------------------------------------------------------------


def test_more_rounds_extend_a_finished_run(tiny: Tiny, tmp_path: Path) -> None:
    # a run's last round moves nothing, and a schedule ends with it
    still: Mapping[str, Scalar] = {"redistribution.policy": "quarantine", "optimizer.schedule": "constant"}
    config, out = tiny(SETTINGS, still), tmp_path / "run"
    short = RunConfig.from_flat(config.to_flat() | {"num-server-rounds": 2})
    run_server(short, out)
    _, changed = change_run(out, {"num-server-rounds": 4})
    assert changed.num_server_rounds == 4
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


def test_resuming_a_finished_run_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    config, out = tiny(SETTINGS, {"num-server-rounds": 1, "evaluate-every": 1}), tmp_path / "run"
    before = Outcome.of(run_server(config, out))
    assert_same_outcome(before, Outcome.of(run_server(config, out, resume=True)))


def test_another_learning_rate_may_be_set_on_the_way(tiny: Tiny, tmp_path: Path) -> None:
    config, out = tiny(SETTINGS), tmp_path / "run"
    killed_at(config, out, 3, 0)
    change_run(out, {"optimizer.lr": 0.01})
    resumed = Outcome.of(run_server(config, out, resume=True))
    whole = uninterrupted(config)
    assert resumed.rows[:2] == whole.rows[:2]
    assert resumed.rows[3]["loss"] != whole.rows[3]["loss"]


def test_a_run_whose_images_have_changed_cannot_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i:02}.png")
    source: dict[str, Scalar] = {"data.source": "image-folder", "data.path": str(pictures), "data.limit": 0}
    config = tiny(source, {"data.cache-dir": str(tmp_path / "cache"), "num-server-rounds": 2})
    killed_at(config, tmp_path / "run", 2, 0)
    Image.fromarray(255 - np.array(Image.open(pictures / "03.png"))).save(pictures / "03.png")
    time.sleep(0.01)
    load_splits.cache_clear()  # a new process
    with pytest.raises(ConfigError, match=r"files behind data\.path have changed"):
        run_server(config, tmp_path / "run", resume=True)
