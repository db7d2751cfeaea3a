"""`ret-fl doctor`: each thing that can be wrong is told from the others, with what to do about it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, ret_fl
from tiny_pipelines import small_pipeline

from ret_fl.config import RunConfig, Scalar
from ret_fl.deploy.certificates import Authority, make_node_key
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.proxymodel import open_model
from ret_fl.doctor import (
    Finding,
    Verdict,
    check_client_memory,
    check_data,
    check_device,
    check_disk,
    check_packages,
    check_server_memory,
    checkpoint_bytes,
    client_memory,
    client_state_bytes,
    examine_machine,
    history_bytes,
    server_replies,
)
from ret_fl.history import Phase, save_phase
from ret_fl.superlink_checks import check_clock, check_key, examine_superlink

PRIVATE: dict[str, Scalar] = {
    "dp.mode": "server-fixed",
    "agc.mode": "off",
    "redistribution.policy": "none",
    "data.duplicates": "keep",
    "quorum": 1,
}


def config(**changes: Scalar) -> RunConfig:
    return RunConfig.from_flat(TINY | changes)


def assert_fails(finding: Finding, *words: str) -> None:
    assert finding.verdict == Verdict.FAILURE, finding
    assert finding.advice
    for word in words:
        assert word in finding.found + finding.advice, finding


# --- this machine -----------------------------------------------------------------------------------------------


def test_a_pretrained_model_of_another_noise_schedule_is_told(tmp_path: Path) -> None:
    model = small_pipeline(tmp_path / "model")
    schedule: dict[str, Scalar] = {"diffusion.timesteps": 100, "diffusion.prediction": "epsilon", "agc.t-max": 50}
    linear: dict[str, Scalar] = {"diffusion.beta-schedule": "linear"}
    finding = examine_machine(config(**schedule, **{"model.init-from": str(model)}))[-1]
    assert finding.check == "model"
    assert_fails(finding, "another schedule: set diffusion.beta-schedule=linear")
    told = ret_fl("run", "--app", ROOT, "--out", tmp_path / "run", "--set", f"model.init-from={model}")
    assert told.exit_code == 1 and "diffusion.timesteps=100" in told.stderr and not (tmp_path / "run").exists()
    assert examine_machine(config(**schedule, **linear, **{"model.init-from": str(model)}))[4].verdict == Verdict.OK


def test_a_machine_that_can_train_has_no_failure() -> None:
    findings = examine_machine(config())
    assert not [f for f in findings if f.verdict == Verdict.FAILURE]
    assert [f.check for f in findings] == [
        "python",
        "packages",
        "device",
        "data",
        "model",
        "memory, client",
        "memory, server",
        "disk, results",
        "disk, client state",
    ]


def test_a_missing_package_is_a_failure() -> None:
    assert_fails(check_packages("no-such-package"), "no-such-package is not installed", "make setup")


def test_a_device_that_is_not_there_is_a_failure() -> None:
    assert_fails(check_device(config(device="nonsense")), "nonsense", "device=auto")


def test_data_that_is_not_there_is_a_failure_and_nothing_is_estimated_from_it(tmp_path: Path) -> None:
    missing: dict[str, Scalar] = {"data.source": "image-folder", "data.path": str(tmp_path / "none"), "data.limit": 0}
    findings = examine_machine(RunConfig.from_flat(TINY | missing))
    assert_fails(findings[-1], str(tmp_path / "none"), "data.path")
    assert findings[-1].check == "data"


def test_other_data_than_expected_is_a_failure() -> None:
    finding, data = check_data(config())
    assert data is not None and data.train.fingerprint in finding.found
    assert check_data(config(), data.train.fingerprint[:12].upper())[0].verdict == Verdict.OK
    assert_fails(check_data(config(), "0" * 64)[0], "expected 000", "same files")


def test_an_image_size_that_does_not_fit_the_model_is_a_failure() -> None:
    findings = examine_machine(RunConfig.from_flat(TINY | {"model.preset": "ddpm-cifar"}))
    assert_fails(findings[-1], "data.image-size")


def test_too_little_memory_or_disk_is_a_failure_that_says_how_much(tmp_path: Path) -> None:
    assert_fails(check_client_memory(config(), 2**60), "1,073,741,824.00 GiB", "batch-size")
    assert check_server_memory(config(), 2**60).verdict == Verdict.WARNING
    assert_fails(check_disk("disk", tmp_path / "not" / "there", 2**60), "1,073,741,824.00 GiB", "keep-checkpoints")
    assert check_disk("disk", tmp_path / "not" / "there", 1).verdict == Verdict.OK


@pytest.mark.parametrize(
    ("settings", "few", "many", "advice"),
    [
        ({}, 6, 6, "smaller model.preset"),
        ({"aggregation.strategy": "fedadam"}, 6, 6, "smaller model.preset"),
        ({"aggregation.strategy": "fedmedian", "quorum": 1}, 6, 23, "averages replies as they come"),
        (PRIVATE, 6, 23, "without dp.mode"),
        ({"aggregate-every": 0, "redistribution.policy": "none"}, 9, 43, "fewer shards"),
    ],
)
def test_only_what_needs_all_replies_takes_more_memory_with_more_shards(
    settings: dict[str, Scalar], few: int, many: int, advice: str
) -> None:
    made = [config(**settings, shards=shards) for shards in (3, 20)]
    assert [server_replies(one) for one in made] == [few, many]
    finding = check_server_memory(made[1], 2**57)
    assert advice in finding.advice and f"{many} sizes of a reply" in finding.found
    assert ("fewer shards" in finding.advice) == (few != many)


def test_without_averaged_weights_a_reply_is_half_as_large() -> None:
    with_ema, without = (check_server_memory(config(**{"ema.decay": decay}), 2**30).found for decay in (0.9, 0))
    assert float(with_ema.split()[1].replace(",", "")) == 2 * float(without.split()[1].replace(",", ""))


def test_memory_grows_with_the_batch_and_holds_at_least_the_optimizer() -> None:
    _, data = check_data(config())
    assert data is not None
    model = open_model(config(), data.train.image_shape, 0)
    parameters = sum(p.numel() for p in model.unet.parameters())
    small, large = (client_memory(config(**{"batch-size": size}), model, data.train.image_shape) for size in (8, 16))
    assert small > 5 * 4 * parameters
    assert large - 20 * parameters == 2 * (small - 20 * parameters)


def test_the_disk_estimates_are_those_of_the_files_a_run_leaves(run_dir: Path) -> None:
    made = RunConfig.from_flat(json.loads((run_dir / "config.json").read_text()))
    _, data = check_data(made)
    assert data is not None
    unet = build_unet(made.model, data.train.image_shape, 0, 0)
    parameters = sum(p.numel() for p in unet.parameters())
    (newest, *_) = sorted((run_dir / "checkpoints").glob("round-*"), reverse=True)
    weights = (newest / "weights.safetensors").stat().st_size
    a_checkpoint = checkpoint_bytes(made, parameters) / (made.keep_checkpoints + 1.5)
    assert abs(a_checkpoint - weights) < 0.05 * weights
    state = next((run_dir / "proxies").rglob("*.safetensors")).stat().st_size
    assert abs(client_state_bytes(made, parameters) / (made.keep_checkpoints + 1) - state) < 0.05 * state


def test_the_history_of_a_run_takes_what_is_estimated_and_not_far_less(tmp_path: Path, run_dir: Path) -> None:
    made = RunConfig.from_flat(json.loads((run_dir / "config.json").read_text()))
    _, data = check_data(made)
    assert data is not None
    files = list((run_dir / "history").iterdir())
    assert len(files) == made.num_server_rounds
    assert sum(file.stat().st_size for file in files) <= history_bytes(made, len(data.train))
    rng, n = np.random.default_rng(0), 20_000
    shard, visits, skips = rng.integers(0, 100, n), rng.poisson(20, n), rng.poisson(2, n)
    save_phase(tmp_path, Phase(1, shard.astype("i4"), visits.astype("u4"), skips.astype("u4"), np.empty(0, np.int32)))
    (file,) = tmp_path.iterdir()
    estimate = history_bytes(config(**{"num-server-rounds": 1}), n)
    assert 0.5 * estimate < file.stat().st_size <= estimate


def test_results_count_checkpoints_and_history() -> None:
    rounds = 2_000_000  # so that history is the larger part
    finding = next(f for f in examine_machine(config(**{"num-server-rounds": rounds})) if f.check == "disk, results")
    samples = check_data(config())[1]
    assert samples is not None
    least = history_bytes(config(**{"num-server-rounds": rounds}), len(samples.train)) / 2**30
    assert float(finding.found.split()[1]) >= round(least, 2) > 1


def test_the_command_exits_with_1_and_prints_json() -> None:
    answer = ret_fl("doctor", "--json", "--fingerprint", "00", "--set", "data.limit=24")
    assert answer.exit_code == 1
    findings = {entry["check"]: entry for entry in json.loads(answer.output)}
    assert findings["data"]["verdict"] == "failure"
    assert findings["packages"]["verdict"] == "ok"


def test_the_table_says_what_to_do() -> None:
    answer = ret_fl("doctor", "--fingerprint", "00", "--set", "data.limit=24")
    assert answer.exit_code == 1
    assert "-> copy the very same files here" in answer.output
    answer = ret_fl("doctor", "--set", "data.limit=24", "--set", "agc.mode=nonsense")
    assert answer.exit_code == 1 and "agc.mode" in answer.output
    assert "--superlink" in ret_fl("doctor", "--root-certificates", "ca.crt").output


# --- a SuperLink ------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A server that answers /health; `date` replaces its clock's."""

    port: int
    ca: Path


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path, names: list[str], days: int = 90, *, tls: bool = True, status: int = 200) -> Iterator[Served]:
    """An HTTPS server with a certificate of `folder`'s authority."""
    certificate, key = Authority.open(folder, "test").issue(names, days)
    (folder / "server.pem").write_bytes(certificate + key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Health", (_Health,), {"status": status}))
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Served(server.server_address[1], folder / "ca.crt")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_sound_superlink_passes(tmp_path: Path) -> None:
    with serving(tmp_path, ["127.0.0.1"]) as served:
        findings = examine_superlink(f"127.0.0.1:{served.port}", served.ca, None)
    assert [(f.check, f.verdict) for f in findings] == [(c, "ok") for c in ("reachable", "tls", "superlink", "clock")]


def test_a_closed_port_and_an_unknown_name_are_told_apart() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (finding,) = examine_superlink(f"127.0.0.1:{port}", None, None)
    assert_fails(finding, "refuses connections", "start the SuperLink")
    (finding,) = examine_superlink("no-such-host.invalid:8000", None, None)
    assert_fails(finding, "no machine is known", "DNS")
    (finding,) = examine_superlink("https://host", None, None)
    assert_fails(finding, "HOST:PORT")


def test_another_authority_another_name_and_an_expired_certificate_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "other"):
        Authority.open(tmp_path / name, name)
    with serving(tmp_path / "one", ["superlink.example.org", "10.0.0.5"]) as served:
        address = f"127.0.0.1:{served.port}"
        assert_fails(examine_superlink(address, tmp_path / "other" / "ca.crt", None)[-1], "not signed by this CA")
        finding = examine_superlink(address, served.ca, None)[-1]
        assert_fails(finding, "not for 127.0.0.1 but for superlink.example.org, 10.0.0.5", "superlink.also")
    with serving(tmp_path / "one", ["127.0.0.1"], days=0) as served:
        assert_fails(examine_superlink(f"127.0.0.1:{served.port}", served.ca, None)[-1], "expired", "deploy init")


def test_a_certificate_about_to_expire_is_a_warning(tmp_path: Path) -> None:
    with serving(tmp_path, ["127.0.0.1"], days=10) as served:
        findings = examine_superlink(f"127.0.0.1:{served.port}", served.ca, None)
    assert findings[1].verdict == Verdict.WARNING and "renew" in findings[1].advice


def test_a_superlink_without_tls_is_told_from_one_with_it(tmp_path: Path) -> None:
    with serving(tmp_path, ["127.0.0.1"], tls=False) as served:
        address = f"127.0.0.1:{served.port}"
        assert_fails(examine_superlink(address, served.ca, None)[-1], "no TLS handshake", "without TLS")
        plain = examine_superlink(address, None, None)
        assert [f.verdict for f in plain] == ["ok", "warning", "ok", "ok"]
    with serving(tmp_path, ["127.0.0.1"]) as served:
        assert_fails(examine_superlink(f"127.0.0.1:{served.port}", None, None)[-1], "--root-certificates")


def test_another_service_on_the_port_is_no_superlink(tmp_path: Path) -> None:
    with serving(tmp_path, ["127.0.0.1"], status=404) as served:
        assert_fails(examine_superlink(f"127.0.0.1:{served.port}", served.ca, None)[-1], "404", "something else")


def test_a_ca_file_that_is_none_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "bad.crt").write_text("nonsense")
    with serving(tmp_path, ["127.0.0.1"]) as served:
        for file in ("bad.crt", "none.crt"):
            found = examine_superlink(f"127.0.0.1:{served.port}", tmp_path / file, None)[-1]
            assert_fails(found, file, "ca.crt")


@pytest.mark.parametrize(
    ("ahead", "verdict"),
    [(0, "ok"), (2, "ok"), (4, "warning"), (6, "failure"), (-2, "ok"), (-200, "warning"), (-306, "failure")],
)
def test_clocks_are_judged_as_flower_judges_timestamps(ahead: float, verdict: str) -> None:
    finding = check_clock(ahead)
    assert finding.verdict == verdict
    assert ("NTP" in finding.advice) == (verdict != "ok")


def test_a_key_of_the_wrong_kind_is_a_failure_before_anything_is_sent(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    with serving(tmp_path, ["127.0.0.1"]) as served:
        address = f"127.0.0.1:{served.port}"
        assert_fails(examine_superlink(address, served.ca, tmp_path / "key")[-1], "ssh-keygen -t ecdsa")
        assert_fails(examine_superlink(address, served.ca, tmp_path / "none")[-1], "No such file")
        make_node_key(tmp_path / "node.key")
        assert_fails(examine_superlink(address, served.ca, tmp_path / "node.key")[-1], "501")


def test_a_flower_that_speaks_otherwise_is_a_warning_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the key uses Flower's own modules, which another version may not have."""
    monkeypatch.setitem(sys.modules, "flwr.supernode.fleet_http_client", None)
    make_node_key(tmp_path / "node.key")
    finding = check_key("localhost:1", tmp_path / "node.key", tmp_path / "node.key")
    assert finding.verdict == Verdict.WARNING
    assert "not tried" in finding.found and "305" in finding.advice
