"""The examples of docs/extending.md run as they stand."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, run_server
from scipy.spatial.distance import cdist

from ret_fl.auditing import data_of
from ret_fl.checkpoint import load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.rundir import RunDir
from ret_fl.settings import to_toml

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")


def python(*arguments: object, packages: Path | None = None) -> str:
    """What a fresh interpreter prints, in the app folder; `packages` holds further installed ones."""
    found = [str(ROOT), *([str(packages)] if packages else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_page_shows_every_example_as_it_is() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    assert [path.name for path in EXAMPLES if f"```python\n{path.read_text()}```\n" not in page] == []
    package = ROOT / "examples" / "custom_policy"
    assert f"```toml\n{(package / 'pyproject.toml').read_text()}```\n" in page
    assert all(10 <= len(path.read_text().splitlines()) <= 65 for path in EXAMPLES)
    assert [path for path in EXAMPLES if f"\npython -m examples.{path.stem} [FOLDER]" not in path.read_text()] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_trains_with_what_it_shows(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    if example.stem == "policy":
        printed = python("-m", "examples.policy", folder)
    else:  # as the command does it, without the seconds that a new process imports for
        monkeypatch.setattr(sys, "argv", [str(example), str(folder)])
        runpy.run_path(str(example), run_name="__main__")
        printed = capsys.readouterr().out
    run = RunDir(folder)
    assert run.summary.is_file() and run.final.is_dir()
    {"policy": _moves, "gate": _weighs, "augmenter": _augments, "auditor": _measures, "dp_run": _spends}[example.stem](
        run, printed
    )
    if example.stem != "dp_run":
        assert f"examples.{example.stem}:" in run.summary.read_text() and run.summary.read_text() in printed


def _moves(run: RunDir, printed: str) -> None:
    assert [row["moved"] for row in run.rows()] == [8, 0]  # 4 shards pass on 2 each; nothing moves at the end


def _weighs(run: RunDir, printed: str) -> None:
    assert _far_from(run, {"agc.mode": "off", "agc.options": ""})


def _augments(run: RunDir, printed: str) -> None:
    assert _far_from(run, {"taa.options": "deviation = 0.1"})  # which nothing but this augmenter reads


def _far_from(run: RunDir, change: Mapping[str, Scalar]) -> bool:
    """Whether a run with a setting changed ends at other weights, by more than rounding."""
    other = run_server(RunConfig.from_flat(run.read_config().to_flat() | change), run.path.parent / "other")
    ours, theirs = (load_latest(folder.checkpoints).weights for folder in (run, other))
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) > 1e-5


def _measures(run: RunDir, printed: str) -> None:
    (added,) = json.loads((run.audit / "audit.json").read_text())["added"]
    assert added["settings"] == {"tiles": 2, "threshold": 0.3}
    data = data_of(run.read_config())
    assert data.reference is not None and data.held_out is not None
    found = np.zeros(len(data.held_out), bool)
    train, reference, held_out = (store.unit().numpy() for store in (data.train, data.reference, data.held_out))
    for tile in [np.s_[:, :, a : a + 4, b : b + 4] for a in (0, 4) for b in (0, 4)]:
        own = held_out[tile].reshape(len(held_out), -1)
        near, usual = (cdist(own, x[tile].reshape(len(x), -1)).min(1) ** 2 for x in (train, reference))
        found |= near < 0.3 * usual
    assert added["values"].keys() == {"samples with a copied part", "real held-out images with one"}
    assert 0 < added["values"]["real held-out images with one"] == pytest.approx(found.mean(), abs=0.002)


def _spends(run: RunDir, printed: str) -> None:
    spent = [row["epsilon"] for row in run.rows()]
    assert len(spent) == 2 and 0 < spent[0] < spent[1]
    for n, epsilon in enumerate(spent, 1):
        assert f"round {n}: epsilon {epsilon:.3f} at delta" in printed


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example package is installed, by way of a wheel of it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "examples" / "custom_policy", folder / "source")
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
    alone = ["--no-build-isolation", "--no-deps", "--no-index"]
    python(*pip, "install", *alone, "--target", folder / "packages", folder / "source")
    return folder / "packages"


def test_an_installed_package_is_listed_with_its_settings(packages: Path) -> None:
    code = "from ret_fl.cli import app; app(['policies'])"
    lines = python("-c", code, packages=packages).splitlines()
    (line,) = [line for line in lines if line.strip().startswith("longest-stay")]
    assert "ret-fl-longest-stay 0.1.0" in line and "Each shard passes on what it visited most often" in line
    assert any("redistribution.options: least-visits = 1: Visits since it came" in line for line in lines)


def test_an_installed_package_moves_samples_in_a_run_that_names_it(packages: Path, tmp_path: Path) -> None:
    own: dict[str, Scalar] = {
        "redistribution.policy": "longest-stay+quarantine", "redistribution.options": "count = 3, least-visits = 1",
        "out": str(tmp_path / "run"), "state-dir": str(tmp_path / "proxies"),
    }  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(TINY | own))
    python("-P", "-m", "simulations.inline", tmp_path / "run.toml", 2, packages=packages)
    run = RunDir(tmp_path / "run")
    assert [row["moved"] for row in run.rows()] == [6, 0]
    assert json.loads(run.config.read_text())["redistribution.policy"] == "longest-stay+quarantine"
    told = "longest-stay (ret-fl-longest-stay 0.1.0, redistribution.options: count = 3, least-visits = 1)"
    assert f"| plug-in | redistribution.policy: {told} |" in run.summary.read_text()
