"""A study trains what is missing, keeps what is done, and its pages say what the rows say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from ret_fl.config import ConfigError, RunConfig
from simulations.grid import CellWaitsError, Study
from simulations.results import ResultsFile
from simulations.study import run_cell, run_study

GRID = """
title = "Two methods"
summary = true
[settings]
num-server-rounds = 2
local-epochs = 1
samples = 40
sample-steps = 2
evaluate-every = 0
data.limit = 40
data.canaries = 2
data.canary-repeats = 3
[datasets.digits]
data.source = "image-folder"
data.path = "IMAGES"
[methods.central]
label = "central training"
points = [0.5, 1]
set = { shards = 1, agc.mode = "off", optimizer.schedule = "constant" }
[methods.default]
label = "the default"
set = { shards = 2 }
"""


def write(folder: Path, text: str = GRID) -> Path:
    """The study file, and 120 digits of two classes as image files: a small held-out set makes audits quick."""
    images = folder / "images"
    if not images.is_dir():
        found = load_digits(n_class=2)
        for i in range(120):
            place = images / str(found.target[i])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(found.images[i] * 255 / 16).astype(np.uint8)).save(place / f"{i}.png")
    path = folder / "two.toml"
    path.write_text(text.replace("IMAGES", str(images)))
    return path


def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulations.study", str(path), "--out", str(path.parent / "runs")]
    command += ["--results", str(path.parent / "results" / "two.jsonl"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study file of a finished two-cell study; its results lie in results/ beside it."""
    path = write(tmp_path_factory.mktemp("study"))
    done = run(path, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return path


def results(path: Path) -> ResultsFile:
    return ResultsFile(path.parent / "results" / "two.jsonl")


def test_every_point_of_every_cell_has_a_row(finished: Path) -> None:
    rows = {(row.method, row.share): row for row in results(finished).rows}
    assert set(rows) == {("central", 0.5), ("central", 1.0), ("default", 1.0)}
    assert rows["central", 0.5].rounds == 1 and rows["central", 1.0].rounds == 2
    assert rows["central", 0.5].images == 44  # 40 digits, two of them thrice, once
    assert rows["central", 1.0].images == rows["default", 1.0].images == 88  # equal images seen
    assert rows["central", 1.0].settings["shards"] == 1
    assert all(0 <= row.canary_auc <= 1 for row in rows.values() if row.canary_auc is not None)
    assert rows["central", 0.5].canary_auc is not None


def test_a_done_study_trains_nothing_again_even_without_its_folders(finished: Path) -> None:
    listed = run(finished, "--list")
    assert listed.stdout.count("done") == 2 and "missing" not in listed.stdout
    elsewhere = finished.parent / "elsewhere"
    run_study(finished, elsewhere, results(finished).path, jobs=1)
    assert list(elsewhere.iterdir()) == []


def test_points_in_the_folders_serve_another_results_file(finished: Path) -> None:
    """Also one begun under other defaults."""
    other = ResultsFile(finished.parent / "other.jsonl")
    other.defaults["optimizer.lr"] = 1.0
    other.add([])
    trained = {p: p.stat().st_mtime_ns for p in (finished.parent / "runs").rglob("metrics.jsonl")}
    run_study(finished, finished.parent / "runs", other.path, jobs=2)
    assert {p: p.stat().st_mtime_ns for p in (finished.parent / "runs").rglob("metrics.jsonl")} == trained
    assert not any(cell.missing(ResultsFile(other.path)) for cell in Study.read(finished).cells())
    numbers = [
        [r.model_dump(exclude={"settings"}) for r in f.rows] for f in (results(finished), ResultsFile(other.path))
    ]
    assert numbers[0] == numbers[1]


def test_a_changed_setting_or_length_makes_rows_stale(finished: Path) -> None:
    for change in (("local-epochs = 1", "local-epochs = 2"), ("num-server-rounds = 2", "num-server-rounds = 4")):
        study = Study.read(write(finished.parent, GRID.replace(*change)))
        assert all(cell.missing(results(finished)) == cell.points for cell in study.cells())
    write(finished.parent)


def test_a_further_point_goes_on_from_the_last_round_and_leaves_the_rest(finished: Path) -> None:
    longer = write(finished.parent, GRID.replace("points = [0.5, 1]", "points = [0.5, 1, 1.5]"))
    done = run(longer, "--jobs", "1")
    assert done.returncode == 0, done.stderr
    row = next(r for r in results(longer).rows if r.share == 1.5)
    assert row.rounds == 3 and row.images == 132
    metrics = (finished.parent / "runs" / "digits-central-s0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in metrics] == [1, 2, 3]
    write(finished.parent)


def test_under_a_schedule_every_point_is_a_training_of_its_own(tmp_path: Path) -> None:
    text = GRID.replace('"constant"', '"cosine"')
    cell = next(c for c in Study.read(write(tmp_path, text)).cells() if c.method == "central")
    assert cell.length == 1.5
    assert [cell.folder(tmp_path, share).name for share in cell.points] == ["0.5x", "1x"]
    assert [cell.config(share).num_server_rounds for share in cell.points] == [1, 2]
    run_cell(cell, tmp_path, ResultsFile(tmp_path / "r.jsonl"))
    assert cell.trained(tmp_path) == 1.5
    shorter, whole = (json.loads((tmp_path / cell.name / x / "config.json").read_text()) for x in ("0.5x", "1x"))
    assert (shorter["num-server-rounds"], whole["num-server-rounds"]) == (1, 2)


def test_the_page_and_the_summary_tell_the_rows(finished: Path) -> None:
    assert run(finished, "--render").returncode == 0
    folder = finished.parent / "results"
    page = (folder / "two.md").read_text()
    assert "| central training | 1 | 88 |" in page and "| the default | 1 | 88 |" in page
    assert "## The default against central training" in page and "| digits | 1 / 1 |" in page
    assert "![Copies against quality, digits](two-digits.png)" in page
    assert "| FD, stopped | found |" in page and "*found*: the AUC" in page
    for picture in ("two-digits.png", "two-digits-copies.png"):
        assert (folder / picture).stat().st_size > 5000
    entries = {entry["method"]: entry for entry in json.loads((folder / "summary.json").read_text())}
    rows = {row.method: row for row in results(finished).rows if row.share == 1}
    assert set(entries) == {"central", "default"}
    for method, entry in entries.items():
        assert entry["dataset"] == "digits" and entry["seeds"] == 1
        assert (entry["cr"], entry["fd"]) == (rows[method].cr.value, rows[method].fd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("shards = 1, agc.mode", "shards = 1, agc.mod"), "agc.mod"),
        (("[methods.default]", '[methods.default]\ndatasets = ["cifar"]'), "cifar"),
        (("[methods.default]", '[methods.default]\nskips-of = "agc"'), "skips-of"),
        (("points = [0.5, 1]", "points = [0, 1]"), "methods.central.points"),
        (('title = "Two methods"', ""), "title"),
    ],
)
def test_a_bad_study_file_is_refused_by_name(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Study.read(write(tmp_path, GRID.replace(*change)))


def test_further_points_of_the_first_seed_are_its_own(tmp_path: Path) -> None:
    text = GRID.replace("summary = true", "seeds = [3, 4]").replace(
        'label = "the default"', 'label = "the default"\nfirst-seed-points = [2]'
    )
    points = {c.key: c.points for c in Study.read(write(tmp_path, text)).cells()}
    assert points["digits", "default", 3] == [1, 2] and points["digits", "default", 4] == [1]
    assert points["digits", "central", 3] == points["digits", "central", 4] == [0.5, 1]


def test_a_method_may_name_a_control_and_its_own_settings_go_on_top(tmp_path: Path) -> None:
    more = """
[methods.batch-x4]
label = "b"
control = "batch-x4"
[methods.dedup]
label = "d"
control = "dedup-recipe"
set = { optimizer.lr = 0.5 }
[methods.stopped]
label = "s"
control = "central"
points = [0.5]
"""
    cells = {c.method: c.config() for c in Study.read(write(tmp_path, GRID + more)).cells()}
    batch, dedup, stopped = (cells[name] for name in ("batch-x4", "dedup", "stopped"))
    # what central training and the control set; data and length stay the study's
    assert (batch.batch_size, batch.shards, batch.data.duplicates) == (128, 1, "keep")
    assert (batch.optimizer.lr, batch.optimizer.schedule) == (0.001, "constant")
    assert batch.diffusion.beta_schedule == "linear"
    assert (batch.data.source, batch.data.limit) == ("image-folder", 40)
    assert (batch.num_server_rounds, batch.local_epochs) == (2, 1)
    assert (dedup.shards, dedup.data.duplicates, dedup.optimizer.lr) == (1, "weight", 0.5)
    assert dedup.diffusion.beta_schedule == RunConfig().diffusion.beta_schedule
    assert (stopped.num_server_rounds, stopped.shards, stopped.optimizer.schedule) == (2, 1, "constant")
    assert batch.name == "digits-batch-x4-s0"
    with pytest.raises(
        ConfigError, match=r'methods\.stopped.*"early-stopping".* Write control = "central" with points'
    ):
        Study.read(write(tmp_path, GRID + more.replace('control = "central"', 'control = "early-stopping"')))
    with pytest.raises(ConfigError, match=r"methods\.batch-x4.*no control 'batch-x5'; there are batch-x4, central"):
        Study.read(write(tmp_path, GRID + more.replace('control = "batch-x4"', 'control = "batch-x5"')))


def test_a_method_may_have_seeds_of_its_own_on_a_dataset(tmp_path: Path) -> None:
    text = GRID.replace('label = "the default"', 'label = "the default"\nseeds = { digits = [0, 4] }')
    text = text.replace("[methods.central]", '[datasets.more]\ndata.source = "digits"\n[methods.central]')
    cells = [c.key for c in Study.read(write(tmp_path, text)).cells()]
    first = [(d, m, 0) for d in ("digits", "more") for m in ("central", "default")]
    assert cells == [*first, ("digits", "default", 4)]
    with pytest.raises(ConfigError, match=r"methods\.default\.seeds: no dataset 'digit'"):
        Study.read(write(tmp_path, text.replace("{ digits = ", "{ digit = ")))


def test_the_studies_that_come_along_are_valid() -> None:
    files = sorted((ROOT / "simulations/studies").glob("*.toml"))
    assert len(files) > 9
    for file in files:
        assert list(Study.read(file).cells())


def test_a_random_control_skips_as_often_as_the_method_beside_it(finished: Path) -> None:
    control = '[methods.random]\nlabel = "r"\nskips-of = "default"\nset = { shards = 2, agc.mode = "random" }\n'
    study = Study.read(write(finished.parent, GRID + control))
    cell = next(c for c in study.cells() if c.method == "random")
    rows = [r for r in results(finished).rows if r.method == "default"]
    assert cell.rate(results(finished)) == {"agc.random-rate": min(0.95, 2 * rows[0].skip_rate)}  # below t = 500 only
    empty = ResultsFile(finished.parent / "none.jsonl")
    with pytest.raises(CellWaitsError):
        cell.rate(empty)
    write(finished.parent)


PRETRAINING = """
[pretraining]
num-server-rounds = 1
shards = 1
data.canaries = 0
data.limit = 20
data.reference = false
"""


def test_fine_tuning_starts_from_one_model_trained_on_other_images(tmp_path: Path) -> None:
    skipping = "data.limit = 40\ndata.skip = 20"
    text = GRID.replace("data.limit = 40", skipping).replace("[datasets.digits]", PRETRAINING + "[datasets.digits]")
    text = text.replace("data.limit = 20", "data.limit = 20\ndata.skip = 0")
    path = write(tmp_path, text)
    done = run(path, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    pretrained = [folder for folder in (tmp_path / "runs").iterdir() if folder.name.startswith("pretrained")]
    assert len(pretrained) == 1
    configs = [json.loads((tmp_path / "runs" / cell / "config.json").read_text()) for cell in
               ("digits-central-s0", "digits-default-s0/1x")]  # fmt: skip
    assert {c["model.init-from"] for c in configs} == {str(pretrained[0] / "final")}
    # rows speak of no folder of this machine, and are known again on another
    rows = results(path).rows
    assert {row.settings["model.init-from"] for row in rows} == {pretrained[0].name}
    assert "missing" not in run(path, "--list").stdout
    # what was pretrained otherwise is another study
    changed = write(tmp_path, text.replace("data.limit = 20\n", "data.limit = 19\n"))
    assert "done" not in run(changed, "--list").stdout
