"""How `ret-fl run` runs the Flower app: under Flower's own simulation engine, or inline in this process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.rundir import RunDir
from ret_fl.settings import to_toml

START_SECONDS = 120


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


def _settings(directory: RunDir, config: RunConfig, resuming: bool) -> dict[str, Scalar]:
    return config.to_flat() | ({"resume": str(directory.path)} if resuming else {})


def run_inline(app: Path, directory: RunDir, config: RunConfig, nodes: int, resuming: bool, verbose: bool) -> None:
    """Server and clients one after the other in one process. Raises `RunFailedError`.

    A process of its own, so that the code that runs is the app folder's, as under Flower, not the installed one.
    """
    log_file = directory.path / "flower.log"
    with tempfile.TemporaryDirectory(prefix="ret-fl-") as folder, log_file.open("a") as log, _ending_on_sigterm():
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
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM (a batch system, `timeout`) would end Python without cleaning up; here it ends what was started, too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_flwr(app: Path, directory: RunDir, config: RunConfig, nodes: int, resuming: bool, verbose: bool) -> None:
    """`flwr run` on a local SuperLink of its own, ended with the run. Raises `RunFailedError`.

    `flwr run` exits with 0 even when the run failed, so the truth is asked of the SuperLink afterwards.
    """
    log_file = directory.path / "flower.log"
    with isolated_superlink(log_file) as environment, log_file.open("a") as log:
        settings = Path(environment["FLWR_HOME"]) / "run.toml"
        settings.write_text(to_toml(_settings(directory, config, resuming)), encoding="utf-8")
        command = ["flwr", "run", str(app), "--stream", "--run-config", str(settings)]
        command += ["--federation-config", _federation(config, nodes)]
        code = subprocess.run(
            command, env=environment, stdout=None if verbose else log, stderr=subprocess.STDOUT, check=False
        ).returncode
        status, details = _outcome(environment) if code == 0 else ("not started", f"flwr run exited with {code}")
    if status != "finished:completed":
        raise RunFailedError(f"the run ended as {status}. {details}\n{_last_error(log_file)}\nLog: {log_file}")


def _environment(home: str) -> dict[str, str]:
    """Isolates this run's SuperLink from any other, and keeps Flower from reinstalling torch for every run."""
    bin_folder = str(Path(sys.executable).parent)
    isolated = {
        "FLWR_HOME": home,
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": bin_folder + os.pathsep + os.environ.get("PATH", ""),
    }
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return quiet | dict(os.environ) | isolated


def _free_port() -> int:
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
        environment = _environment(home)
        port = environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
        control = f"127.0.0.1:{environment['FLWR_LOCAL_CONTROL_API_PORT']}"
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--control-api-address", control, "--host", "127.0.0.1", "--port", port]
        command += ["--database", str(Path(home) / "state.db")]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        with _ending_on_sigterm():
            try:
                _wait_for(f"http://127.0.0.1:{port}/health", process, log_file)
                yield environment
            finally:
                _end(process)


def _wait_for(url: str, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunFailedError(f"Flower's SuperLink ended at once (exit code {process.returncode}). Log: {log_file}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunFailedError(f"Flower's SuperLink did not come up within {START_SECONDS} s. Log: {log_file}")


def _end(superlink: subprocess.Popen[bytes]) -> None:
    """End the SuperLink with all it started: a simulation left behind would go on writing into the run's folder."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(superlink.pid).children(recursive=True)
        family.append(psutil.Process(superlink.pid))
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=10)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    superlink.wait()


def _federation(config: RunConfig, nodes: int) -> str:
    """Flower's federation config: how many clients, and which share of the machine each gets."""
    import torch

    usable = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    cpus = max(1, (len(usable) if usable else os.cpu_count() or 1) // nodes)
    gpus = 0.0
    if torch.cuda.is_available() and config.device != "cpu":
        # rounded down, so that all clients fit: six on one GPU get .1666 each
        gpus = math.floor(1e4 / math.ceil(nodes / torch.cuda.device_count())) / 1e4
    return f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={gpus:.4f}"


def _outcome(environment: dict[str, str]) -> tuple[str, str]:
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
