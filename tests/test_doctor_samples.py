"""`ret-fl doctor` on a node whose samples a service has: what it serves, and what is wrong where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY
from sample_services import Authority, Serving, pictures
from test_doctor import assert_fails
from tiny_pipelines import text_pipeline

from ret_fl.config import RunConfig, Scalar
from ret_fl.deploy import certificates
from ret_fl.doctor import Finding, Verdict, check_service, examine_machine
from ret_fl.samples.access import open_access
from ret_fl.samples.server import Tls


@pytest.fixture
def service(tmp_path: Path) -> Serving:
    return Serving(tmp_path, pictures(30, (1, 8, 8)))


def of_service(service: Serving, **changes: Scalar) -> RunConfig:
    """What a node without data is told."""
    here: dict[str, Scalar] = {"service.address": f"localhost:{service.port}", "service.patience": 0.5}
    missing: dict[str, Scalar] = {"data.source": "image-folder", "data.path": "/no/such", "data.limit": 0}
    return RunConfig.from_flat(TINY | here | missing | {"data.cache-dir": str(service.folder / "cache")} | changes)


def test_a_node_without_data_is_examined_by_what_its_service_has(service: Serving, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with service.running(Tls(*authority.issue("host"))):
        node = of_service(service, **{"service.ca": str(authority.path)})
        findings = examine_machine(node, service.known.fingerprint[:12])
        assert not [f for f in findings if f.verdict == Verdict.FAILURE]
        data = next(f for f in findings if f.check == "data")
        assert "30 training images of 1x8x8" in data.found and service.known.fingerprint in data.found
        assert {"model", "memory, client", "disk, results"} <= {f.check for f in findings}
        assert_fails(check_service(node, "00")[0], "expected 00", "samples.preset")


def test_a_service_that_does_not_serve_is_told_by_what_is_wrong_with_it(service: Serving, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    ca: dict[str, Scalar] = {"service.ca": str(authority.path)}

    def found(**changes: Scalar) -> Finding:
        open_access.cache_clear()  # a connection that failed is not tried again at once
        findings = examine_machine(of_service(service, **changes))
        assert findings[-1].check == "data"
        return findings[-1]

    with service.running(Tls(*authority.issue("host"))):
        assert_fails(found(**{"service.ca": str(stranger.path)}), "the kit's ca.crt")
        assert_fails(found(**{"service.ca": str(tmp_path / "none.crt")}), "none.crt", "service.*")
        assert_fails(found(**{"service.insecure": True}), "wants TLS")
    assert_fails(found(**ca), "Connection refused", "systemctl status ret-fl-samples")
    assert_fails(found(**ca, **{"service.address": "no-such-host.invalid:1"}), "DNS")
    with service.running():
        assert_fails(found(**ca), "runs with --insecure: start it")
        open_access.cache_clear()
        plain, _ = check_service(of_service(service, **{"service.insecure": True}))
        assert plain.verdict == Verdict.WARNING and "use TLS" in plain.advice
    certificate, key = certificates.Authority.open(tmp_path / "ca", "ca").issue(["other.example.org"], 1)
    (tmp_path / "other.pem").write_bytes(certificate)
    (tmp_path / "other.key").write_bytes(key)
    with service.running(Tls(tmp_path / "other.pem", tmp_path / "other.key")):
        assert_fails(found(**ca), "samples.also")


def test_a_model_that_draws_from_text_cannot_be_served(service: Serving, tmp_path: Path) -> None:
    model = text_pipeline(tmp_path / "model")
    with service.running():
        node = of_service(service, **{"service.insecure": True, "model.init-from": str(model)})
        assert_fails(examine_machine(node)[-1], "serves no captions")
