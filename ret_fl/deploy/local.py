"""A whole federation on loopback, started from a kit as its hosts would start it, and ended without a trace."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ret_fl.deploy.federation import Federation, SuperNode, parse_federation
from ret_fl.deploy.kit import Kit, write_kit
from ret_fl.engines import (
    START_SECONDS,
    RunFailedError,
    children,
    cpus_each,
    end_with_children,
    ending_on_signals,
    flower_environment,
    free_port,
    wait_for,
)
from ret_fl.files import user_cache

POLL_SECONDS = 0.5
SUPERLINK = "the SuperLink"

Say = Callable[[str], None]


def loopback_federation(folder: Path, supernodes: int, *, tls: bool, worker: bool = True) -> Federation:
    """A federation of `supernodes` SuperNodes on this machine's CPU, on free ports, with its state below `folder`."""
    hosts = [{"name": f"node{i}", "runtime-port": free_port(), "worker": worker} for i in range(supernodes)]
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
    log_file: Path

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again, and wait until it answers. Raises `RunFailedError`."""
        self._start(SUPERLINK, self.kit.superlink / "start")
        scheme, ca = ("https", self.kit.operator / "ca.crt") if self.federation.tls else ("http", None)
        health = f"{scheme}://{self.federation.superlink.address}/health"
        wait_for(health, self.processes[SUPERLINK], self.log_file, ca)

    def register(self) -> None:
        """Register the SuperNodes' keys. Raises `RunFailedError`."""
        command, environment = [str(self.kit.operator / "register")], dict(os.environ) | dict(self.environment)
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise RunFailedError(f"SuperNodes could not be registered: {said}")

    def start_supernodes(self) -> None:
        """Start them all; `wait_for_supernodes` waits until they have joined."""
        for node in self.federation.supernodes:
            self.start_supernode(node)

    def start_supernode(self, node: SuperNode) -> subprocess.Popen[bytes]:
        """Start one, or start it again; it is not waited for."""
        return self._start(f"SuperNode {node.name}", self.kit.host(node.host) / "start", node.name)

    def wait_for_supernodes(self, say: Say) -> None:
        """Wait until every SuperNode has joined, as it writes into the log. Raises `RunFailedError`."""
        joined, total, deadline = 0, len(self.federation.supernodes), time.monotonic() + START_SECONDS
        while joined < total:
            self._require_all_running()
            if time.monotonic() > deadline:
                raise RunFailedError(f"{joined} of {total} SuperNodes joined within {START_SECONDS} s")
            time.sleep(POLL_SECONDS)
            before, joined = joined, self.log_file.read_text(errors="replace").count("SuperNode ID: ")
            for number in range(before + 1, joined + 1):
                say(f"SuperNode {number} of {total} joined")

    def _start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        with self.log_file.open("a") as log:
            self.processes[name] = process = subprocess.Popen(
                list(map(str, command)),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return process

    def wait(self) -> None:
        """Return when a process of it has ended, which none should; raises `RunFailedError` naming it."""
        while True:
            self._require_all_running()
            time.sleep(POLL_SECONDS)

    def _require_all_running(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RunFailedError(f"{name} ended with exit code {process.returncode}. Log: {self.log_file}")


def workers(folder: Path) -> set[psutil.Process]:
    """The workers of SuperNodes whose state is below `folder`; they are nobody's children."""
    state = f"{folder}{os.sep}"
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if "ret_fl.worker" in (told := process.info["cmdline"] or []) and any(part.startswith(state) for part in told)
    }


@contextmanager
def local_federation(
    folder: Path, supernodes: int, log_file: Path, *, tls: bool, worker: bool = True, say: Say = lambda _: None
) -> Iterator[LocalFederation]:
    """A SuperLink and SuperNodes on loopback, keys registered, all joined; all ended at the end, also by a signal.

    All of them log into `log_file`; worker: whether SuperNodes keep one between orders; `say` is told each step in
    words. Raises `RunFailedError` if they do not come up.
    """
    federation = loopback_federation(folder, supernodes, tls=tls, worker=worker)
    names = ", ".join(node.name for node in federation.supernodes)
    with ending_on_signals() as hurry:
        if tls:
            say(f"making certificates, and a key each for {names}")
        kit = write_kit(federation, folder / "kit")
        cores = {"OMP_NUM_THREADS": str(cpus_each(supernodes)), "XDG_CACHE_HOME": str(user_cache("").parent)}
        environment = cores | flower_environment(kit.operator)
        running, before = LocalFederation(federation, kit, environment, {}, log_file), children()
        try:
            say(f"starting the SuperLink on {federation.superlink.address}")
            running.start_superlink()
            if tls:
                say("registering the keys with it")
                running.register()
            say(f"starting SuperNodes {names}")
            running.start_supernodes()
            running.wait_for_supernodes(say)
            yield running
        finally:
            try:
                say("ending SuperNodes and SuperLink (Ctrl-C kills them at once)")
            finally:  # whether or not there is still somebody to hear it
                superlink = running.processes.get(SUPERLINK)
                own = children() - before
                carriers = {process for process in own if superlink and process.pid == superlink.pid}
                end_with_children(own - carriers, hurry)  # first, so that they can sign off
                end_with_children(workers(folder), hurry)  # which would end by themselves, but not before this returns
                end_with_children(carriers, hurry)
