"""What a client keeps of a proxy between rounds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Federation
from disks import no_file_beyond
from federations import Recorder, assert_equal_states
from flwr.app import Context, Message, MessageType
from orders import assert_equal_moments
from safetensors.torch import save_file

from clients.app import app as client_app
from ret_fl.config import RunConfig
from ret_fl.proxystate import FORGET_DAYS, Moments, ProxyFiles, ProxyState

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]


def a_state(*, weights: bool = True) -> ProxyState:
    g = torch.Generator().manual_seed(0)
    shape = (3, 2, 4, 4)
    strange = torch.randn(shape, generator=g).to(memory_format=torch.channels_last)
    moments = Moments(step=12, updates=9, first={"a.b": strange}, second={"a.b": torch.rand(shape, generator=g)})
    own = {"raw.a": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32), "ema.a": np.zeros((), np.float32)}
    return ProxyState(moments, own if weights else None)


@pytest.mark.parametrize("weights", [True, False])
def test_a_kept_proxy_comes_back_exactly(tmp_path: Path, weights: bool) -> None:
    state = a_state(weights=weights)
    ProxyFiles(tmp_path, "run").save(2, 7, state, keep=1)
    back = ProxyFiles(tmp_path, "run").load(2, 7)
    assert back is not None
    assert back.moments.step == 12
    assert_equal_moments(back.moments, state.moments)
    if weights:
        assert back.weights is not None
        assert_equal_states(back.weights, state.weights or {})
    else:
        assert back.weights is None


def test_a_kept_proxy_is_found_by_its_own_run_shard_and_round_alone(tmp_path: Path) -> None:
    ProxyFiles(tmp_path, "run").save(2, 7, a_state(), keep=1)
    found = [ProxyFiles(tmp_path, run).load(s, r) for run, s, r in (("other", 2, 7), ("run", 1, 7), ("run", 2, 6))]
    assert found == [None, None, None]


def test_old_rounds_are_dropped_by_shard(tmp_path: Path) -> None:
    files = ProxyFiles(tmp_path, "run")
    files.save(0, 1, a_state(), keep=2)
    for number in range(1, 6):
        files.save(1, number, a_state(), keep=2)
    assert [number for number in range(1, 6) if files.load(1, number)] == [3, 4, 5]
    assert files.load(0, 1) is not None
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".safetensors"] * 4


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other"])
def test_a_damaged_file_is_a_missing_one_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = ProxyFiles(tmp_path, "run")
    files.save(2, 7, a_state(), keep=1)
    path = next(tmp_path.rglob("*.safetensors"))
    content = path.read_bytes()
    if damage == "other":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": bytes(range(256))}[damage])
    with caplog.at_level(logging.WARNING):
        assert files.load(2, 7) is None
    assert "shard 2: no usable state of round 7" in caplog.text


def test_nothing_is_missed_before_the_first_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ProxyFiles(tmp_path, "run").load(0, 0) is None
    assert not caplog.text


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_that_cannot_be_written_leaves_no_part_and_the_others_alone(tmp_path: Path) -> None:
    files = ProxyFiles(tmp_path, "run")
    files.save(2, 6, a_state(), keep=1)
    with no_file_beyond(256), pytest.raises(OSError, match=r"round-00007.*File too large"):
        files.save(2, 7, a_state(), keep=1)
    assert files_in(tmp_path) == ["run/shard-0002/round-00006.safetensors"]
    assert files.load(2, 6) is not None


def on_a_full_disk(shard: int) -> Callable[[Message, Context], Message]:
    """Real clients; while one trains this shard in round 1, no file grows beyond 64 KiB."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            told = message.content["order"]
            if (told["shard"], told["round"]) == (shard, 1):
                with no_file_beyond(64 << 10):
                    return client_app(message, context)
        return client_app(message, context)

    return client


def test_a_full_disk_costs_a_node_its_moments_and_no_training(
    tiny: Tiny, federate: Federate, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    config = tiny({"retries": 0, "redistribution.policy": "none"})
    seen = Recorder(on_a_full_disk(1))
    fed = federate(config, seen)
    fed.run()
    assert [summary.failures for summary in fed.rounds] == [{}, {}]
    assert {(r.shard, r.round): r.moments for r, _ in seen.replies if r.round == 2} == {
        (0, 2): "carried",
        (1, 2): "fresh",
    }
    for words in ("shard 1, round 1: Adam's moments cannot be kept", "File too large", "state-dir in the node config"):
        assert words in flower_log.text
    assert "shard 0, round 1: Adam's" not in flower_log.text
    kept = files_in(tmp_path / "proxies" / "test")
    assert kept == [f"shard-{s:04d}/round-{r:05d}.safetensors" for s, r in ((0, 1), (0, 2), (1, 2))]


def test_a_full_disk_fails_an_order_whose_weights_stay_with_the_node(tiny: Tiny, federate: Federate) -> None:
    config = tiny({"aggregate-every": 2, "retries": 0, "quorum": 0.5})
    fed = federate(config, on_a_full_disk(1))
    fed.run()
    assert list(fed.rounds[0].failures) == [1]
    assert "File too large" in fed.rounds[0].failures[1]


def test_the_files_of_runs_long_gone_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    state = a_state()
    for run in ("long-gone", "stopped", "mine"):
        for shard in (0, 1):
            ProxyFiles(tmp_path, run).save(shard, 3, state, keep=1)
    strangers = ["other/shard-0000/notes.txt", "other/round-00001.safetensors", "a-file", "pictures/1.png"]
    for name in strangers:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a stranger's")
    long_ago = time.time() - (FORGET_DAYS + 1) * 86400
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    os.utime(tmp_path / "stopped" / "shard-0001" / "round-00003.safetensors")
    ProxyFiles(tmp_path, "mine").save(0, 4, state, keep=1)
    kept = [f"stopped/shard-000{shard}/round-00003.safetensors" for shard in (0, 1)]
    mine = [f"mine/shard-000{s}/round-0000{r}.safetensors" for s, r in ((0, 3), (0, 4), (1, 3))]
    assert files_in(tmp_path) == sorted(strangers + kept + mine)
    assert not (tmp_path / "long-gone").exists()
