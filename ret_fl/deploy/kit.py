"""The kit: one folder a host, with no secrets but those it needs, and with what starts its part there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from jinja2 import Environment, PackageLoader, StrictUndefined

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.deploy.certificates import Authority, make_node_key, make_signing_key, write_private
from ret_fl.deploy.federation import Federation, Host, Samples, SuperLink
from ret_fl.deploy.nodeconfig import node_config
from ret_fl.settings import read_preset, to_toml

REACTIVATION_SECONDS = HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE
"""How long after its last sign of life the SuperLink takes a dead SuperNode for alive, and refuses its successor."""

_TEMPLATES = Environment(
    loader=PackageLoader("ret_fl.deploy"),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


def _told(value: Scalar) -> str:
    """A value of Flower's node config, inside double quotes of a shell script."""
    return f'\\"{value}\\"' if isinstance(value, str) else str(value).lower()


_TEMPLATES.filters["told"] = _told


class Kit:
    """A folder that `write_kit` made: one folder a host, `operator/` for who submits runs, `ca/` to lock away."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.ca = self.path / "ca"
        self.superlink = self.path / "superlink"
        self.samples = self.path / "samples"
        self.operator = self.path / "operator"

    def host(self, host: Host) -> Path:
        """The folder that goes to this host."""
        return self.path / host.name


def write_kit(federation: Federation, out: Path) -> Kit:
    """Write the federation's kit into `out`; again into the same folder, it keeps authority and keys.

    The keys kept are those of SuperNodes, and the one that signs orders. Certificates of SuperLink and sample service,
    with theirs, are made anew each time, which is how they are renewed. Raises `ConfigError` if the authority or a key
    found there, or the preset of the sample service, cannot be used.
    """
    kit, samples = Kit(out), federation.samples
    preset = _served(samples) if samples else ""
    served = [kit.samples] if samples else []
    for folder in (kit.path, kit.superlink, *served, kit.operator, *map(kit.host, federation.hosts)):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    if federation.tls:
        _write_secrets(federation, kit)
    _render("start-superlink", kit.superlink / "start", federation, executable=True)
    _render("ret-fl-superlink.service", kit.superlink / "ret-fl-superlink.service", federation)
    _render("compose-superlink.yaml", kit.superlink / "compose.yaml", federation)
    if samples:
        (kit.samples / "verify-key.pem").write_bytes(make_signing_key(kit.superlink / "signing-key.pem"))
        (kit.samples / "preset.toml").write_text(preset, encoding="utf-8")
        _render("start-samples", kit.samples / "start", federation, executable=True)
        _render("ret-fl-samples.service", kit.samples / "ret-fl-samples.service", federation)
        _render("compose-samples.yaml", kit.samples / "compose.yaml", federation)
    for host in federation.hosts:
        folder = kit.host(host)
        about: dict[str, Any] = {
            "host": host,
            "nodes": federation.on(host),
            "node_config": node_config(federation, host),
        }
        _render("start-supernode", folder / "start", federation, executable=True, **about)
        _render("ret-fl-supernode.service", folder / "ret-fl-supernode@.service", federation, **about)
        _render("compose-supernodes.yaml", folder / "compose.yaml", federation, **about)
    _render("config.toml", kit.operator / "config.toml", federation, operator=kit.operator)
    if federation.tls:
        _render("register", kit.operator / "register", federation, executable=True)
    _render("kubernetes.yaml", kit.path / "kubernetes.yaml", federation)
    return kit


def _served(samples: Samples) -> str:
    """The preset of the sample service, as TOML: the runs' settings, with the data where it lies on its host."""
    try:
        settings = read_preset(samples.preset)
        if samples.data_path:
            settings["data.path"] = samples.data_path
        RunConfig.from_flat(settings)
    except ConfigError as error:
        with_path = f" with data-path = {samples.data_path}" if samples.data_path else ""
        raise ConfigError(f"[samples] preset = {samples.preset}{with_path}: {error}") from None
    return to_toml(settings)


def _write_secrets(federation: Federation, kit: Kit) -> None:
    authority = Authority.open(kit.ca, federation.name)
    services: dict[Path, SuperLink | Samples] = {kit.superlink: federation.superlink}
    if federation.samples:
        services[kit.samples] = federation.samples
    for folder, service in services.items():
        certificate, key = authority.issue(service.certificate_names, federation.certificate_days)
        (folder / "server.pem").write_bytes(certificate)
        write_private(folder / "server.key", key)
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
