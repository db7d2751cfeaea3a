"""The kit's sample service, and what hosts tell their SuperNodes: it serves over TLS, nodes without data find it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kubernetes_validate
import pytest
import torch
import yaml
from compose_spec import PyCompose
from conftest import ROOT, TINY, ret_fl
from flwr.common.config import parse_config_args
from sample_services import Serving
from test_kit import example, handshake, started

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.deploy import nodeconfig
from ret_fl.deploy.certificates import make_signing_key
from ret_fl.deploy.federation import Federation, read_federation
from ret_fl.deploy.kit import Kit, write_kit
from ret_fl.diffusion.text_to_image import data_read
from ret_fl.engines import free_port
from ret_fl.samples.access import open_access
from ret_fl.samples.client import SampleServiceError
from ret_fl.samples.grants import make_key_pair
from ret_fl.samples.records import Description
from ret_fl.settings import to_toml
from ret_fl.worker import calls

SERVED: dict[str, Scalar] = {"data.limit": 24}
HOSTS = [{"name": "alpha"}, {"name": "beta", "data-path": "/srv/data"}]


def with_samples(place: Path, **changes: object) -> Federation:
    """A federation on loopback: alpha has no data, beta has, and the service what the preset in `place` says."""
    (place / "run.toml").write_text(to_toml(SERVED))
    samples = {"host": "127.0.0.1", "bind": "127.0.0.1", "port": free_port(), "preset": str(place / "run.toml")}
    return example(samples=samples, **{"hosts": HOSTS} | changes)


def told(kit: Kit, host: str, node: str, folder: Path, **environment: str) -> dict[str, Scalar]:
    """The node config that a SuperNode is started with, as Flower reads it."""
    words = started(kit.path / host / "start", node, tmp_path=folder, **environment)
    return parse_config_args([words[words.index("--node-config") + 1]])


def on_node(node_config: dict[str, Scalar]) -> RunConfig:
    """The run's settings on a node that was told this."""
    replaced = {
        nodeconfig.NODE_SETTINGS[key]: value for key, value in node_config.items() if key in nodeconfig.NODE_SETTINGS
    }
    return RunConfig.from_flat(TINY | replaced)


@contextmanager
def serving(kit: Kit, folder: Path) -> Iterator[None]:
    """The service, started as its host starts it."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [kit.samples / "start"],
        env=os.environ | {"PATH": tools, "RET_FL_STATE": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = next((line for line in process.stdout if "serving on" in line or "rror" in line), "")
        assert "serving on" in said, said
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.mark.parametrize("tls", [True, False])
def test_a_node_without_data_is_served_by_the_kits_service(tmp_path: Path, tls: bool) -> None:
    kit = write_kit(with_samples(tmp_path, tls=tls), tmp_path / "kit")
    node = on_node(told(kit, "alpha", "alpha", tmp_path) | {"cache-dir": str(tmp_path / "cache")})
    assert node.service.insecure != tls and bool(node.service.ca) == tls
    splits = load_splits(data_read(RunConfig.from_flat(SERVED)))
    expected = Description.of(splits.train, splits.kind)
    signed = Serving(tmp_path / "unused", splits.train)
    signed.known = expected
    with serving(kit, tmp_path / "state"):
        access = open_access(node.service, data_read(node))
        assert access.describe() == expected
        order = signed.order([3, 1], key=kit.superlink / "signing-key.pem")
        images, _ = access.samples(order).fetch(torch.tensor([3, 1]))
        assert torch.equal(images, splits.train.fetch(torch.tensor([3, 1]))[0])
        with pytest.raises(SampleServiceError, match="is not signed by this service's server"):
            access.samples(signed.order([5]))


def test_hosts_with_data_are_not_sent_to_the_service(tmp_path: Path) -> None:
    kit = write_kit(with_samples(tmp_path), tmp_path / "kit")
    assert on_node(told(kit, "beta", "beta", tmp_path) | {"data-path": ""}).service.address == ""
    without = write_kit(example(hosts=HOSTS), tmp_path / "without")
    assert "sample-service" not in told(without, "alpha", "alpha", tmp_path)
    assert not without.samples.exists() and not (without.superlink / "signing-key.pem").exists()


def test_the_services_address_can_be_replaced_from_outside(tmp_path: Path) -> None:
    kit = write_kit(with_samples(tmp_path), tmp_path / "kit")
    assert told(kit, "alpha", "alpha", tmp_path, SAMPLE_SERVICE="samples:1")["sample-service"] == "samples:1"


def test_the_secret_key_is_the_superlinks_and_a_second_init_keeps_it(tmp_path: Path) -> None:
    federation = with_samples(tmp_path)
    kit = write_kit(federation, tmp_path / "kit")
    secret, public = kit.superlink / "signing-key.pem", kit.samples / "verify-key.pem"
    before = secret.read_bytes(), public.read_bytes(), (kit.samples / "server.pem").read_bytes()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    holders = [f for f in kit.path.rglob("*") if f.is_file() and before[0].splitlines()[1] in f.read_bytes()]
    assert holders == [secret]
    write_kit(federation, tmp_path / "kit")
    assert (secret.read_bytes(), public.read_bytes()) == before[:2]
    assert (kit.samples / "server.pem").read_bytes() != before[2]
    files = {
        "server.pem",
        "server.key",
        "verify-key.pem",
        "preset.toml",
        "start",
        "compose.yaml",
        "ret-fl-samples.service",
    }
    assert {file.name for file in kit.samples.iterdir()} == files


def test_the_certificate_is_for_the_services_names(tmp_path: Path) -> None:
    federation = with_samples(tmp_path)
    kit = write_kit(federation, tmp_path / "kit")
    for name in ("127.0.0.1", "localhost", "samples"):
        handshake(kit.samples, kit.operator / "ca.crt", name)


def test_both_ways_of_making_a_signing_key_give_the_same_kind(tmp_path: Path) -> None:
    secret, public = make_key_pair(tmp_path / "keys")
    assert make_signing_key(secret) == public.read_bytes()
    shutil.copy(public, secret)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_signing_key(secret)


def test_the_preset_lies_beside_the_federation_file_and_is_checked(tmp_path: Path) -> None:
    file, preset = tmp_path / "federation.toml", tmp_path / "run.toml"
    file.write_text(
        '[superlink]\nhost = "a"\n[samples]\nhost = "b"\npreset = "run.toml"\ndata-path = "/d"\n[[hosts]]\nname = "c"'
    )

    def init() -> str:
        return ret_fl("deploy", "init", file, "--out", tmp_path / "kit").output

    assert "[samples] preset" in init() and "No such file" in init()
    preset.write_text("data.limit = 24")
    assert "data.path is set but data.source=digits" in init()
    assert not (tmp_path / "kit").exists()
    preset.write_text('shards = 4\n[data]\nsource = "image-folder"\npath = "/elsewhere"\nimage-size = 16')
    assert "to b, as /srv/ret-fl/kit-samples" in init()
    kit = Kit(tmp_path / "kit")
    served = ret_fl("config", "--preset", kit.samples / "preset.toml", "--toml").output
    assert 'data.path = "/d"' in served and "data.image-size = 16" in served
    assert read_federation(file).samples is not None


def test_the_name_of_the_services_folder_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples is the name of a folder of the kit"):
        example(hosts=[{"name": "samples"}])


# --- node-config ------------------------------------------------------------------------------------------------


def test_a_hosts_own_node_config_is_told_above_the_kits(tmp_path: Path) -> None:
    own: dict[str, Scalar] = {
        "cache-dir": "/var/cache/ret-fl",
        "model-folder": "/srv/model",
        "device": "cuda:1",
        "sample-compression": "zlib",
        "sample-cache-mb": 500,
        "worker-idle": 60.5,
    }
    hosts = [{"name": "alpha", "gpus": [0], "node-config": own}]
    kit = write_kit(with_samples(tmp_path, hosts=hosts), tmp_path / "kit")
    config = told(kit, "alpha", "alpha-gpu0", tmp_path)
    assert own.items() <= config.items() and config["worker"] is True
    service = on_node(config).service
    assert (service.compression, service.cache_mb) == ("zlib", 500) and service.address
    (volumes,) = [
        s["volumes"] for s in yaml.safe_load((kit.path / "alpha/compose.yaml").read_text())["services"].values()
    ]
    assert {"/srv/model:/srv/model:ro", "/var/cache/ret-fl:/var/cache/ret-fl"} <= set(volumes)


def test_a_host_can_be_left_to_its_own_data_without_a_path(tmp_path: Path) -> None:
    hosts = [{"name": "alpha", "node-config": {"sample-service": ""}}]
    kit = write_kit(with_samples(tmp_path, hosts=hosts), tmp_path / "kit")
    assert on_node(told(kit, "alpha", "alpha", tmp_path)).service.address == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cache-dri": "/x"}, "cache-dri is unknown: did you mean cache-dir"),
        ({"data-path": "/x"}, "set the host's own data-path"),
        ({"worker": True}, "set the host's own worker"),
        ({"cache-dir": "x"}, "cache-dir must be an absolute path"),
        ({"cache-dir": '/x" $(id)'}, "letters, digits"),
        ({"sample-cache-mb": 0}, "greater than or equal to 1"),
        ({"sample-compression": "gzip"}, "'none' or 'zlib'"),
        ({"sample-insecure": [True]}, "must be one number, true or false, or text"),
        ({"worker-idle": -1}, "seconds above 0"),
    ],
)
def test_a_bad_node_config_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match="hosts") as error:
        example(hosts=[{"name": "alpha", "node-config": config}])
    assert message in str(error.value)


def test_how_long_a_worker_waits_is_told_as_it_reads_it() -> None:
    assert nodeconfig.IDLE == calls.IDLE


# --- units, compose, Kubernetes ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit_beside_the_superlinks(tmp_path: Path) -> None:
    kit = write_kit(with_samples(tmp_path, folder=str(tmp_path), user="root"), tmp_path / "made")
    shutil.copytree(kit.samples, tmp_path / "kit-samples")  # where ExecStart looks
    command = ["systemd-analyze", "verify", str(kit.samples / "ret-fl-samples.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    assert "Restart=always" in (kit.samples / "ret-fl-samples.service").read_text()


@pytest.mark.parametrize("tls", [True, False])
def test_compose_and_kubernetes_accept_the_service(tmp_path: Path, tls: bool) -> None:
    hosts = [{"name": "alpha", "node-config": {"cache-dir": "/c", "model-folder": "/m"}}]
    kit = write_kit(with_samples(tmp_path, hosts=hosts, tls=tls), tmp_path / "kit")
    for folder in ("samples", "alpha"):
        PyCompose.from_yaml((kit.path / folder / "compose.yaml").read_text()).validate()
    text = (kit.path / "kubernetes.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
    assert {"samples", "superlink", "alpha"} <= {d["metadata"]["name"] for d in documents if d["kind"] == "Deployment"}
    secrets = [line for line in text.splitlines() if "create secret generic" in line]
    for line in secrets:
        for option in (word for word in line.split() if word.startswith("--from-file=")):
            assert (kit.path / option.removeprefix("--from-file=")).is_file(), option
    assert sum("signing-key.pem" in line and "generic superlink" in line for line in secrets) == 1
