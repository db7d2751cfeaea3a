"""The kit in containers: Compose and Kubernetes accept the files, and containers find what runs need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from threading import Event
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml
from compose_spec import PyCompose
from conftest import ROOT
from test_kit import NODES, example, started

from ret_fl.config import ConfigError
from ret_fl.deploy.federation import Federation
from ret_fl.deploy.kit import Kit, write_kit
from ret_fl.engines import end_with_children, free_port, wait_for


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return write_kit(example(), tmp_path_factory.mktemp("containers") / "kit")


def with_services(place: Path, **table: object) -> Federation:
    """The example with a sample service; `table` is added to the tables of both services."""
    (place / "run.toml").write_text('[data]\nsource = "image-folder"\npath = "/srv/data"\nimage-size = 16\n')
    superlink: dict[str, Any] = {"host": "superlink.example.org"} | table
    samples: dict[str, Any] = {"host": "data.example.org", "preset": str(place / "run.toml")} | table
    return example(superlink=superlink, samples=samples)


def documents(kit: Kit) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((kit.path / "kubernetes.yaml").read_text()))


def pods(kit: Kit) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents(kit) if d["kind"] == "Deployment"}


def service(kit: Kit, name: str) -> dict[str, Any]:
    """The only service of compose.yaml in this folder."""
    (only,) = yaml.safe_load((kit.path / name / "compose.yaml").read_text())["services"].values()
    return only


@pytest.mark.parametrize("folder", ["superlink", "alpha", "beta"])
def test_compose_files_fit_the_specification(kit: Kit, folder: str) -> None:
    text = (kit.path / folder / "compose.yaml").read_text()
    compose = PyCompose.from_yaml(text)  # refuses unknown keys and values
    compose.validate()
    with pytest.raises(ValueError, match="alwayz"):
        PyCompose.from_yaml(text.replace("restart: always", "restart: alwayz"))


def test_compose_gives_each_supernode_its_gpu_and_restarts_it(kit: Kit) -> None:
    services = yaml.safe_load((kit.path / "alpha" / "compose.yaml").read_text())["services"]
    for name, gpu in (("alpha-gpu0", "0"), ("alpha-gpu1", "1")):
        service = services[name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [gpu]
        assert service["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
        assert service["restart"] == "always"
        assert service["init"] is True  # a worker's parent ends
        assert service["command"][-1] == name


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_kubernetes_accepts_the_manifests(tmp_path: Path, version: str, tls: bool) -> None:
    kit = write_kit(example(tls=tls), tmp_path / "kit")
    documents = list(yaml.safe_load_all((kit.path / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    documents[-1]["spec"]["template"]["spec"]["containers"][0]["imagen"] = "typo"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[-1], version, strict=True)


def test_on_kubernetes_each_supernode_asks_for_one_gpu_and_mounts_its_own_secret(kit: Kit) -> None:
    documents = list(yaml.safe_load_all((kit.path / "kubernetes.yaml").read_text()))
    pods = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"}
    assert set(pods) == {"superlink", *NODES}
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    assert claims == {"superlink"}
    for name in NODES:
        (container,) = pods[name]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
        assert pods[name]["shareProcessNamespace"] is True  # a worker's parent ends
        assert {"name": "SUPERLINK", "value": "superlink:8000"} in container["env"]
        volumes = {volume["name"]: volume for volume in pods[name]["volumes"]}
        assert volumes["kit"]["secret"]["secretName"] == name
    for pod in pods.values():
        assert pod["containers"][0]["volumeMounts"][-1]["mountPath"] == "/srv/ret-fl/data"
        assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_makes_the_secrets_as_the_manifest_says(kit: Kit) -> None:
    lines = [line for line in (kit.path / "kubernetes.yaml").read_text().splitlines() if "create secret" in line]
    assert len(lines) == 1 + len(NODES)
    for line in lines:
        command = [*line.removeprefix("#").split(), "--dry-run=client", "--output=yaml"]
        done = subprocess.run(command, cwd=kit.path, capture_output=True, text=True, check=True)
        made = yaml.safe_load(done.stdout)
        assert {"start", "ca.crt"} < set(made["data"])
        kubernetes_validate.validate(made, "1.37", strict=True)


def test_the_image_has_all_that_presets_may_need() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (built_in,) = re.findall(r"^ARG EXTRAS=(.+)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert set(built_in.split(",")) == extras - {"dev"}


def test_containers_of_superlink_and_sample_service_find_the_folders_that_runs_name(tmp_path: Path) -> None:
    told = {"data-path": "/srv/data", "mounts": ["/srv/model", "/srv/held-out", "/srv/data"]}
    kit = write_kit(with_services(tmp_path, **told), tmp_path / "kit")
    folders = ["/srv/data", "/srv/model", "/srv/held-out"]
    for name in ("superlink", "samples"):
        volumes = service(kit, name)["volumes"]
        assert volumes[-3:] == [f"{folder}:{folder}:ro" for folder in folders]
        pod = pods(kit)[name]
        mounted = pod["containers"][0]["volumeMounts"][-3:]
        assert [(m["mountPath"], m["readOnly"]) for m in mounted] == [(folder, True) for folder in folders]
        paths = {v["name"]: v["hostPath"]["path"] for v in pod["volumes"] if "hostPath" in v}
        assert paths == {m["name"]: m["mountPath"] for m in mounted}
        PyCompose.from_yaml((kit.path / name / "compose.yaml").read_text()).validate()
    for document in documents(kit):
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_bind_is_where_compose_publishes_and_not_where_a_container_listens(tmp_path: Path) -> None:
    for bind, published in (("10.0.0.5", "10.0.0.5"), ("fd00::5", "[fd00::5]")):
        kit = write_kit(with_services(tmp_path, bind=bind), tmp_path / "kit")
        for name, port in (("superlink", 8000), ("samples", 9443)):
            compose = service(kit, name)
            assert compose["ports"] == [f"{published}:{port}:{port}"]
            PyCompose.from_yaml((kit.path / name / "compose.yaml").read_text()).validate()
            in_pod = {e["name"]: e["value"] for e in pods(kit)[name]["containers"][0]["env"]}
            for told in (compose["environment"], in_pod):
                words = started(kit.path / name / "start", tmp_path=tmp_path, BIND=told["BIND"])
                assert words[words.index("--host") + 1] == "0.0.0.0"
            words = started(kit.path / name / "start", tmp_path=tmp_path)
            assert words[words.index("--host") + 1] == (bind if name == "superlink" else published)


def test_what_a_service_binds_must_be_an_address() -> None:
    with pytest.raises(ConfigError, match=r"superlink.bind: must be an IP address"):
        example(superlink={"host": "sl.example.org", "bind": "sl.example.org"})


def test_pods_that_run_submitted_code_hold_no_token_and_gain_no_rights(tmp_path: Path) -> None:
    kit = write_kit(with_services(tmp_path), tmp_path / "kit")
    assert set(pods(kit)) == {"superlink", "samples", *NODES}
    for pod in pods(kit).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_only_the_namespace_reaches_any_pod(tmp_path: Path) -> None:
    kit = write_kit(with_services(tmp_path), tmp_path / "kit")
    (policy,) = [d["spec"] for d in documents(kit) if d["kind"] == "NetworkPolicy"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}


@pytest.mark.parametrize("tls", [True, False])
def test_pods_that_hang_are_started_again(tmp_path: Path, tls: bool) -> None:
    (tmp_path / "run.toml").write_text("data.limit = 24")
    samples = {"host": "data.example.org", "preset": str(tmp_path / "run.toml")}
    kit = write_kit(example(tls=tls, samples=samples), tmp_path / "kit")
    probes = {name: pod["containers"][0]["livenessProbe"] for name, pod in pods(kit).items()}
    assert probes["superlink"]["httpGet"] == {"path": "/health", "port": 8000, "scheme": "HTTPS" if tls else "HTTP"}
    assert probes["samples"]["tcpSocket"] == {"port": 9443}


def test_a_supernode_is_alive_while_it_answers_on_its_loopback_port(tmp_path: Path) -> None:
    # Flower's own: without a SuperLink it waits for one
    hosts = [{"name": "alpha", "runtime-port": free_port()}]
    superlink = {"host": "127.0.0.1", "port": free_port()}
    kit = write_kit(example(hosts=hosts, superlink=superlink, tls=False), tmp_path / "kit")
    probe = pods(kit)["alpha"]["containers"][0]["livenessProbe"]["exec"]["command"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RET_FL_STATE": str(tmp_path / "state"),
    }

    def alive() -> bool:
        return subprocess.run(probe, env=environment, stderr=subprocess.DEVNULL, timeout=30).returncode == 0

    log_file = tmp_path / "log"
    with log_file.open("wb") as log:
        node = subprocess.Popen([kit.path / "alpha" / "start", "alpha"], env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{hosts[0]['runtime-port']}/health", node, log_file, None)
        assert alive()
    finally:
        end_with_children({psutil.Process(node.pid)}, Event())
    assert not alive()
