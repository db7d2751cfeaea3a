"""`ret-fl serve-samples`, as a process: it serves a whole run, tells what it does, and refuses what would be unsafe."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, ret_fl, run_server
from sample_services import Authority, Serving, pictures

from clients import training
from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar, describe
from ret_fl.deploy.nodeconfig import NODE_SETTINGS
from ret_fl.samples import access
from ret_fl.samples.server import Tls

DATA: dict[str, Scalar] = {key: value for key, value in TINY.items() if key.startswith("data.")}


@dataclass
class Service:
    """A `ret-fl serve-samples` process and what it has printed."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    port: int = 0


@contextmanager
def served(*options: object) -> Iterator[Service]:
    sets = [part for key, value in DATA.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-c", "from ret_fl.cli import app; app()", "serve-samples", "--port", "0", *sets]
    process = subprocess.Popen(
        [*command, *map(str, options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    service, printed = Service(process), queue.Queue[str]()
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: [printed.put(line) for line in process.stdout], daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        while not service.port:
            service.lines.append(printed.get(timeout=60))
            if found := re.search(r"serving on 127\.0\.0\.1:(\d+)", service.lines[-1]):
                service.port = int(found[1])
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        reader.join(10)
        service.lines += [printed.get() for _ in range(printed.qsize())]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    answer = ret_fl("serve-samples", "--make-key", tmp_path / "keys")
    assert answer.exit_code == 0, answer.output
    return tmp_path / "keys"


def test_a_key_pair_is_made_once_and_the_secret_is_the_owners(keys: Path) -> None:
    assert stat.S_IMODE((keys / "signing-key.pem").stat().st_mode) == 0o600
    before = (keys / "signing-key.pem").read_bytes()
    again = ret_fl("serve-samples", "--make-key", keys)
    assert again.exit_code == 1 and "exists: name another folder" in again.output
    assert (keys / "signing-key.pem").read_bytes() == before


def test_a_whole_run_over_tls_gives_the_model_of_a_local_one(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("host")
    expected = load_latest(run_server(RunConfig.from_flat(TINY), tmp_path / "local").checkpoints).weights
    verify = ("--verify-key", keys / "verify-key.pem")
    with served(*verify, "--certificate", certificate, "--key", key) as service:
        settings = TINY | {
            "service.address": f"localhost:{service.port}",
            "service.ca": str(authority.path),
            "service.signing-key": str(keys / "signing-key.pem"),
            "data.cache-dir": str(tmp_path / "cache"),
        }
        monkeypatch.setattr(access, "load_splits", None)  # no client may read data of its own
        training._trainer.cache_clear()
        weights = load_latest(run_server(RunConfig.from_flat(settings), tmp_path / "remote").checkpoints).weights
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    said = "".join(service.lines)
    assert "24 training images of 1x8x8" in said and "TLS" in said
    assert re.search(r"run '[0-9a-f]{8}', round 1, shard 0: \d+ samples", said)
    secret = (keys / "signing-key.pem").read_text().splitlines()[1]
    assert secret not in said and "BEGIN" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--certificate and --key are needed for TLS"),
        (["--insecure"], "--verify-key PEM is needed"),
        (["--insecure", "--key", "k"], "--insecure has no use for --certificate"),
        (["--insecure", "--verify-key", "{keys}/signing-key.pem"], "is no PEM key without a pass phrase"),
        (["--insecure", "--verify-key", "{keys}/missing.pem"], "No such file"),
        (["--verify-key", "{keys}/verify-key.pem", "--certificate", "x.pem", "--key", "x.key"], "No such file"),
        (["--insecure", "--verify-key", "{keys}/verify-key.pem", "--set", "data.sorce=digits"], "did you mean"),
    ],
)
def test_what_would_be_unsafe_or_cannot_work_is_refused(keys: Path, options: list[str], message: str) -> None:
    answer = ret_fl("serve-samples", "--port", "0", *[option.format(keys=keys) for option in options])
    assert answer.exit_code == 1
    assert message in answer.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_certificate_made_by_hand_as_documented_is_one_that_clients_accept(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "samples.md").read_text()
    (block,) = [part for part in page.split("\n\n") if "openssl req -x509" in part]
    subprocess.run(["sh", "-euc", block], cwd=tmp_path, capture_output=True, check=True)
    serving = Serving(tmp_path, pictures(5))
    with serving.running(Tls(tmp_path / "host.pem", tmp_path / "host.key")):
        assert serving.access(insecure=False, ca=str(tmp_path / "ca.pem")).describe() == serving.known


def test_every_setting_that_a_node_replaces_exists() -> None:
    assert set(NODE_SETTINGS.values()) <= {setting.key for setting in describe()}
