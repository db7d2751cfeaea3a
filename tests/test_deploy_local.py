"""`ret-fl deploy local`: SuperLink and SuperNodes with TLS on loopback, from start to a finished run, nothing left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY
from test_flwr_engine import MARK, assert_nothing_is_left

from ret_fl.deploy.certificates import make_node_key
from ret_fl.deploy.local import local_federation
from ret_fl.doctor import Verdict
from ret_fl.engines import RunFailedError
from ret_fl.rundir import RunDir
from ret_fl.superlink_checks import check_key, examine_superlink

pytestmark = pytest.mark.deployment


def deploy_local(tmp_path: Path, mark: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from ret_fl.cli import app; app()", "deploy", "local", "--app", str(ROOT)]
    return subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {MARK: mark, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background job of a script ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_three_supernodes_train_over_tls_and_nothing_is_left(tmp_path: Path) -> None:
    settings = TINY | {"num-server-rounds": 1, "wait-seconds": 120}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    out = tmp_path / "run"
    process = deploy_local(tmp_path, "local-run", "--shards", "3", "--tls", "--out", str(out), *sets)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    steps = ["making certificates", "starting the SuperLink", "registering the keys", "starting SuperNodes node0, ",
             "SuperNode 1 of 3", "SuperNode 3 of 3", "ready: SuperLink", "round 1/1", "ending SuperNodes"]  # fmt: skip
    assert sorted(steps, key=stdout.index) == steps and "keys registered" in stdout
    (row,) = RunDir(out).rows()
    assert sorted(row["shards"]) == ["0", "1", "2"] and row["failures"] == 0
    log = (out / "flower.log").read_text()
    assert log.count("SuperNode ID") == 3
    assert "SuperNode authentication is disabled" not in log
    assert_nothing_is_left("local-run")
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_staying_up_ends_cleanly_on_sigterm_however_often(tmp_path: Path) -> None:
    """`timeout` sends it twice: once to the process, once to its group."""
    process = deploy_local(tmp_path, "local-stay", "--shards", "1", "--stay")
    assert process.stdout is not None
    for line in process.stdout:
        if "flwr list" in line:
            break
    time.sleep(1)
    for _ in range(3):
        process.terminate()
        time.sleep(0.3)
    process.communicate(timeout=60)
    assert process.returncode == 128 + 15
    assert_nothing_is_left("local-stay")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("until", ["starting SuperNodes", "flwr list"], ids=["while it starts", "once it is up"])
def test_a_second_ctrl_c_kills_what_does_not_end_and_nothing_is_left(tmp_path: Path, until: str) -> None:
    mark = f"local-interrupted-{until.split()[0]}"
    process = deploy_local(tmp_path, mark, "--shards", "1", "--stay", "--no-tls")
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if until in line:
            break
    (superlink,) = (p for p in psutil.Process(process.pid).children() if "--database" in p.cmdline())
    superlink.suspend()  # it hears of no SIGTERM
    process.send_signal(signal.SIGINT)
    said += iter(process.stdout.readline, "ending SuperNodes and SuperLink (Ctrl-C kills them at once)\n")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert stderr.strip() == "stopped: nothing is left running" and "Traceback" not in stdout
    assert said[0].startswith("starting the SuperLink on 127.0.0.1:")
    assert_nothing_is_left(mark)
    assert not list(tmp_path.iterdir())


def test_doctor_tells_a_registered_key_from_an_unknown_one_and_changes_nothing(tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    with local_federation(tmp_path, 1, log, tls=True) as running:
        address, (node,) = running.federation.superlink.address, running.federation.supernodes
        ca, key = running.kit.operator / "ca.crt", running.kit.host(node.host) / f"{node.name}.key"
        findings = examine_superlink(address, ca, key)
        assert [f.verdict for f in findings] == [Verdict.OK] * 5, findings
        make_node_key(tmp_path / "unknown.key")
        unknown = check_key(address, ca, tmp_path / "unknown.key")
        assert unknown.verdict == Verdict.FAILURE and "not registered" in unknown.found
        key.chmod(0o644)
        readable = check_key(address, ca, key)
        assert readable.verdict == Verdict.WARNING and "chmod 600" in readable.advice
        listed = subprocess.run(
            ["flwr", "supernode", "list", "--format", "json"],
            env=dict(running.environment),
            capture_output=True,
            check=True,
        )
        (only,) = json.loads(listed.stdout)["nodes"]
        assert only["status"] == "online"


def test_a_superlink_that_cannot_start_is_an_error_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("ret_fl.deploy.local.free_port", lambda: taken.getsockname()[1])
        running = local_federation(tmp_path, 1, tmp_path / "log", tls=False)
        with pytest.raises(RunFailedError, match="SuperLink ended at once"), running:
            pytest.fail("it started")
    assert "address already in use" in (tmp_path / "log").read_text()
