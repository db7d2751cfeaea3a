"""Can this machine join a federation? The SuperLink's port, TLS, clock, and this SuperNode's key: one finding each.

What is sent: a GET of /health, and with a key one signed request to activate the node with a heartbeat interval that
Flower refuses *after* it has looked the key up. It changes nothing on the SuperLink, whether the node is online or not.
"""

from __future__ import annotations

import email.utils
import socket
import ssl
import stat
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from ret_fl.config import ConfigError
from ret_fl.deploy.certificates import load_node_key
from ret_fl.doctor import Finding, Verdict

TIMEOUT = 10.0
RENEW_DAYS = 30
INVALID_HEARTBEAT, ACTIVATION_FAILED = 2003, 2004
"""Flower's answers to the request above: the key is registered, or it is not."""

# OpenSSL's verify codes
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64


def examine_superlink(address: str, root_certificates: Path | None, key: Path | None) -> list[Finding]:
    """Check the SuperLink at `address` (host:port) step by step; the first step that fails ends it.

    Args:
        root_certificates: the CA's certificate (PEM); None: the SuperLink is expected to speak plain HTTP.
        key: this SuperNode's private key; None: whether it is registered is not checked.
    """
    host, _, port_text = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        return [Finding.failure("superlink", f"{address!r} is no address", "give HOST:PORT, without https://")]
    port = int(port_text)
    findings = [check_reachable(host, port)]
    if findings[-1].verdict == Verdict.FAILURE:
        return findings
    trust: ssl.SSLContext | None = None
    if root_certificates is None:
        advice = "give --root-certificates: without TLS whoever is in between reads and changes everything"
        findings.append(Finding.warning("tls", "not asked for", advice))
    else:
        try:
            trust = _trust(root_certificates)
        except (OSError, ssl.SSLError) as error:
            advice = "give the CA's certificate, ca.crt of the kit"
            return [*findings, Finding.failure("tls", f"{root_certificates}: {error}", advice)]
        findings.append(check_tls(host, port, trust))
        if findings[-1].verdict == Verdict.FAILURE:
            return findings
    findings += check_flower(host, port, trust)
    if findings[-1].verdict != Verdict.FAILURE and key is not None:
        findings.append(check_key(address, root_certificates, key))
    return findings


def _trust(root_certificates: Path) -> ssl.SSLContext:
    """What Flower's own clients trust: the given CA and nothing else."""
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.load_verify_locations(cafile=root_certificates)
    return trust


def check_reachable(host: str, port: int) -> Finding:
    """A TCP connection to the SuperLink's port."""
    where = f"{host} port {port}"
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except socket.gaierror:
        return Finding.failure("reachable", f"no machine is known as {host}", "check the name, DNS or /etc/hosts")
    except ConnectionRefusedError:
        return Finding.failure(
            "reachable",
            f"{where} refuses connections",
            "start the SuperLink (systemctl status ret-fl-superlink); check the port, and that it binds more than "
            "127.0.0.1",
        )
    except TimeoutError:
        return Finding.failure("reachable", f"{where} does not answer", "open the port in the firewalls in between")
    except OSError as error:
        return Finding.failure("reachable", f"{where}: {error}", "check the network and the address")
    return Finding.ok("reachable", where)


def check_tls(host: str, port: int, trust: ssl.SSLContext) -> Finding:
    """A TLS handshake: the SuperLink's certificate is signed by the CA, in force, and for the name `host`."""
    try:
        certificate = _handshake(host, port, trust)
    except ssl.SSLCertVerificationError as error:
        return _refused(host, port, trust, error)
    except (ssl.SSLError, OSError) as error:
        advice = "the SuperLink runs without TLS: start it with the kit's `start`, or leave --root-certificates out"
        return Finding.failure("tls", f"no TLS handshake: {getattr(error, 'reason', None) or error}", advice)
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    found = f"certificate for {host} signed by the CA, valid for {days:.0f} days more"
    if days < RENEW_DAYS:
        return Finding.warning(
            "tls", found, "renew it: `ret-fl deploy init` again, copy superlink/, restart the SuperLink"
        )
    return Finding.ok("tls", found)


def _handshake(host: str, port: int, trust: ssl.SSLContext) -> Mapping[str, Any]:
    with (
        socket.create_connection((host, port), TIMEOUT) as connection,
        trust.wrap_socket(connection, server_hostname=host) as secured,
    ):
        return secured.getpeercert() or {}


def _refused(host: str, port: int, trust: ssl.SSLContext, error: ssl.SSLCertVerificationError) -> Finding:
    """Which of the ways to distrust a certificate it is."""
    again = "then copy superlink/ to its host and restart the SuperLink"
    if error.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        trust.check_hostname = False
        names = ", ".join(name for _, name in _handshake(host, port, trust).get("subjectAltName", ()))
        advice = f"use one of those names, or add {host} to superlink.also, `ret-fl deploy init` again, {again}"
        return Finding.failure("tls", f"the certificate is not for {host} but for {names}", advice)
    if error.verify_code == _EXPIRED:
        return Finding.failure("tls", "the certificate has expired", f"`ret-fl deploy init` again, {again}")
    if error.verify_code == _NOT_YET_VALID:
        return Finding.failure("tls", "the certificate is not valid yet", "set this machine's clock right (NTP)")
    advice = "use the ca.crt that was made with the SuperLink's certificate; if it is, somebody else answers here"
    return Finding.failure("tls", f"the certificate is not signed by this CA ({error.verify_message})", advice)


def check_flower(host: str, port: int, trust: ssl.SSLContext | None) -> list[Finding]:
    """That a SuperLink answers on the port, and how far this clock is from its clock (by the answer's Date)."""
    connection = HTTPConnection(host, port, timeout=TIMEOUT)
    if trust:
        connection = HTTPSConnection(host, port, timeout=TIMEOUT, context=trust)
    try:
        sent = time.time()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        now = (sent + time.time()) / 2
    except (OSError, HTTPException) as error:
        advice = "if the SuperLink runs with TLS, give --root-certificates; otherwise check what listens on the port"
        return [Finding.failure("superlink", f"no answer to HTTP: {error}", advice)]
    finally:
        connection.close()
    if answer.status != 200:
        found = f"GET /health answers {answer.status}"
        return [Finding.failure("superlink", found, "something else than a Flower 1.41 SuperLink listens on the port")]
    findings = [Finding.ok("superlink", "a SuperLink answers")]
    date = answer.getheader("Date")
    if date:
        # Date is in whole seconds, rounded down
        findings.append(check_clock(now - email.utils.parsedate_to_datetime(date).timestamp() - 0.5))
    return findings


def check_clock(ahead: float) -> Finding:
    """This clock against the SuperLink's, in seconds it is `ahead`: Flower refuses requests signed at a wrong time."""
    tolerance = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's, to a second"
    advice = (
        f"set both clocks by NTP (timedatectl set-ntp true): Flower refuses SuperNodes more than {tolerance[0]} s "
        f"ahead or {tolerance[1]} s behind"
    )
    if not -tolerance[1] < ahead < tolerance[0]:
        return Finding.failure("clock", found, advice)
    if abs(ahead) > tolerance[0] / 2:
        return Finding.warning("clock", found, advice)
    return Finding.ok("clock", found)


def check_key(address: str, root_certificates: Path | None, path: Path) -> Finding:
    """That the SuperNode's key is one Flower takes, private to its owner, and registered with the SuperLink."""
    try:
        key = load_node_key(path)
    except ConfigError as error:
        return Finding.failure("key", error, "use the kit's key for this SuperNode, or make one as it says")
    if root_certificates is None:
        advice = "give --root-certificates: Flower authenticates SuperNodes over TLS only"
        return Finding.failure("key", "not tried without TLS", advice)
    try:
        code = _code_of_refusal(address, root_certificates, key)
    except (ImportError, AttributeError, TypeError) as error:
        found = f"not tried: Flower {version('flwr')} has no request for it that this knows ({error})"
        return Finding.warning("key", found, "start the SuperNode: it exits with code 305 if the key is not registered")
    except (httpx.HTTPError, ValueError) as error:
        return Finding.failure("key", f"no answer: {error}", "try again; then look at the SuperLink's log")
    if code is None:
        return Finding.warning("key", "the SuperLink accepted a request it should refuse", "check its Flower version")
    return _judge_key(path, code)


def _code_of_refusal(address: str, root_certificates: Path, key: EllipticCurvePrivateKey) -> int | None:
    """How the SuperLink refuses the signed request; None if it does not.

    Flower has no public call that asks whether a key is registered: `flwr supernode list` shows no keys. This is the
    one place that speaks as its SuperNodes do, by modules of Flower that may move in another version.
    """
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import FlowerError
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    public = key.public_key()
    signing = NodeAuthHttpInterceptor(key, public)
    client = FleetHttpClient.from_server_address(address, False, root_certificates.read_bytes(), [signing])
    try:
        with client:
            client.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0))
    except httpx.HTTPStatusError as error:
        answer = FlowerError.from_json(error.response.text)
        return answer.code if answer else error.response.status_code
    return None


def _judge_key(path: Path, code: int) -> Finding:
    if code == INVALID_HEARTBEAT:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            found = f"registered, but others can read {path} (mode {mode:o})"
            return Finding.warning("key", found, f"chmod 600 {path}")
        return Finding.ok("key", "registered")
    if code == ACTIVATION_FAILED:
        advice = (
            "run the kit's operator/register (`flwr supernode register KEY.pub`), then start the SuperNode: until "
            "then it exits with code 305"
        )
        return Finding.failure("key", "not registered with this SuperLink", advice)
    if code == httpx.codes.UNAUTHORIZED:
        return Finding.failure("key", "the signature is refused", "see clock; otherwise take another key")
    return Finding.failure("key", f"unexpected answer {code}", "look at the SuperLink's log")
