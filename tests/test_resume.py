"""A run that was killed and resumed is the run that was not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, Client, run_server
from flwr.app import Context, Message, MessageType
from PIL import Image

import ret_fl.checkpoint
import ret_fl.recorder
from clients.app import app as client_app
from ret_fl.checkpoint import Checkpoint, CheckpointError, load_latest, save_checkpoint
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.ledger import ShardLedger
from ret_fl.protocol import TrainOrder
from ret_fl.rundir import RunDir
from ret_fl.settings import change_run, to_toml

Tiny = Callable[..., RunConfig]

# everything that has a memory: banks and skips, quarantine, moves, strengths, moments
SETTINGS: Mapping[str, Scalar] = {
    "num-server-rounds": 4,
    "local-epochs": 2,
    "agc.t-max": 1000,
    "taa.mode": "next-visit",
    "redistribution.policy": "high-loss+quarantine",
    "redistribution.fraction": 0.2,
    "quarantine.share": 0.2,
    "quarantine.min-draws": 1,
}
PHASED: Mapping[str, Scalar] = SETTINGS | {"aggregate-every": 2}


RET_FL = "from ret_fl.cli import app; app()"


class Killed(BaseException):
    """Ends a run like a kill: nothing between it and the top catches it."""


def killing(round: int, shard: int) -> Client:
    """Real clients; the process 'dies' when one is asked to train `shard` in `round`."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order = TrainOrder.unpack(message.content)[0]
            if (order.round, order.shard) == (round, shard):
                raise Killed
        return client_app(message, context)

    return client


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    timeless = {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
    shards = {k: {n: v for n, v in s.items() if n != "seconds"} for k, s in row["shards"].items()}
    return timeless | {"shards": shards}


@dataclass
class Outcome:
    """What a run came to, without its clock and its name."""

    last: Checkpoint
    rows: list[dict[str, Any]]
    ledger: ShardLedger
    final: bytes

    @classmethod
    def of(cls, run: RunDir) -> Outcome:
        weights = next((run.final / "unet").glob("*.safetensors")).read_bytes()
        return cls(
            load_latest(run.checkpoints), [without_times(r) for r in run.rows()], ShardLedger.load(run.ledger), weights
        )


def assert_same_outcome(left: Outcome, right: Outcome) -> None:
    assert left.rows == right.rows
    assert left.last.round == right.last.round
    assert [k for k, v in left.last.weights.items() if not np.array_equal(v, right.last.weights[k])] == []
    for ours, theirs in ((left.ledger, right.ledger), (left.last.ledger, right.last.ledger)):
        for f in fields(ShardLedger):
            np.testing.assert_array_equal(getattr(ours, f.name), getattr(theirs, f.name), err_msg=f.name)
    for one, other in zip(left.last.shards, right.last.shards, strict=True):
        np.testing.assert_array_equal(one.bank_values, other.bank_values)
        np.testing.assert_array_equal(one.bank_visits, other.bank_visits)
        assert one.proxy_round == other.proxy_round
    assert left.final == right.final


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Outcome]:
    """The outcome of a config run in one go; each is run once."""
    known: dict[str, Outcome] = {}

    def outcome(config: RunConfig) -> Outcome:
        key = json.dumps(config.to_flat() | {"state-dir": ""})
        if key not in known:
            known[key] = Outcome.of(run_server(config, tmp_path_factory.mktemp("whole") / "run"))
        return known[key]

    return outcome


Whole = Callable[[RunConfig], Outcome]


def killed_at(config: RunConfig, out: Path, round: int, shard: int) -> None:
    with pytest.raises(Killed):
        run_server(config, out, killing(round, shard))


# --- killed anywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("round", "shard"), [(1, 0), (3, 1)])
def test_a_run_killed_while_clients_train_loses_nothing(
    tiny: Tiny, tmp_path: Path, uninterrupted: Whole, round: int, shard: int
) -> None:
    config, out = tiny(SETTINGS), tmp_path / "run"
    killed_at(config, out, round, shard)
    assert load_latest(out / "checkpoints").round == round - 1
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


def test_a_run_killed_in_every_round_goes_on_with_its_proxies_between_averages(
    tiny: Tiny, tmp_path: Path, uninterrupted: Whole
) -> None:
    config, out = tiny(PHASED), tmp_path / "run"
    killed_at(config, out, 1, 1)
    for round in (2, 3, 4):
        with pytest.raises(Killed):
            run_server(config, out, killing(round, 1), resume=True)
    resumed = Outcome.of(run_server(config, out, resume=True))
    assert [row["shards"]["0"]["start"] for row in resumed.rows] == ["global", "proxy", "global", "proxy"]
    assert_same_outcome(resumed, uninterrupted(config))


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
    tiny: Tiny, tmp_path: Path, uninterrupted: Whole, moment: Callable[[pytest.MonkeyPatch], None]
) -> None:
    config, out = tiny(SETTINGS), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        moment(patch)
        run_server(config, out)
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


def test_a_process_killed_by_the_system_resumes_by_command(tiny: Tiny, tmp_path: Path, uninterrupted: Whole) -> None:
    """The inline engine's process, SIGKILL in the middle of a round, `ret-fl run --resume`."""
    config, out = tiny(PHASED), tmp_path / "run"
    settings = tmp_path / "run.toml"
    settings.write_text(to_toml(config.to_flat() | {"out": str(out), "state-dir": str(out / "proxies")}))
    die = (
        "import os, signal, clients.app as clients\n"
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


FILL_AND_RESUME = """
set -eu
mount -t tmpfs -o size=11m tmpfs "$DISK"
if "$@" run --engine inline --app "$APP" --preset "$SETTINGS" --out "$DISK/run"; then exit 3; fi
find "$DISK/run/checkpoints" > "$DISK.kept"
mount -o remount,size=64m "$DISK"
"$@" run --engine inline --app "$APP" --resume "$DISK/run"
cp -r "$DISK/run" "$DISK.run"
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no user and mount namespaces here, so no small disk of our own",
)
def test_a_disk_that_fills_while_checkpointing_loses_nothing(tiny: Tiny, tmp_path: Path, uninterrupted: Whole) -> None:
    """A tmpfs with room for two checkpoints and a half: the run stops with the reason, and goes on given more room."""
    config, disk = tiny(PHASED), tmp_path / "disk"
    disk.mkdir()
    settings = tmp_path / "run.toml"
    settings.write_text(to_toml(config.to_flat() | {"state-dir": str(tmp_path / "proxies"), "keep-checkpoints": 3}))
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", FILL_AND_RESUME, "sh", sys.executable, "-c", RET_FL],
        env=os.environ | {"DISK": str(disk), "APP": str(ROOT), "SETTINGS": str(settings), "PYTHONPATH": str(ROOT),
                          "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("the checkpoint of round 2 cannot be written", "No space left on device", "--resume"):
        assert words in done.stderr
    kept = (tmp_path / "disk.kept").read_text()
    assert "round-00001/weights.safetensors" in kept
    assert "round-00002" not in kept
    assert_same_outcome(Outcome.of(RunDir(tmp_path / "disk.run")), uninterrupted(config))


# --- damaged checkpoints ----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut": lambda c: cut(c / "weights.safetensors"),
    "ledger cut": lambda c: cut(c / "ledger.npz"),
    "banks empty": lambda c: (c / "banks.npz").write_bytes(b"") and None,
    "state not JSON": lambda c: (c / "state.json").write_text("{") and None,
    "state gone": lambda c: (c / "state.json").unlink(),
    "everything gone": lambda c: [f.unlink() for f in c.iterdir()] and None,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phased run killed in round 4: checkpoints of rounds 2 and 3."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    killed_at(RunConfig.from_flat(TINY | PHASED), out, 4, 1)
    return out


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_falls_back_on_the_one_before(
    stopped: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "round-00003")
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path / "checkpoints").round == 2
    assert "round-00003 cannot be read" in caplog.text


def test_a_run_resumed_from_the_checkpoint_before_is_still_the_same(
    tiny: Tiny, tmp_path: Path, stopped: Path, uninterrupted: Whole
) -> None:
    config = tiny(PHASED)
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    stored = RunDir(out)
    stored.write_config(RunConfig.from_flat(stored.read_config().to_flat() | {"state-dir": str(out / "proxies")}))
    DAMAGE["weights cut"](out / "checkpoints" / "round-00003")
    assert_same_outcome(Outcome.of(run_server(config, out, resume=True)), uninterrupted(config))


def test_only_the_last_checkpoints_are_kept(stopped: Path) -> None:
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == ["round-00002", "round-00003"]


def test_leftovers_of_a_half_written_checkpoint_are_no_checkpoint(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    half = tmp_path / "checkpoints" / ".round-00004.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    newest = load_latest(tmp_path / "checkpoints")
    assert newest.round == 3
    saved = save_checkpoint(tmp_path / "checkpoints", Checkpoint(**vars(newest) | {"round": 4}), keep=2)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["round-00003", "round-00004"]
    assert load_latest(tmp_path / "checkpoints").round == 4


def test_a_checkpoint_holds_everything_exactly(stopped: Path, tmp_path: Path) -> None:
    first = load_latest(stopped / "checkpoints")
    save_checkpoint(tmp_path, first, keep=1)
    second = load_latest(tmp_path)
    assert (first.round, first.run_key, first.fingerprint) == (second.round, second.run_key, second.fingerprint)
    assert_same_outcome(Outcome(first, [], first.ledger, b""), Outcome(second, [], second.ledger, b""))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".bin")]


def test_without_any_checkpoint_resuming_says_what_is_missing(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for folder in (out / "checkpoints").iterdir():
        DAMAGE["state not JSON"](folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*round-00003.*round-00002"):
        run_server(tiny(PHASED), out, resume=True)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run_server(tiny(PHASED), out, resume=True)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        run_server(tiny(PHASED), tmp_path / "elsewhere", resume=True)


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_anew(
    tiny: Tiny, tmp_path: Path, uninterrupted: Whole
) -> None:
    out = tmp_path / "run"

    def nobody(message: Message, context: Context) -> Message:
        raise Killed

    with pytest.raises(Killed):
        run_server(tiny(SETTINGS), out, nobody)
    assert_same_outcome(Outcome.of(run_server(tiny(), out, resume=True)), uninterrupted(tiny(SETTINGS)))


def test_a_run_folder_can_be_moved(tiny: Tiny, tmp_path: Path, uninterrupted: Whole) -> None:
    killed_at(tiny(PHASED), tmp_path / "here", round=4, shard=1)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert_same_outcome(Outcome.of(run_server(tiny(), moved, resume=True)), uninterrupted(tiny(PHASED)))
    assert not (tmp_path / "here").exists()


def test_a_damaged_config_is_named(stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        change_run(out, {})


# --- changes on the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("shards", 3), ("data.limit", 30), ("data.source", "mnist"), ("seed", 7), ("model.preset", "small"),
     ("partition.scheme", "shuffled"), ("agc.bins", 10), ("diffusion.timesteps", 500)],
)  # fmt: skip
def test_what_the_checkpoint_was_made_with_cannot_change(stopped: Path, key: str, value: Scalar) -> None:
    before = (stopped / "config.json").read_text()
    old = RunDir(stopped).read_config().to_flat()[key]
    with pytest.raises(ConfigError, match=rf"keeps its {key} \(it has {old}\)"):
        change_run(stopped, {key: value})
    assert (stopped / "config.json").read_text() == before
    change_run(stopped, {key: old})


def test_more_rounds_extend_a_finished_run(tiny: Tiny, tmp_path: Path, uninterrupted: Whole) -> None:
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


def test_another_learning_rate_may_be_set_on_the_way(tiny: Tiny, tmp_path: Path, uninterrupted: Whole) -> None:
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
