"""The kit: one folder a host, with no secrets but those it needs, and with what starts its part there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from jinja2 import Environment, PackageLoader, StrictUndefined

from ret_fl.deploy.certificates import Authority, make_node_key, write_private
from ret_fl.deploy.federation import Federation, Host

REACTIVATION_SECONDS = HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE
"""How long after its last sign of life the SuperLink takes a dead SuperNode for alive, and refuses its successor."""

_TEMPLATES = Environment(
    loader=PackageLoader("ret_fl.deploy"),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


class Kit:
    """A folder that `write_kit` made: one folder a host, `operator/` for who submits runs, `ca/` to lock away."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.ca = self.path / "ca"
        self.superlink = self.path / "superlink"
        self.operator = self.path / "operator"

    def host(self, host: Host) -> Path:
        """The folder that goes to this host."""
        return self.path / host.name


def write_kit(federation: Federation, out: Path) -> Kit:
    """Write the federation's kit into `out`; again into the same folder, it keeps authority and SuperNode keys.

    The SuperLink's certificate and key are made anew each time, which is how they are renewed. Raises `ConfigError`
    if the authority or a key found there cannot be used.
    """
    kit = Kit(out)
    for folder in (kit.path, kit.superlink, kit.operator, *map(kit.host, federation.hosts)):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    if federation.tls:
        _write_secrets(federation, kit)
    _render("start-superlink", kit.superlink / "start", federation, executable=True)
    _render("ret-fl-superlink.service", kit.superlink / "ret-fl-superlink.service", federation)
    _render("compose-superlink.yaml", kit.superlink / "compose.yaml", federation)
    for host in federation.hosts:
        folder = kit.host(host)
        about: dict[str, Any] = {"host": host, "nodes": federation.on(host)}
        _render("start-supernode", folder / "start", federation, executable=True, **about)
        _render("ret-fl-supernode.service", folder / "ret-fl-supernode@.service", federation, **about)
        _render("compose-supernodes.yaml", folder / "compose.yaml", federation, **about)
    _render("config.toml", kit.operator / "config.toml", federation, operator=kit.operator)
    if federation.tls:
        _render("register", kit.operator / "register", federation, executable=True)
    _render("kubernetes.yaml", kit.path / "kubernetes.yaml", federation)
    return kit


def _write_secrets(federation: Federation, kit: Kit) -> None:
    authority = Authority.open(kit.ca, federation.name)
    certificate, key = authority.issue(federation.superlink.certificate_names, federation.certificate_days)
    (kit.superlink / "server.pem").write_bytes(certificate)
    write_private(kit.superlink / "server.key", key)
    for folder in (kit.superlink, kit.operator, *map(kit.host, federation.hosts)):
        shutil.copyfile(kit.ca / "ca.crt", folder / "ca.crt")
    public_keys = kit.operator / "keys"
    public_keys.mkdir(exist_ok=True)
    for node in federation.supernodes:
        public = make_node_key(kit.host(node.host) / f"{node.name}.key")
        (public_keys / f"{node.name}.pub").write_bytes(public)


def _render(template: str, path: Path, federation: Federation, *, executable: bool = False, **about: Any) -> None:
    heartbeat = {"heartbeat": HEARTBEAT_DEFAULT_INTERVAL, "patience": HEARTBEAT_PATIENCE}
    text = _TEMPLATES.get_template(f"{template}.j2").render(
        federation=federation, window=REACTIVATION_SECONDS, **heartbeat, **about
    )
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755 if executable else 0o644)
