"""The federation file: which hosts run SuperLink, sample service, and SuperNodes, on which GPUs. One file, checked."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from ret_fl.config import ConfigError
from ret_fl.deploy.nodeconfig import MOUNTED, checked

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names in every certificate: a service's own host calls it on loopback."""

EXAMPLE = """\
# A federation of three hosts: `ret-fl deploy init federation.toml --out kit` makes from it all that the hosts need.

name = "ret-fl"
folder = "/srv/ret-fl"    # on every host: venv/ (ret-fl installed), kit/ and kit-.../, state/
user = "ret-fl"           # the account that systemd runs everything as
tls = true                # TLS and node authentication; false is for trying out on a network nobody else is on
image = "ret-fl:latest"    # for compose.yaml and kubernetes.yaml: built from deploy/Dockerfile
certificate-days = 397     # validity of the SuperLink's certificate; `init` again renews it

[superlink]
host = "superlink.example.org"    # name or address that SuperNodes and `flwr` connect to
also = ["10.0.0.5"]               # further names and addresses for its certificate
bind = "0.0.0.0"                  # the address where it listens, or is published by a container
port = 8000
data-path = "/srv/ret-fl/data"    # for containers: what is mounted there; runs need it as data.path in any case
# mounts = ["/srv/ret-fl/model"]    # for containers: further folders that runs name, as in model.init-from

# [samples]                         # optional: serves the samples of orders to hosts without data-path
# host = "data.example.org"         # name or address that SuperNodes connect to; it may be the SuperLink's
# port = 9443                       # `also`, `bind` and `mounts` as above
# preset = "run.toml"               # the runs' preset, beside this file: its data settings are served
# data-path = "/srv/ret-fl/data"    # replaces the preset's data.path on this host

[[hosts]]
name = "alpha"
gpus = [0, 1]                     # nvidia-smi's numbers, a SuperNode each; leave out for one SuperNode on the CPU
data-path = "/srv/ret-fl/data"    # replaces the run's data.path on this host; leave out for built-in data
                                  # (then, with [samples], sample-service = "" under its node-config)
runtime-port = 9094               # first of the loopback ports its SuperNodes take, one each
worker = true                     # a process a SuperNode keeps the model between orders; false loads it for each

[[hosts]]
name = "beta"
gpus = [0]
data-path = "/srv/ret-fl/data"

# [hosts.node-config]                      # optional, under its host: further settings of its SuperNodes
# cache-dir = "/scratch/ret-fl"            # decoded and fetched images; else in state/cache. `user` must own it
# model-folder = "/srv/ret-fl/model"       # where the run's model.init-from lies here
"""


def _label(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise ValueError("must be at most 40 of a-z, 0-9 and -, and begin and end with a letter or digit")
    return text


def _address(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", text) or text[-1].isdigit():
            raise ValueError("must be a DNS name or an IP address, without a port") from None
    return text


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("must be an IP address") from None


def _path(text: str) -> str:
    # it goes into shell scripts, unit files and Flower's node config, whose quoting rules differ
    if not re.fullmatch(r"/[A-Za-z0-9._/@+-]*", text):
        raise ValueError("must be an absolute path of letters, digits and . _ / @ + - only")
    return text.rstrip("/") or "/"


def _beside_the_federation_file(path: Path, info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", ".")) / path


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


Label = Annotated[str, AfterValidator(_label)]
Address = Annotated[str, AfterValidator(_address)]
Ip = Annotated[str, AfterValidator(_ip)]
HostPath = Annotated[str, AfterValidator(_path)]
NodeConfig = Annotated[dict[str, Any], AfterValidator(checked)]


class _Table(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True
    )


class _Service(_Table):
    """Where something is reached and where it listens.

    known_as: its name inside Kubernetes. mounts: folders that runs name, beside `data_path`.
    """

    known_as: ClassVar[str]
    host: Address
    also: tuple[Address, ...] = ()
    bind: Ip = "0.0.0.0"
    port: int = Field(ge=1, le=65535)
    data_path: HostPath | None = None
    mounts: tuple[HostPath, ...] = ()

    @property
    def address(self) -> str:
        """host:port, as SuperNodes and `flwr` want it."""
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def published_on(self) -> str:
        """`bind` as a port follows it."""
        return _bracketed(self.bind)

    @property
    def mounted(self) -> dict[str, bool]:
        """Folders of the host that a container needs -> whether it only reads there, which it does."""
        return dict.fromkeys([*([self.data_path] if self.data_path else []), *self.mounts], True)

    @property
    def certificate_names(self) -> list[str]:
        """Every name and address the certificate is for."""
        return list(dict.fromkeys([self.host, *self.also, *LOOPBACK, self.known_as]))


class SuperLink(_Service):
    """Where the SuperLink is reached and where it listens."""

    known_as = "superlink"
    port: int = Field(8000, ge=1, le=65535)


class Samples(_Service):
    """The sample service, for hosts without `data_path`. preset: file of the runs' settings, whose data it serves."""

    known_as = "samples"
    port: int = Field(9443, ge=1, le=65535)
    preset: Annotated[Path, AfterValidator(_beside_the_federation_file)]


class Host(_Table):
    """A machine with one SuperNode a GPU, or one on its CPU.

    SuperNode i listens on loopback port `runtime_port` + i for the client processes it starts. worker: whether these
    hand their orders to a process that stays (ret_fl/worker). node_config: what else its SuperNodes are told, above
    what the kit tells them (ret_fl/deploy/nodeconfig.py).
    """

    name: Label
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    data_path: HostPath | None = None
    runtime_port: int = Field(9094, ge=1, le=65000)
    worker: bool = True
    node_config: NodeConfig = Field(default_factory=dict)

    @property
    def mounted(self) -> dict[str, bool]:
        """Folders of the host that a container needs -> whether it only reads there."""
        told = {str(path): MOUNTED[key] for key, path in self.node_config.items() if key in MOUNTED}
        data = {self.data_path: True} if self.data_path else {}
        return data | {path: only_read for path, only_read in told.items() if path.startswith("/")}

    @model_validator(mode="after")
    def _own_gpus(self) -> Host:
        if len(set(self.gpus)) < len(self.gpus):
            raise ValueError(f"gpus {list(self.gpus)} names a GPU twice: each has one SuperNode")
        return self


@dataclass(frozen=True)
class SuperNode:
    """One SuperNode: `partition` numbers all of them, `port` is free for it on its host's loopback."""

    name: str
    host: Host
    gpu: int | None
    partition: int
    port: int


class Federation(_Table):
    """One federation file."""

    name: Label = "ret-fl"
    folder: HostPath = "/srv/ret-fl"
    user: Label = "ret-fl"
    tls: bool = True
    image: str = Field("ret-fl:latest", pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]*$")
    certificate_days: int = Field(397, ge=1, le=3650)
    superlink: SuperLink
    samples: Samples | None = None
    hosts: tuple[Host, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct_names(self) -> Federation:
        names = [node.name for node in self.supernodes] + [host.name for host in self.hosts if host.gpus]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"hosts and their SuperNodes need names of their own: {', '.join(twice)} stands twice")
        reserved = sorted({host.name for host in self.hosts} & {"superlink", "samples", "operator", "ca"})
        if reserved:
            raise ValueError(f"hosts.name: {', '.join(reserved)} is the name of a folder of the kit, choose another")
        return self

    @cached_property
    def supernodes(self) -> list[SuperNode]:
        """All SuperNodes, host by host."""
        return list(self._count())

    def _count(self) -> Iterator[SuperNode]:
        partition = 0
        for host in self.hosts:
            for index, gpu in enumerate(host.gpus or (None,)):
                name = host.name if gpu is None else f"{host.name}-gpu{gpu}"
                yield SuperNode(name, host, gpu, partition, host.runtime_port + index)
                partition += 1

    def on(self, host: Host) -> list[SuperNode]:
        """The SuperNodes of one host."""
        return [node for node in self.supernodes if node.host.name == host.name]


def parse_federation(table: dict[str, Any], source: str = "federation", folder: Path = Path()) -> Federation:
    """Check a federation given as TOML's tables. Raises `ConfigError` naming each bad key.

    folder: where a relative samples.preset lies.
    """
    try:
        return Federation.model_validate(table, context={"folder": folder})
    except ValidationError as error:
        lines = [f"{source}: {_where(problem['loc'])}{_what(problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def read_federation(path: Path) -> Federation:
    """Read and check a federation file. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror} (`ret-fl deploy example` prints one to start from)") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    return parse_federation(table, str(path), path.parent)


def _where(location: tuple[int | str, ...]) -> str:
    """('hosts', 0, 'gpus', 1) -> 'hosts[0].gpus[1]: '."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return f"{text}: " if text else ""


def _what(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "no such key (`ret-fl deploy example` shows those there are)"
    if problem["type"] == "missing":
        return "is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return message if isinstance(problem["input"], dict) else f"{message} (got {problem['input']!r})"
