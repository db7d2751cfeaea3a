"""A whole federation on loopback, started from a kit as its hosts would start it, and ended without a trace."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ret_fl.deploy.federation import Federation, parse_federation
from ret_fl.deploy.kit import Kit, write_kit
from ret_fl.engines import (
    RunFailedError,
    cpus_each,
    end_with_children,
    ending_on_sigterm,
    flower_environment,
    free_port,
    wait_for,
)
from ret_fl.files import user_cache

POLL_SECONDS = 0.5


def loopback_federation(folder: Path, supernodes: int, *, tls: bool) -> Federation:
    """A federation of `supernodes` SuperNodes on this machine's CPU, on free ports, with its state below `folder`."""
    hosts = [{"name": f"node{i}", "runtime-port": free_port()} for i in range(supernodes)]
    superlink = {"host": "127.0.0.1", "bind": "127.0.0.1", "port": free_port()}
    return parse_federation(
        {"name": "loopback", "folder": str(folder), "tls": tls, "superlink": superlink, "hosts": hosts}
    )


@dataclass
class LocalFederation:
    """A running federation: its kit, and the environment in which `flwr` reaches it."""

    federation: Federation
    kit: Kit
    environment: Mapping[str, str]
    processes: dict[str, subprocess.Popen[bytes]]

    def wait(self) -> None:
        """Return when a process of it has ended, which none should; raises `RunFailedError` naming it."""
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RunFailedError(f"{name} ended with exit code {process.returncode}")
            time.sleep(POLL_SECONDS)


@contextmanager
def local_federation(folder: Path, supernodes: int, log_file: Path, *, tls: bool) -> Iterator[LocalFederation]:
    """A SuperLink and SuperNodes on loopback, keys registered; all ended at the end, also by SIGTERM or Ctrl-C.

    All of them log into `log_file`. Raises `RunFailedError` if they do not come up.
    """
    federation = loopback_federation(folder, supernodes, tls=tls)
    kit = write_kit(federation, folder / "kit")
    cores = {"OMP_NUM_THREADS": str(cpus_each(supernodes)), "XDG_CACHE_HOME": str(user_cache("").parent)}
    environment = cores | flower_environment(kit.operator)
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *command: str) -> None:
        with log_file.open("a") as log:
            processes[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    with ending_on_sigterm():
        try:
            start("the SuperLink", str(kit.superlink / "start"))
            scheme, ca = ("https", kit.operator / "ca.crt") if tls else ("http", None)
            health = f"{scheme}://{federation.superlink.address}/health"
            wait_for(health, processes["the SuperLink"], log_file, ca)
            if tls:
                _register(kit, environment)
            for node in federation.supernodes:
                start(f"SuperNode {node.name}", str(kit.host(node.host) / "start"), node.name)
            yield LocalFederation(federation, kit, environment, processes)
        finally:
            superlink = processes.pop("the SuperLink", None)
            end_with_children(list(processes.values()))  # first, so that they can sign off
            end_with_children([superlink] if superlink else [])


def _register(kit: Kit, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [str(kit.operator / "register")], env=dict(os.environ) | dict(environment), capture_output=True, check=False
    )
    if done.returncode:
        raise RunFailedError(f"SuperNodes could not be registered: {done.stderr.decode(errors='replace').strip()}")
