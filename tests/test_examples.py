"""The examples of docs/extending.md run as they stand, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY

from ret_fl.config import Scalar
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
    assert all(10 <= len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_trains_with_what_it_shows(example: Path, tmp_path: Path) -> None:
    printed = python("-m", f"examples.{example.stem}", tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert run.summary.is_file() and run.final.is_dir()
    rows: list[dict[str, Any]] = run.rows()
    check = {"policy": _moves, "gate": _weighs, "augmenter": _augments, "auditor": _measures}.get(example.stem)
    if example.stem == "dp_run":
        spent = [row["epsilon"] for row in rows]
        assert spent == sorted(spent) and all(f"round {n}: epsilon {e:.3f}" in printed for n, e in enumerate(spent, 1))
        assert printed.count("for a whole shard") == len(rows) == 3
    if check:
        assert f"examples.{example.stem}:" in run.summary.read_text() and run.summary.read_text() in printed
        check(run, rows)


def _moves(run: RunDir, rows: list[dict[str, Any]]) -> None:
    assert [row["moved"] for row in rows] == [8, 8, 0]  # 4 shards pass on 2 each; nothing moves at the end


def _weighs(run: RunDir, rows: list[dict[str, Any]]) -> None:
    assert rows[0]["skip_rate"] == 0 < rows[-1]["images"]


def _augments(run: RunDir, rows: list[dict[str, Any]]) -> None:
    from ret_fl.ledger import ShardLedger

    assert ShardLedger.load(run.ledger).strength.max() > 0  # some image was close enough to being skipped


def _measures(run: RunDir, rows: list[dict[str, Any]]) -> None:
    (added,) = json.loads((run.audit / "audit.json").read_text())["added"]
    assert added["settings"] == {"tiles": 2, "threshold": 0.3}
    assert set(added["values"]) == {"samples with a copied part", "real held-out images with one"}
    assert all(0 <= share <= 1 for share in added["values"].values())


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example package is installed, from a wheel of it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "examples" / "custom_policy", folder / "source")
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
    offline = ["--no-deps", "--no-index"]
    python(*pip, "wheel", "--no-build-isolation", *offline, "-w", folder, folder / "source")
    (wheel,) = folder.glob("ret_fl_longest_stay-*.whl")
    python(*pip, "install", *offline, "--target", folder / "packages", wheel)
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
