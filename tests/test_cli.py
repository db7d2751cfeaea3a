"""The `ret-fl` command: what it leaves behind, what it prints, and how it refuses."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from conftest import ROOT, TINY, copied_app
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pipelines import small_pipeline
from typer.testing import CliRunner

from ret_fl.cli import app
from ret_fl.config import RunConfig, describe

SETTINGS = TINY | {"samples": 4, "sample-steps": 3, "evaluate-every": 1, "name": "cli-test", "agc.t-max": 1000}


def ret_fl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def changes(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A tiny run made by the command, and what it printed."""
    out = tmp_path_factory.mktemp("cli") / "run"
    result = ret_fl("run", "--engine", "inline", "--app", ROOT, "--out", out, *changes(SETTINGS))
    return out, result


@pytest.fixture
def run_dir(finished: tuple[Path, Result]) -> Path:
    return finished[0]


# --- help and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["sample", "--help"],
        ["presets", "--help"],
        ["data", "check", "--help"],
        ["config"],
        ["doctor", "--help"],
        ["deploy", "local", "--help"],
        ["deploy", "example"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom ret_fl.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'flwr', 'diffusers', 'ray', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "print('loaded', heavy, file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.strip().endswith("loaded set()")
    assert answer.stdout.strip()


def test_config_names_and_explains_every_setting() -> None:
    printed = ret_fl("config").output
    words = set(printed.split())
    for setting in describe():
        assert setting.key in words
        assert setting.meaning.split()[0] in words


def test_a_printed_preset_read_again_is_the_same_config(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    asked = {"agc.mem-ratio": 3.5, "name": '"a \\"quoted\\" = name # not a comment"', "data.reference": "false"}
    preset.write_text(ret_fl("config", "--toml", *changes(asked)).output)
    again = tomllib.loads(ret_fl("config", "--toml", "--preset", preset).output)
    assert again == tomllib.loads(preset.read_text())
    assert (again["agc"]["mem-ratio"], again["data"]["reference"]) == (3.5, False)
    assert again["name"] == 'a "quoted" = name # not a comment'


def test_a_change_goes_on_top_of_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text('seed = 3\n[agc]\nmode = "off"\nt-max = 7\n')
    printed = ret_fl("config", "--toml", "--preset", preset, "--set", "agc.t-max=8").output
    assert all(line in printed for line in ("seed = 3\n", 'agc.mode = "off"\n', "agc.t-max = 8\n"))


@pytest.mark.parametrize("preset", sorted((ROOT / "simulations" / "presets").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_preset_that_comes_along_is_valid(preset: Path) -> None:
    assert ret_fl("config", "--preset", preset).exit_code == 0


# --- refusals ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "an unknown setting": (["--set", "agc.memratio=2"], ["agc.memratio", "agc.mem-ratio"]),
    "a value out of range": (["--set", "agc.mem-ratio=0.5"], ["agc.mem-ratio", "0.5", "> 1"]),
    "a value of another type": (["--set", "shards=many"], ["shards", "many", "integer"]),
    "a choice that is none": (["--set", "agc.mode=on"], ["agc.mode", "off | agc"]),
    "an unknown policy": (
        ["--set", "redistribution.policy=ballance"],
        ["redistribution.policy", "ballance", "balance"],
    ),
    "settings that do not fit": (["--set", "agc.bins=2000"], ["agc.bins", "diffusion.timesteps"]),
    "a change without a value": (["--set", "shards"], ["--set", "KEY=VALUE"]),
    "a list": (["--set", "seed=[1, 2]"], ["seed"]),
    "an unknown engine": (["--engine", "turbo"], ["--engine", "flwr", "inline", "turbo"]),
    "a missing preset": (["--preset", "nowhere.toml"], ["--preset", "nowhere.toml"]),
    "data that is not there": (
        ["--set", "data.source=image-folder", "--set", "data.path=nowhere"],
        ["data.path", "nowhere"],
    ),
    "a parquet file that is not there": (
        ["--set", "data.source=hf", "--set", "data.path=no.parquet"],
        ["data.path", "no.parquet", "does not exist"],
    ),
    "more shards than images": (["--set", "shards=800"], ["shards", "719"]),
    "a device that is not there": (["--set", "device=cuda:99"], ["device='cuda:99'", "device=auto"]),
    "a setting without its section": (["--set", "lr=1"], ["lr", "optimizer.lr"]),
    "none with another policy": (["--set", "redistribution.policy=none+balance"], ["redistribution.policy", "none"]),
    "a folder without an app": (["--app", "/tmp"], ["/tmp", "--app"]),
    "resuming nothing": (["--resume", "nowhere"], ["nowhere", "config.json"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_user_error_is_one_plain_message(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    out = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    where = [] if "--app" in arguments else ["--app", ROOT]
    result = ret_fl("run", *where, *out, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_broken_preset_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "preset.toml").write_text("seed = \n")
    result = ret_fl("run", "--app", ROOT, "--preset", tmp_path / "preset.toml")
    assert result.exit_code == 1
    assert str(tmp_path / "preset.toml") in result.stderr
    assert "line 1" in result.stderr


def test_the_folder_of_a_run_is_not_overwritten(run_dir: Path) -> None:
    before = (run_dir / "summary.md").read_text()
    result = ret_fl("run", "--engine", "inline", "--app", ROOT, "--out", run_dir, *changes(SETTINGS))
    assert result.exit_code == 1
    assert "--resume" in result.stderr
    assert (run_dir / "summary.md").read_text() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = ret_fl("run", "--engine", "inline", "--app", ROOT, "--out", tmp_path / "file" / "run")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert str(tmp_path / "file") in result.stderr


def test_a_run_that_fails_says_why_and_where_the_log_is(tmp_path: Path) -> None:
    (tmp_path / "no-model").mkdir()
    out = tmp_path / "run"
    empty = {"model.init-from": tmp_path / "no-model"}
    result = ret_fl("run", "--engine", "inline", "--app", ROOT, "--out", out, *changes(SETTINGS | empty))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for words in ("model.init-from", "no-model", str(out / "flower.log")):
        assert words in result.stderr
    assert "Traceback" in (out / "flower.log").read_text()


@pytest.mark.parametrize("change", ["shards=5", "redistribution.policy=ballance", "agc.mem-ratio=0", "text.noise=0.1"])
def test_a_bad_change_to_a_resumed_run_leaves_it_as_it_was(run_dir: Path, change: str) -> None:
    before = (run_dir / "config.json").read_text()
    result = ret_fl("run", "--app", ROOT, "--resume", run_dir, "--set", change)
    assert result.exit_code == 1
    assert change.partition("=")[0] in result.stderr
    assert (run_dir / "config.json").read_text() == before


# --- what a run leaves behind -----------------------------------------------------------------------------------


def test_a_run_shows_its_rounds_and_where_the_results_are(finished: tuple[Path, Result]) -> None:
    out, result = finished
    assert result.exit_code == 0, result.output
    for words in ("round 1/2", "round 2/2", "loss", "skipped", "moved", f"Results: {out}", "copy rate"):
        assert words in result.output
    assert "Traceback" not in result.output
    for file in ("summary.md", "final", "samples.png", "copies.png", "curves.png"):
        assert file in result.output.split("Results:")[1]
        assert (out / file).exists()


def test_config_json_is_the_config_of_the_run(run_dir: Path) -> None:
    stored = json.loads((run_dir / "config.json").read_text())
    assert stored.keys() == RunConfig().to_flat().keys()
    assert stored["out"] == str(run_dir)
    assert stored["resume"] == ""
    changed = {key: value for key, value in SETTINGS.items() if stored[key] != value}
    assert not changed


def test_metrics_hold_a_row_a_round(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    numbers = ("loss", "skip_rate", "moved", "failures", "images", "images_per_second", "bytes_up", "bytes_down",
               "seconds", "train_loss", "held_out_loss")  # fmt: skip
    for row in rows:
        assert all(isinstance(row[key], int | float) and math.isfinite(row[key]) for key in numbers)
        assert row["images"] == 24
        assert row["failures"] == 0
        assert 0 <= row["skip_rate"] <= 1
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
        assert row["bytes_up"] > 2 * 4e5
        assert row["bytes_down"] > 2 * 4e5
        assert set(row["shards"]) == {"0", "1"}


def test_the_ledger_tells_of_every_sample(run_dir: Path) -> None:
    with np.load(run_dir / "ledger.npz", allow_pickle=False) as ledger:
        assert ledger["shard"].dtype == np.int32
        assert sorted(np.unique(ledger["shard"])) == [0, 1]
        for column in ("shard", "visits", "skips", "log_loss_ratio"):
            assert ledger[column].shape == (24,)
        assert ledger["visits"].sum() == 2 * 24
        assert (ledger["skips"] <= ledger["visits"]).all()
        assert np.isfinite(ledger["log_loss_ratio"]).any()


def test_pictures_open(run_dir: Path) -> None:
    for name in ("samples.png", "curves.png", "copies.png"):
        with Image.open(run_dir / name) as image:
            image.load()
            assert min(image.size) > 60
            assert image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]
    samples = np.load(run_dir / "samples.npy", allow_pickle=False)
    assert (samples.dtype, samples.shape) == (np.uint8, (4, 1, 8, 8))


def test_tensorboard_finds_every_round(run_dir: Path) -> None:
    board = EventAccumulator(str(run_dir / "tb"))
    board.Reload()
    assert {"loss", "skip_rate", "moved", "held_out_loss"} <= set(board.Tags()["scalars"])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("loss")] == [(r["round"], r["loss"]) for r in rows]


def test_the_summary_names_results_and_settings(run_dir: Path) -> None:
    text = (run_dir / "summary.md").read_text()
    for words in (
        "# cli-test",
        "Copy rate",
        "images trained on",
        "from_pretrained",
        "`agc.t-max = 1000`",
        "curves.png",
    ):
        assert words in text
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize("fold", [1, 2])
def test_the_code_in_the_summary_draws_without_ret_fl(tmp_path: Path, fold: int) -> None:
    settings = SETTINGS | {"model.pixel-unshuffle": fold, "diffusion.timesteps": 50, "agc.t-max": 25, "samples": 0}
    assert ret_fl("run", "--engine", "inline", "--app", ROOT, "--out", tmp_path, *changes(settings)).exit_code == 0
    code = (tmp_path / "summary.md").read_text().split("```python\n")[1].split("```")[0]
    code = "import sys\n" + code + "print(tuple(images.shape), 'ret_fl' in sys.modules)\n"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip().endswith("(16, 1, 8, 8) False")


def test_a_run_leaves_only_what_is_documented(run_dir: Path) -> None:
    files = "config.json metrics.jsonl events.jsonl ledger.npz samples.npy samples.png copies.png curves.png summary.md"
    expected = {*files.split(), "flower.log", "checkpoints", "final", "history", "tb", "proxies", "audit"}
    assert {p.name for p in run_dir.iterdir()} == expected
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["round-00001", "round-00002"]


# --- sample and show --------------------------------------------------------------------------------------------


def test_samples_come_as_grid_array_or_folder(run_dir: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "a" / "grid.png", tmp_path / "b" / "images.npy", tmp_path / "c" / "folder"):
        result = ret_fl("sample", run_dir, "--count", 5, "--steps", 2, "--out", out, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert str(out) in result.output.replace("\n", "")
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.size == (3 * 64 + 2 * 2, 2 * 64 + 2)
    images = np.load(tmp_path / "b" / "images.npy", allow_pickle=False)
    assert (images.dtype, images.shape) == (np.uint8, (5, 1, 8, 8))
    files = sorted((tmp_path / "c" / "folder").iterdir())
    np.testing.assert_array_equal([np.array(Image.open(file)) for file in files], images[:, 0])


def test_sample_takes_a_bare_pipeline_folder_and_repeats_itself(run_dir: Path, tmp_path: Path) -> None:
    def draw(model: Path, *more: object) -> np.ndarray:
        out = tmp_path / "x.npy"
        assert ret_fl("sample", model, "--steps", 3, "--out", out, "--device", "cpu", *more).exit_code == 0
        return np.load(out)

    as_in_the_run = draw(run_dir, "--count", 4)
    assert np.abs(as_in_the_run.astype(int) - np.load(run_dir / "samples.npy")).max() <= 1
    np.testing.assert_array_equal(draw(run_dir / "final", "--count", 2), as_in_the_run[:2])
    assert (draw(run_dir, "--count", 4, "--seed", 1) != as_in_the_run).any()


@pytest.mark.parametrize("what", ["missing", "empty", "device"])
def test_sample_refuses_plainly(run_dir: Path, tmp_path: Path, what: str) -> None:
    model = {"missing": tmp_path / "nowhere", "empty": tmp_path, "device": run_dir}[what]
    device = "warp" if what == "device" else "cpu"
    result = ret_fl("sample", model, "--device", device, "--count", 1, "--out", tmp_path / "x.png")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert (device if what == "device" else str(model)) in result.stderr


@pytest.mark.parametrize("option", [["--prompt", "a dog"], ["--guidance", "2"], ["--label", "1"]])
def test_sample_refuses_options_that_the_model_has_no_use_for(tmp_path: Path, option: list[str]) -> None:
    result = ret_fl("sample", small_pipeline(tmp_path), *option)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert option[0] in result.stderr


def test_show_tells_of_rounds_shards_and_samples(run_dir: Path) -> None:
    result = ret_fl("show", run_dir)
    assert result.exit_code == 0, result.output
    for words in ("2 of 2 rounds, finished", "round 2/2", "shards", "lowest and highest losses", "agc.t-max=1000"):
        assert words in result.output.replace("\n", "")
    with np.load(run_dir / "ledger.npz") as ledger:
        visits, shard = ledger["visits"][7], ledger["shard"][7]
    one = ret_fl("show", run_dir, "--sample", 7).output.replace("\n", "")
    assert f"sample 7 is in shard {shard}; visited {visits} times" in one


def test_show_refuses_plainly(run_dir: Path, tmp_path: Path) -> None:
    for arguments, words in (((tmp_path,), "config.json"), ((run_dir, "--sample", 24), "0..23")):
        result = ret_fl("show", *arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert isinstance(result.exception, SystemExit)


def test_more_rounds_by_command(run_dir: Path, tmp_path: Path) -> None:

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    more = ("--set", "num-server-rounds=3", "--set", "samples=0")
    result = ret_fl("run", "--engine", "inline", "--app", ROOT, "--resume", copy, *more)
    assert result.exit_code == 0, result.output
    assert "round 3/3" in result.output
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_code_that_runs_is_the_app_folders(tmp_path: Path) -> None:
    """A researcher edits a copy of the repository and names it by --app: the copy's ret_fl trains."""
    copy = copied_app(tmp_path / "copy")
    agc = copy / "ret_fl" / "mitigation" / "agc.py"
    agc.write_text(agc.read_text().replace("return mem_ratio * loss >= bank_value", "raise RuntimeError('edited')"))
    out = tmp_path / "run"
    result = ret_fl("run", "--engine", "inline", "--app", copy, "--out", out, *changes(SETTINGS))
    assert result.exit_code == 1
    assert "RuntimeError: edited" in result.output
