"""`ret-fl status` and the events it reads: what is told of a real run, in its course and at its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from conftest import ROOT, TINY, ret_fl, run_server
from disks import no_file_beyond
from federations import spoiling
from flwr.app import Context, Error, Message, MessageType
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from clients.app import app as client_app
from ret_fl.config import RunConfig
from ret_fl.engines import free_port, wait_for
from ret_fl.events import (
    ANSWERED,
    BACK,
    BEGUN,
    FAILED,
    GONE,
    JOINED,
    MOVED,
    REFUSED,
    ROUND,
    SENT,
    TRAINED,
    Journal,
    as_text,
    from_log,
)
from ret_fl.files import as_line, read_lines
from ret_fl.ledger import ShardLedger
from ret_fl.progress import RunProgress
from ret_fl.prometheus import RunCollector
from ret_fl.rundir import RunDir
from ret_fl.status import RunStatus, read_status, status_of_log


def exchanging(**changes: object) -> RunConfig:
    """Three rounds in which samples move after the first and the second."""
    flat = TINY | {"num-server-rounds": 3, "redistribution.policy": "random", "aggregate-every": 3}
    return RunConfig.from_flat(flat | changes)  # type: ignore[arg-type]


def test_every_order_is_told_from_sending_to_training(tmp_path: Path) -> None:
    run = run_server(exchanging(), tmp_path / "run")
    events = read_lines(run.events)
    assert len({e["run"] for e in events}) == 1
    joined = {e["node"]: e["partition"] for e in events if e["event"] == JOINED}
    assert sorted(joined.values()) == [0, 1]
    for kind in (SENT, ANSWERED, TRAINED):
        told = [(e["round"], e["shard"]) for e in events if e["event"] == kind]
        assert told == [(round, shard) for round in (1, 2, 3) for shard in (0, 1)], kind
        assert {e["node"] for e in events if e["event"] == kind} == set(joined)
    assert [e["round"] for e in events if e["event"] == ROUND] == [1, 2, 3]
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)


def test_a_samples_way_can_be_followed_through_the_events(tmp_path: Path) -> None:
    run = run_server(exchanging(), tmp_path / "run")
    moved = [e for e in read_lines(run.events) if e["event"] == MOVED]
    assert [row["moved"] for row in run.rows()] == [
        sum(e["count"] for e in moved if e["round"] == round) for round in (1, 2, 3)
    ]
    owner = ShardLedger.load(run.ledger).shard
    last = {i: e["to"] for e in moved for i in e["ids"]}
    assert last, "nothing moved"
    assert all(owner[i] == shard for i, shard in last.items())
    sample, target = next(iter(last.items()))
    shown = ret_fl("show", run.path, "--sample", sample).output
    assert f"to shard {target}" in shown.splitlines()[-1]


def test_status_of_a_finished_run_names_its_shards_and_nodes(run_dir: Path) -> None:
    shown = ret_fl("status", run_dir)
    assert shown.exit_code == 0, shown.output
    status = read_status(RunDir.existing(run_dir))
    last = RunDir.existing(run_dir).rows()[-1]
    assert status.finished
    assert (status.done, status.rounds) == (last["round"], last["round"])
    assert f"{last['round']} of {last['round']} rounds, finished" in shown.output
    for shard, row in last["shards"].items():
        found = status.shards[int(shard)]
        assert (found.loss, found.skip_rate, found.samples) == (row["loss"], row["skip_rate"], row["samples"])
        assert status.nodes[found.node].partition == row["partition"]  # type: ignore[index]
        assert f"{row['loss']:.4f}" in shown.output


def test_status_between_rounds_tells_what_was_done_and_what_is_left(tmp_path: Path) -> None:
    looks: list[RunStatus] = []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and (tmp_path / "run" / "events.jsonl").is_file():
            looks.append(read_status(RunDir.existing(tmp_path / "run")))
        return client_app(message, context)

    run_server(RunConfig.from_flat(TINY | {"num-server-rounds": 2}), tmp_path / "run", client)
    before, later = looks[0], looks[-1]
    assert (before.done, before.finished, before.seconds_left) == (0, False, None)
    assert (later.done, later.finished) == (1, False)
    assert later.seconds_left == pytest.approx(later.seconds_a_round)
    assert {s.state for s in later.shards.values()} == {"round 1: trained"}
    assert all(n.speed and not n.orders and n.state == "idle" for n in later.nodes.values())


def test_status_tells_who_is_at_work_and_who_is_gone(tmp_path: Path) -> None:
    config = RunConfig.from_flat(TINY | {"out": str(tmp_path / "run"), "shards": 3})
    run = RunDir.begin(config)
    journal = Journal(run.events, 7)
    for node in (11, 12, 13):
        journal.note(JOINED, node=node, partition=node - 11, device="cuda:0", samples=24)
        journal.note(SENT, round=4, shard=node - 11, node=node, images=100, attempt=1)
    journal.note(TRAINED, round=4, shard=1, node=12, images=100, samples=8, seconds=2.0, loss=0.5, skip_rate=0.25)
    journal.note(GONE, node=13)
    journal.note(FAILED, round=4, shard=2, node=13, why="the node is gone")
    journal.note(SENT, round=4, shard=2, node=12, images=100, attempt=2)
    status = read_status(run)
    assert [status.nodes[n].state for n in (11, 12, 13)] == ["has shard 0", "has shard 2", "gone"]
    assert [s.state for s in status.shards.values()] == [
        "round 4: ordered",
        "round 4: trained",
        "round 4: ordered again",
    ]
    assert (status.nodes[12].speed, status.nodes[13].there) == (50.0, False)
    shown = ret_fl("status", run.path).output
    assert "round 4 shard 2 node 13: the node is gone" in shown
    journal.note(BACK, node=13)
    assert read_status(run).nodes[13].state == "idle"
    journal.note(REFUSED, node=12)
    assert not read_status(run).nodes[12].there
    for node, shard in ((11, 0), (12, 2)):
        journal.note(TRAINED, round=4, shard=shard, node=node, images=9, samples=8, seconds=2.0, loss=0.5, skip_rate=0)
    run.write_config(config.model_copy(update={"min_nodes": 3}))
    assert "waits for nodes: 2 of min-nodes=3 are there" in ret_fl("status", run.path).output
    journal.note(JOINED, node=12, partition=1, device="cuda:0", samples=24)
    assert read_status(run).nodes[12].there, "its data was mended"
    assert "last sign of life" in ret_fl("status", run.path).output


def test_a_run_that_no_process_writes_any_more_is_told_as_stopped(tmp_path: Path) -> None:
    run = RunDir.begin(RunConfig.from_flat(TINY | {"out": str(tmp_path / "run")}))
    Journal(run.events, 7).note(ROUND, round=1, seconds=9.0)
    assert read_status(run).seconds_left, "it may only be slow"
    [event] = read_lines(run.events)
    run.events.write_text(json.dumps(event | {"time": event["time"] - 600}) + "\n")
    with run.locked(0):
        assert read_status(run).seconds_left, "its server lives"
    status = read_status(run)
    assert status.stopped
    assert status.seconds_left is None
    shown = " ".join(ret_fl("status", run.path).output.split())
    assert "stopped 10 min ago" in shown
    assert f"ret-fl run --resume {run.path}" in shown
    Journal(run.events, 7).note(BEGUN, deployed=True)
    assert read_status(run).resume_command == f"flwr run . --stream --run-config 'resume=\"{run.path}\"'"


def test_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    def fail(request: Message, reply: Message) -> Message:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the GPU is on fire"), reply_to=request)

    failing: Callable[..., Message] = spoiling(0, fail)
    run = run_server(RunConfig.from_flat(TINY | {"retries": 0, "quorum": 0.5}), tmp_path / "run", failing)
    (failed,) = [e for e in read_lines(run.events) if e["event"] == FAILED and e["round"] == 1][:1]
    assert (failed["shard"], failed["level"], failed["why"]) == (0, "WARNING", "the GPU is on fire")
    shown = ret_fl("status", run.path).output
    assert "the GPU is on fire" in shown


def test_prometheus_is_told_what_status_shows(run_dir: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", "from ret_fl.cli import app; app()", "status", str(run_dir)]
    process = subprocess.Popen(
        [*command, "--prometheus", str(port)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/metrics", process, run_dir / "flower.log")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    finally:
        process.kill()
        process.communicate()
    last = RunDir.existing(run_dir).rows()[-1]
    for key in ("round", "loss", "skip_rate", "moved", "quarantined"):
        (sample,) = families[f"ret_fl_{key}"].samples
        assert (sample.labels, sample.value) == ({"run": run_dir.name}, pytest.approx(last[key])), key
    losses = {s.labels["shard"]: s.value for s in families["ret_fl_shard_loss"].samples}
    assert losses == {shard: pytest.approx(row["loss"]) for shard, row in last["shards"].items()}
    assert [s.value for s in families["ret_fl_node_up"].samples] == [1.0, 1.0]


def test_a_half_written_event_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path, 7).note(SENT, round=1, shard=0, node=5)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert [e["event"] for e in read_lines(path)] == [SENT]


def test_an_event_after_a_torn_one_has_a_line_of_its_own(tmp_path: Path) -> None:
    """A power cut in mid-line, then a resumed run: only the torn event is lost, to readers and to Prometheus."""
    run = RunDir.begin(RunConfig.from_flat(TINY | {"out": str(tmp_path / "run")}))
    Journal(run.events, 7).note(JOINED, node=11, partition=0, device="cpu", samples=24)
    whole = run.events.read_bytes()
    run.events.write_bytes(whole + whole[:20])
    later = Journal(run.events, 8)
    later.note(JOINED, node=12, partition=0, device="cpu", samples=24)
    later.note(SENT, round=1, shard=0, node=12, images=100, attempt=1)
    assert [e["run"] for e in read_lines(run.events, skip_torn=True)] == [7, 8, 8]
    assert read_status(run).shards[0].state == "round 1: ordered"
    assert "round 1: ordered" in ret_fl("status", run.path).output
    assert next(f for f in RunCollector(run).collect() if f.name == "ret_fl_node_up").samples[0].labels["node"] == "12"


@pytest.mark.parametrize("torn", [b'{"time": 1.0, "ev{"time": 2.0}', b"\0\0\0", b"\xff\xfe", b"7", b"{}}", b"[1]"])
def test_a_torn_line_in_the_middle_costs_that_line_only(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path, 7).note(SENT, round=1, shard=0, node=5)
    whole = path.read_bytes()
    path.write_bytes(whole + torn + b"\n" + whole)
    assert read_lines(path, skip_torn=True) == 2 * [json.loads(whole)]


def test_a_full_disk_ends_no_run_for_its_events(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, 7)
    journal.note(SENT, round=1, shard=0, node=5)
    limit = path.stat().st_size
    with no_file_beyond(limit + 20):  # half an event fits
        journal.note(ANSWERED, round=1, shard=0, node=5, seconds=1.0)
    assert path.stat().st_size == limit + 20
    journal.note(TRAINED, round=1, shard=0, node=5)
    assert [e["event"] for e in read_lines(path, skip_torn=True)] == [SENT, TRAINED]
    assert "events.jsonl cannot be written" in flower_log.text
    assert "order answered" in flower_log.text


FOREIGN = "no file [/srv/data] [code: 2004] [bold]x[/] :smile: \x1b[2J"


def test_what_a_node_says_is_shown_as_it_is(tmp_path: Path) -> None:
    run = RunDir.begin(RunConfig.from_flat(TINY | {"out": str(tmp_path / "[run]"), "shards": 1}))
    journal = Journal(run.events, 7)
    journal.note(JOINED, node=11, partition=0, device="[/cpu]", samples=24)
    journal.note(FAILED, round=1, shard=0, node=11, why=FOREIGN)
    shown = ret_fl("status", run.path)
    assert shown.exit_code == 0, shown.output
    plain = " ".join(shown.output.split())
    assert plain.count(FOREIGN.replace("\x1b", "?")) == 2  # as the shard's state, and as a failure
    for words in ("[/cpu]", "[run]:"):
        assert words in plain


def test_a_rounds_failure_is_shown_as_a_node_told_it(run_dir: Path, tmp_path: Path) -> None:
    """`ret-fl show`, and the line that `ret-fl run` prints."""
    out = tmp_path / "[run]"
    shutil.copytree(run_dir, out)
    rows = RunDir(out).rows()
    rows[-1] |= {"failures": 1, "failed_shards": {"1": FOREIGN}}
    (out / "metrics.jsonl").write_text("".join(map(as_line, rows[:-1])))
    progress = RunProgress(RunDir(out), len(rows))
    (out / "metrics.jsonl").write_text("".join(map(as_line, rows)))
    shown = ret_fl("show", out)
    assert shown.exit_code == 0, shown.output
    told = repr(FOREIGN)
    assert told in shown.output and "[run]" in shown.output
    with progress.console.capture() as printed, progress:
        pass
    assert told in printed.get()


def test_a_log_line_has_run_round_shard_and_node(flower_log: pytest.LogCaptureFixture) -> None:
    Journal(run=7).note(FAILED, round=2, shard=1, node=5, why='no "space" left')
    told, at = flower_log.messages[-1].rsplit(" at=", 1)
    assert told == "order failed: run=7 round=2 shard=1 node=5 why=" + json.dumps('no "space" left')
    assert abs(datetime.fromisoformat(at).timestamp() - time.time()) < 60


def test_status_of_neither_a_run_nor_a_superlink_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no config.json" in ret_fl("status", tmp_path).output
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    shown = ret_fl("status", "no-such-superlink")
    assert shown.exit_code == 1
    assert "no-such-superlink" in shown.output


def test_the_log_of_a_server_tells_what_its_events_do(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    run = run_server(exchanging(), tmp_path / "a run")
    records = dict.fromkeys(flower_log.records)  # caught twice, by Flower's logger and by the root's
    lines = [f"{record.levelname} :      {record.getMessage()}" for record in records]
    events = read_lines(run.events)
    told = from_log("\n".join(["INFO :      no event: of=ours", *lines]))
    assert len(told) == len(events)
    for shown, event in zip(told, events, strict=True):
        kept = {key: value for key, value in event.items() if key not in ("level", "ids")}
        assert set(shown) == set(kept)
        assert shown.pop("time") == pytest.approx(kept.pop("time"), abs=2)
        assert shown == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in kept.items()}
    status, by_folder = status_of_log("\n".join(lines), "finished:completed"), read_status(run)
    assert status
    assert (status.name, status.done, status.finished) == (str(run.path), 3, True)
    assert {k: (s.state, s.node, s.samples) for k, s in status.shards.items()} == {
        k: (s.state, s.node, s.samples) for k, s in by_folder.shards.items()
    }
    assert {k: (n.partition, n.state) for k, n in status.nodes.items()} == {
        k: (n.partition, n.state) for k, n in by_folder.nodes.items()
    }
    failed = status_of_log("\n".join(lines), "finished:failed")
    assert failed
    assert (failed.done, failed.finished, failed.stopped) == (3, False, True)
    cut = next(i for i, line in enumerate(lines) if "round finished" in line) + 1
    going_on = status_of_log("\n".join(lines[:cut]), "running")
    assert going_on
    assert (going_on.done, going_on.finished, going_on.stopped) == (1, False, False)
    assert status_of_log("INFO :      another app's log", "running") is None


def test_the_log_of_a_resumed_run_tells_where_it_went_on(tmp_path: Path, flower_log: pytest.LogCaptureFixture) -> None:
    run = run_server(exchanging(), tmp_path / "run")
    flower_log.clear()
    run_server(RunConfig.from_flat({"resume": str(run.path)}), run.path)
    status = status_of_log("\n".join(f"INFO : {message}" for message in flower_log.messages), "finished:completed")
    assert status
    assert (status.done, status.rounds, status.finished) == (3, 3, True)


@given(st.one_of(st.text(), st.integers().map(str), st.sampled_from(["nan", "1e5", "True", "007", "[" * 2000, "1_0"])))
def test_a_text_in_a_log_line_is_read_as_that_text(text: str) -> None:
    (event,) = from_log(f"INFO :      {as_text(FAILED, {'node': 7, 'why': text})}")
    assert event == {"time": event["time"], "event": FAILED, "node": 7, "why": text}
