"""Checkpoints: whole or not there, kept to a number, exact; damaged ones, and a disk without room for them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run_server
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import (
    PHASED,
    RET_FL,
    Outcome,
    Tiny,
    assert_same_outcome,
    killed_at,
    uninterrupted,
)

from ret_fl.checkpoint import Checkpoint, CheckpointError, load_latest, save_checkpoint
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.rundir import RunDir
from ret_fl.settings import change_run, to_toml


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut": lambda c: cut(c / "weights.safetensors"),
    "ledger cut": lambda c: cut(c / "ledger.npz"),
    "banks empty": lambda c: (c / "banks.npz").write_bytes(b"") and None,
    "state not JSON": lambda c: (c / "state.json").write_text("{") and None,
    "state gone": lambda c: (c / "state.json").unlink(),
    "state not an object": lambda c: (c / "state.json").write_text("[]") and None,
    "sums gone, weights cut": lambda c: (c / "SHA256SUMS").unlink() or cut(c / "weights.safetensors"),
    "sums gone, state not an object": lambda c: (c / "SHA256SUMS").unlink() or DAMAGE["state not an object"](c),
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


FILES = ("weights.safetensors", "ledger.npz", "banks.npz", "state.json", "SHA256SUMS")


def with_a_flipped_bit(path: Path, place: float, bit: int) -> bytes:
    """Flip a bit of a file at a place in [0, 1) of its length; returns what it was."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(place * len(content))] ^= 1 << bit
    path.write_bytes(changed)
    return content


@pytest.fixture(scope="module")
def copied(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(stopped / "checkpoints", tmp_path_factory.mktemp("copied") / "checkpoints"))


PLACES = st.floats(0, 1, exclude_max=True)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), place=PLACES, bit=st.integers(0, 7))
def test_a_single_flipped_bit_is_noticed(copied: Path, name: str, place: float, bit: int) -> None:
    path = copied / "round-00003" / name
    content = with_a_flipped_bit(path, place, bit)
    try:
        assert load_latest(copied).round == 2
    finally:
        path.write_bytes(content)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES[:-1]), place=PLACES, bit=st.integers(0, 7))
def test_without_sums_a_flipped_bit_stops_no_resume(copied: Path, name: str, place: float, bit: int) -> None:
    """A checkpoint of an earlier version: whatever its readers raise, there is the one before."""
    path, sums = copied / "round-00003" / name, copied / "round-00003" / "SHA256SUMS"
    told, content = sums.read_bytes(), with_a_flipped_bit(path, place, bit)
    sums.unlink()
    try:
        load_latest(copied)
    finally:
        path.write_bytes(content)
        sums.write_bytes(told)


def test_a_checkpoint_of_a_version_without_sums_is_read(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "round-00003" / "SHA256SUMS").unlink()
    assert load_latest(tmp_path / "checkpoints").round == 3


def test_the_sums_are_those_of_sha256sum(stopped: Path) -> None:
    newest = stopped / "checkpoints" / "round-00003"
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=newest, check=True)
    assert {p.name for p in newest.iterdir()} == set(FILES)


def test_a_run_resumed_from_the_checkpoint_before_is_still_the_same(tiny: Tiny, tmp_path: Path, stopped: Path) -> None:
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


def test_a_checkpoint_that_tells_no_home_is_read(stopped: Path, tmp_path: Path) -> None:
    """As those of earlier versions."""
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "round-00003"
    state = json.loads((newest / "state.json").read_text())
    del state["home"]
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "SHA256SUMS").unlink()
    told = load_latest(tmp_path / "checkpoints")
    assert (told.round, told.home) == (3, {})


def test_a_checkpoint_holds_everything_exactly(stopped: Path, tmp_path: Path) -> None:
    first = load_latest(stopped / "checkpoints")
    save_checkpoint(tmp_path, first, keep=1)
    second = load_latest(tmp_path)
    assert (first.round, first.run_key, first.fingerprint) == (second.round, second.run_key, second.fingerprint)
    assert first.home == second.home == {0: 0, 1: 1}
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


def test_a_damaged_config_is_named(stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        change_run(out, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [("shards", 3), ("data.limit", 30), ("data.source", "mnist"), ("seed", 7), ("model.preset", "small"),
     ("partition.scheme", "shuffled"), ("agc.bins", 10), ("diffusion.timesteps", 500), ("dp.mode", "server-fixed")],
)  # fmt: skip
def test_what_the_checkpoint_was_made_with_cannot_change(stopped: Path, key: str, value: Scalar) -> None:
    before = (stopped / "config.json").read_text()
    old = RunDir(stopped).read_config().to_flat()[key]
    with pytest.raises(ConfigError, match=rf"keeps its {key} \(it has {old}\)"):
        change_run(stopped, {key: value})
    assert (stopped / "config.json").read_text() == before
    change_run(stopped, {key: old})


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
def test_a_disk_that_fills_while_checkpointing_loses_nothing(tiny: Tiny, tmp_path: Path) -> None:
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
