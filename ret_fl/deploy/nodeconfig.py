"""What a host's SuperNodes are told (Flower's node config): what follows from the federation file, and more."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ret_fl.config import RunConfig, Scalar

if TYPE_CHECKING:
    from ret_fl.deploy.federation import Federation, Host

NODE_SETTINGS = {
    "data-path": "data.path",
    "held-out-path": "data.held-out-path",
    "cache-dir": "data.cache-dir",
    "model-folder": "model.init-from",
    "sample-service": "service.address",
    "sample-ca": "service.ca",
    "sample-certificate": "service.certificate",
    "sample-key": "service.key",
    "sample-insecure": "service.insecure",
    "sample-compression": "service.compression",
    "sample-cache-mb": "service.cache-mb",
    "device": "device",
    "state-dir": "state-dir",
}
"""Node config key -> the run's setting that it replaces on that node (clients/training.py)."""

IDLE = "worker-idle"
"""Seconds that a worker waits for the next order (ret_fl/worker/calls.py)."""

ELSEWHERE = {
    "data-path": "set the host's own data-path",
    "worker": "set the host's own worker",
    "partition-id": "the kit numbers all SuperNodes",
    "num-partitions": "the kit counts all SuperNodes",
}
PATHS = ("held-out-path", "cache-dir", "model-folder", "sample-ca", "sample-certificate", "sample-key", "state-dir")
MOUNTED = {"held-out-path": True, "model-folder": True, "cache-dir": False, "state-dir": False}
"""Keys that name a folder of the host, which a container needs -> whether it only reads there."""


def checked(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """A host's `node-config` table. Raises `ValueError` saying what is wrong with the first bad key."""
    return {key: _checked(key, value) for key, value in config.items()}


def _checked(key: str, value: Any) -> Scalar:
    known = [*NODE_SETTINGS, IDLE]
    if key in ELSEWHERE:
        raise ValueError(f"{key} does not belong here: {ELSEWHERE[key]}")
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"known are {', '.join(k for k in known if k not in ELSEWHERE)}"
        )
        raise ValueError(f"{key} is unknown: {hint}")
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{key} must be one number, true or false, or text")
    if key == IDLE:
        if isinstance(value, bool | str) or not 0 < value < float("inf"):
            raise ValueError(f"{key} must be a number of seconds above 0")
        return value
    _require_allowed(key, value)
    if isinstance(value, str):
        _require_plain(key, value)
    return value


def _require_allowed(key: str, value: Scalar) -> None:
    """As the run's setting allows it; how settings fit together is for the run to say."""
    section, _, leaf = NODE_SETTINGS[key].rpartition(".")
    try:
        if section:
            type(getattr(RunConfig(), section)).model_validate({leaf: value})
        else:
            RunConfig.from_flat({leaf: value})
    except ValidationError as error:
        raise ValueError(f"{key}: {error.errors()[0]['msg']}") from None


def _require_plain(key: str, value: str) -> None:
    # it goes into a shell script and Flower's node config, whose quoting rules differ
    if not re.fullmatch(r"[A-Za-z0-9._/@+:\[\]-]*", value):
        raise ValueError(f"{key} must be of letters, digits and . _ / @ + : [ ] - only")
    if key in PATHS and value and not value.startswith("/") and "://" not in value:
        raise ValueError(f"{key} must be an absolute path")


def node_config(federation: Federation, host: Host) -> dict[str, Scalar]:
    """What each SuperNode of a host is told beside its partition; texts may hold the start script's variables."""
    config: dict[str, Scalar] = {"state-dir": "$state/proxies"}
    if host.worker:
        config["worker"] = True
    if host.data_path:
        config["data-path"] = host.data_path
    elif federation.samples:
        config["sample-service"] = f"${{SAMPLE_SERVICE:-{federation.samples.address}}}"
        config |= {"sample-ca": "$kit/ca.crt"} if federation.tls else {"sample-insecure": True}
    if host.gpus:
        config["device"] = "cuda"
    return config | host.node_config
