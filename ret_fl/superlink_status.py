"""`ret-fl status SUPERLINK`: its runs, its SuperNodes, and how its newest run is doing, asked of it by `flwr`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from ret_fl.config import ConfigError
from ret_fl.engines import flower_environment
from ret_fl.status import render, said, span, status_of_log, table

SILENT_SECONDS, LOG_SECONDS = 60.0, 30.0
"""How long Flower's command may take to answer, and to send a run's log."""


def superlink_status(connection: str) -> Group:
    """Runs and SuperNodes of a SuperLink that Flower's config.toml knows by this name, and the newest run's state.

    Raises `ConfigError` with what `flwr` said if it does not answer.
    """
    runs = _ask(["list", connection, "--limit", "10"])["runs"]
    nodes = _ask(["supernode", "list", connection])["nodes"]
    listed = table("runs", ("clients' s", "MB"), ("elapsed", "run", "app", "state"))
    for run in runs:
        listed.add_row(
            f"{run['compute-time']['clientapp-seconds']:,.0f}", f"{run['network-traffic']['total-bytes'] / 1e6:,.1f}",
            _elapsed(run["elapsed"]), str(run["run-id"]), said(run["fab-name"]), said(_run_state(run)),
        )  # fmt: skip
    there = table("SuperNodes", (), ("node", "status", "online since", "for"))
    for node in nodes:
        online = node["status"] == "online"
        there.add_row(
            node["node-id"], node["status"], node["online-at"] if online else "-",
            _elapsed(node["online-elapsed"]) if online else "-", style=None if online else "red",
        )  # fmt: skip
    return Group(listed, there, _newest(connection, runs[0]) if runs else Text("no runs yet"))


def _newest(connection: str, run: Mapping[str, Any]) -> Group | Text:
    """How a run is doing by its server's log, or why that is not known."""
    try:
        asked = _flwr(["log", str(run["run-id"]), connection, "--show"], LOG_SECONDS)
    except subprocess.TimeoutExpired:  # it waits for a first line
        return Text(f"run {run['run-id']}: its server has written no log, or does not send it within {LOG_SECONDS:g} s")
    status = status_of_log(asked.stdout, run["status"])
    if status:
        return render(status)
    return said(f"run {run['run-id']}: its log tells of no run of ret-fl (yet). {asked.stderr.strip()}")


def _elapsed(told: float | str) -> str:
    return told if isinstance(told, str) else span(told)


def _run_state(run: Mapping[str, Any]) -> str:
    details = run.get("status-details")
    return str(run["status"]) if details in (None, "", "N/A") else f"{run['status']}: {details}"


def _ask(command: list[str]) -> Mapping[str, Any]:
    try:
        done = _flwr([*command, "--format", "json"], SILENT_SECONDS)
        answer = json.loads(done.stdout)
        if answer.get("success"):
            return dict(answer)
        why = answer.get("error-message") or done.stdout
    except subprocess.TimeoutExpired:
        why = f"no answer within {SILENT_SECONDS:g} s"
    except ValueError:
        why = done.stderr or done.stdout
    raise ConfigError(f"`flwr {' '.join(command)}`: {' '.join(str(why).split())}")


def _flwr(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Raises `subprocess.TimeoutExpired`."""
    environment = flower_environment(Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr"))
    return subprocess.run(
        ["flwr", *command], env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )
