"""The benchmarks that take seconds still run, and say what they measure: nothing else runs them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks.recipes import KNOWN, measured_step
from benchmarks.server_memory import measure
from ret_fl.config import RunConfig
from ret_fl.presets import FOLDER
from ret_fl.settings import read_preset


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    """What `python -m benchmarks.NAME ARGUMENTS` prints; here in this process, which has loaded torch already."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_a_step_is_compared_with_a_bare_one(
    precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--blocks", "1", "--steps", "1", "--batch-size", "4"]
    out = told(monkeypatch, capsys, "step", *options, *(["--precision", precision] if precision != "auto" else []))
    ratio = re.search(r"ratio: +([\d.]+) \(median of pairs", out)
    assert ratio and float(ratio[1]) > 0, out


def test_the_search_for_neighbours_is_compared_with_a_matrix_product(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--images", "40", "--size", "8", "--k", "3", "--repeats", "1", "--no-memory"]
    assert re.search(r"nearest is \d+ times as fast as", told(monkeypatch, capsys, "audit", *options))


def test_the_step_of_a_recipe_is_measured() -> None:
    small = {"model.preset": "tiny", "batch-size": 2, "device": "cpu", "threads": 1}
    config = RunConfig.from_flat(read_preset(ROOT / FOLDER / "cifar10.toml") | small)
    speed, batch, memory = measured_step(config, KNOWN["cifar10"], torch.device("cpu"), 1)
    assert speed > 0 and (batch, memory) == (2, 0.0)


def test_a_row_of_the_servers_memory_is_measured(tmp_path: Path) -> None:
    name, shards, megabytes, *rest = measure("tiny", 2, "FedAvg", tmp_path).split()
    assert (name, shards, megabytes, len(rest)) == ("FedAvg", "2", "5", 2)


def test_the_sample_service_is_compared_with_copying(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.samples", "--samples", "300", "--repeats", "1", "--folder", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    ratios = re.findall(r"^(?:service|bare gRPC stream) / [\w ]+: +([\d.]+)", ended.stdout, re.MULTILINE)
    assert len(ratios) == 4 and all(float(ratio) > 0 for ratio in ratios), ended.stdout
    assert not list(tmp_path.iterdir())
