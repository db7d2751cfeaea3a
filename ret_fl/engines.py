"""How `ret-fl run` runs the Flower app: under Flower's own simulation engine, or inline in this process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.rundir import RunDir
from ret_fl.settings import to_toml

START_SECONDS = 120
END_SECONDS = 10


class RunFailedError(RuntimeError):
    """The run ended without a result; the message says why and where the log is."""


def check_app(folder: Path) -> Path:
    """The app folder, absolute. Raises `ConfigError` if it holds no ret-fl app."""
    path = folder.expanduser().absolute()
    project = path / "pyproject.toml"
    if project.is_file():
        with project.open("rb") as file:
            components = tomllib.load(file).get("tool", {}).get("flwr", {}).get("app", {}).get("components")
        if components and (path / "simulations" / "inline.py").is_file():
            return path
    raise ConfigError(
        f"{path} is not the ret-fl app (pyproject.toml with [tool.flwr.app], server/, clients/): run in a clone "
        "of the repository, or name one by --app"
    )


def find_app_code(folder: Path) -> None:
    """Let this process import plug-ins that lie in the app folder, as the engines' processes do; elsewhere nothing."""
    with suppress(ConfigError):
        path = str(check_app(folder))
        if path not in sys.path:
            sys.path.insert(0, path)


def _settings(directory: RunDir, config: RunConfig, resuming: bool) -> dict[str, Scalar]:
    return config.to_flat() | ({"resume": str(directory.path)} if resuming else {})


def run_inline(app: Path, directory: RunDir, config: RunConfig, nodes: int, resuming: bool, verbose: bool) -> None:
    """Server and clients one after the other in one process. Raises `RunFailedError`.

    A process of its own, so that the code that runs is the app folder's, as under Flower, not the installed one.
    """
    log_file = directory.path / "flower.log"
    with tempfile.TemporaryDirectory(prefix="ret-fl-") as folder, log_file.open("a") as log, ending_on_signals():
        settings = Path(folder) / "run.toml"
        settings.write_text(to_toml(_settings(directory, config, resuming)), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "simulations.inline", str(settings), str(nodes)]
        environment = os.environ | app_environment(app)
        output = None if verbose else log
        code = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode
    if code:
        raise RunFailedError(f"{_last_error(log_file)}\nLog: {log_file}")


def app_environment(app: Path) -> dict[str, str]:
    """What makes Python find the app folder's own packages (server, clients, simulations, ret_fl) first."""
    return {"PYTHONPATH": os.pathsep.join([str(app), *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextmanager
def ending_on_signals() -> Iterator[threading.Event]:
    """Within, SIGTERM (a batch system, `timeout`) and Ctrl-C end this process in order: what it has started is ended.

    From the first of either on, no other breaks that off: a second SIGTERM, which `timeout` sends, does nothing, and a
    second Ctrl-C sets the event that is yielded, so that `end_with_children` kills what it waits for.
    """
    hurry = threading.Event()

    def once() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: hurry.set())

    def end(number: int, _: FrameType | None) -> NoReturn:
        once()
        sys.exit(128 + number)

    def interrupt(_: int, __: FrameType | None) -> NoReturn:
        once()
        raise KeyboardInterrupt

    handlers: dict[int, Callable[[int, FrameType | None], NoReturn]] = {signal.SIGTERM: end, signal.SIGINT: interrupt}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script: Ctrl-C is not for it
        del handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield hurry
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # else this process is on its way out
            for number, handler in before.items():
                signal.signal(number, handler)


def run_flwr(app: Path, directory: RunDir, config: RunConfig, nodes: int, resuming: bool, verbose: bool) -> None:
    """`flwr run` on a local SuperLink of its own, ended with the run. Raises `RunFailedError`."""
    log_file = directory.path / "flower.log"
    with isolated_superlink(log_file) as environment:
        federation = ["--federation-config", _federation(config, nodes)]
        submit(app, directory, config, environment, resuming=resuming, verbose=verbose, options=federation)


def submit(
    app: Path,
    directory: RunDir,
    config: RunConfig,
    environment: Mapping[str, str],
    *,
    resuming: bool = False,
    verbose: bool = False,
    options: Sequence[str] = (),
) -> None:
    """`flwr run` on the SuperLink that is the default in `environment`'s FLWR_HOME. Raises `RunFailedError`.

    `flwr run` exits with 0 even when the run failed, so the truth is asked of the SuperLink afterwards.
    """
    log_file = directory.path / "flower.log"
    with log_file.open("a") as log:
        settings = Path(environment["FLWR_HOME"]) / "run.toml"
        settings.write_text(to_toml(_settings(directory, config, resuming)), encoding="utf-8")
        command = ["flwr", "run", str(app), "--stream", "--run-config", str(settings), *options]
        code = subprocess.run(
            command, env=environment, stdout=None if verbose else log, stderr=subprocess.STDOUT, check=False
        ).returncode
        status, details = _outcome(environment) if code == 0 else ("not started", f"flwr run exited with {code}")
    if status != "finished:completed":
        error = _last_error(log_file)
        told = details if error.partition(": ")[2] in details else f"{details}\n{error}"
        raise RunFailedError(f"the run ended as {status}. {told}\nLog: {log_file}")


def flower_environment(home: Path) -> dict[str, str]:
    """Where `flwr` and what it starts are found, keep their state (`home`), and neither report nor install anything."""
    bin_folder = str(Path(sys.executable).parent)
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return (
        quiet
        | dict(os.environ)
        | {
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": bin_folder + os.pathsep + os.environ.get("PATH", ""),
        }
    )


def free_port() -> int:
    """A TCP port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def isolated_superlink(log_file: Path) -> Iterator[dict[str, str]]:
    """A local SuperLink in simulation mode, and the environment in which `flwr` finds it.

    Started here rather than by `flwr run`, whose SuperLink outlives the run and keeps the environment of whoever
    started it first.
    """
    with tempfile.TemporaryDirectory(prefix="ret-fl-", ignore_cleanup_errors=True) as home, log_file.open("a") as log:
        port, control_port = str(free_port()), str(free_port())
        environment = flower_environment(Path(home)) | {
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
            "FLWR_LOCAL_CONTROL_API_PORT": control_port,
        }
        control = f"127.0.0.1:{control_port}"
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--control-api-address", control, "--host", "127.0.0.1", "--port", port]
        command += ["--database", str(Path(home) / "state.db")]
        with ending_on_signals() as hurry:
            before = children()
            try:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                wait_for(f"http://127.0.0.1:{port}/health", process, log_file)
                yield environment
            finally:
                end_with_children(children() - before, hurry)


def wait_for(url: str, process: subprocess.Popen[bytes], log_file: Path, ca: Path | None = None) -> None:
    """Wait until the SuperLink answers at `url`, whose certificate `ca` signed. Raises `RunFailedError`."""
    trust = ssl.create_default_context(cafile=ca) if ca else None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunFailedError(f"Flower's SuperLink ended at once (exit code {process.returncode}). Log: {log_file}")
        try:
            with urllib.request.urlopen(url, timeout=1, context=trust):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunFailedError(f"Flower's SuperLink did not come up within {START_SECONDS} s. Log: {log_file}")


def children() -> set[psutil.Process]:
    """The processes this one has started, also one whose start a signal has broken off."""
    return set(psutil.Process().children())


def end_with_children(started: Iterable[psutil.Process], hurry: threading.Event) -> None:
    """End processes with all they started: a simulation left behind would go on writing into the run's folder.

    They get 10 s to end by themselves, none once `hurry` is set.
    """
    family: list[psutil.Process] = []
    for process in started:
        with suppress(psutil.NoSuchProcess):
            family += [*process.children(recursive=True), process]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    left, deadline = family, time.monotonic() + END_SECONDS
    while left and time.monotonic() < deadline and not hurry.is_set():
        left = [member for member in psutil.wait_procs(left, timeout=0.1)[1] if not _dead(member)]
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, timeout=1)


def _dead(process: psutil.Process) -> bool:
    """Whether a process has ended, if only its parent, which may not be this one, has not taken note yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def cpus_each(nodes: int) -> int:
    """How many of the CPU cores this process may use each of `nodes` clients gets: one at least."""
    usable = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    return max(1, (len(usable) if usable else os.cpu_count() or 1) // nodes)


def _federation(config: RunConfig, nodes: int) -> str:
    """Flower's federation config: how many clients, and which share of the machine each gets."""
    import torch

    gpus = 0.0
    if torch.cuda.is_available() and config.device != "cpu":
        # rounded down, so that all clients fit: six on one GPU get .1666 each
        gpus = math.floor(1e4 / math.ceil(nodes / torch.cuda.device_count())) / 1e4
    return f"num-supernodes={nodes} client-resources-num-cpus={cpus_each(nodes)} client-resources-num-gpus={gpus:.4f}"


def _outcome(environment: Mapping[str, str]) -> tuple[str, str]:
    """Status and details of the (only) run on the SuperLink."""
    command = ["flwr", "list", "--format", "json"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        run = json.loads(listed.stdout)["runs"][0]
    except (ValueError, KeyError, IndexError):
        return "unknown", f"flwr list said: {listed.stdout.strip()} {listed.stderr.strip()}"
    return str(run["status"]), str(run.get("status-details") or "")


def _last_error(log_file: Path) -> str:
    """The last error in Flower's log, colours removed."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log_file.read_text(errors="replace")).splitlines()
    errors = [line.strip() for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    return errors[-1] if errors else "\n".join(lines[-5:])


Engine = Callable[[Path, RunDir, RunConfig, int, bool, bool], None]
ENGINES: dict[str, Engine] = {"flwr": run_flwr, "inline": run_inline}
