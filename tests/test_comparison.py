"""Audits of several models side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ret_fl
from PIL import Image
from tiny_pipelines import text_pipeline

from ret_fl.audit.folder import load_audit
from ret_fl.auditing import Drawing, audit_model, open_data
from ret_fl.comparison import checkpoint_models, compare, unique_names
from ret_fl.diffusion.sampling import load_pipeline, save_pipeline


def test_several_models_stand_side_by_side(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir / "final", other)
    out = tmp_path / "out"
    result = ret_fl("audit", run_dir, other, "--baseline", other, "--early-stop", run_dir, "--samples", 12,
                    "--steps", 2, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "no clear difference" in result.output
    first, _ = load_audit(out / run_dir.name)
    second, _ = load_audit(out / "other")
    assert first.replication == second.replication  # the same weights
    assert (out / "plane.png").stat().st_size > 10_000
    assert "early" in (out / run_dir.name / "report.html").read_text().lower()
    both = ret_fl(
        "report", out / run_dir.name, out / "other", "--baseline", out / "other", "--out", tmp_path / "b.html"
    )
    assert both.exit_code == 0, both.output
    assert "other" in (tmp_path / "b.html").read_text()


def test_a_report_of_audits_of_different_data_says_so(run_dir: Path, tmp_path: Path) -> None:
    audit_model(run_dir / "final", "digits", out=tmp_path / "other", drawing=Drawing(8, steps=2), leakage=False)
    result = ret_fl("report", run_dir, tmp_path / "other", "--baseline", run_dir, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "audited against other images than final: run" in result.stderr
    assert "(other data)" in result.stdout and "audited against other images" in result.stdout


def test_every_checkpoint_is_a_model_of_less_training(run_dir: Path, tmp_path: Path) -> None:
    models = checkpoint_models([run_dir], tmp_path)
    assert [m.name for m in models] == [f"run, round {r}" for r in (1, 2, 3)]
    data = open_data(run_dir)
    audits, _ = compare(models[:1], data, tmp_path / "out", early_stop=models[1:], drawing=Drawing(12, steps=2))
    assert [a.model.name for a in audits] == ["run, round 1"]
    assert load_audit(tmp_path / "out" / "run, round 3")[0].model.samples == 12  # ret-fl report --early-stop reads it


def test_a_comparison_that_breaks_off_keeps_what_is_measured(run_dir: Path, tmp_path: Path) -> None:
    unet, scheduler, fold = load_pipeline(run_dir / "final")
    with torch.no_grad():
        next(unet.parameters()).fill_(torch.nan)
    save_pipeline(tmp_path / "broken", unet, scheduler, fold)
    with pytest.raises(ValueError, match="NaN"):
        compare([run_dir, tmp_path / "broken"], open_data(run_dir), tmp_path / "out", drawing=Drawing(8, steps=2))
    assert load_audit(tmp_path / "out" / "run")[0].model.samples == 8
    assert (tmp_path / "out" / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ("nowhere", "nowhere does not exist"),
        ("nan.npy", "4 of 4 images hold NaN"),
        ("cut", "cannot read 1.png"),
        ("text", "text draws images from text: give it --prompts"),
    ],
)
def test_all_models_of_a_comparison_are_checked_before_any_is_drawn(
    run_dir: Path, tmp_path: Path, broken: str, word: str
) -> None:
    np.save(tmp_path / "nan.npy", np.full((4, 8, 8), np.nan))
    (tmp_path / "cut").mkdir()
    for i in range(2):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "cut" / f"{i}.png")
    picture = tmp_path / "cut" / "1.png"
    picture.write_bytes(picture.read_bytes()[:40])
    if broken == "text":
        text_pipeline(tmp_path / "text")
    result = ret_fl("audit", run_dir, tmp_path / broken, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_is_written_for_data_that_cannot_be_opened(run_dir: Path, tmp_path: Path) -> None:
    result = ret_fl("audit", run_dir, "--early-stop", run_dir, "--reference", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no PNG" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("again", ["models", "early stop"])
def test_a_model_named_twice_is_refused(run_dir: Path, tmp_path: Path, again: str) -> None:
    final = run_dir / "final"
    twice = [final, "--early-stop", final] if again == "early stop" else [final, run_dir / "proxies" / ".." / "final"]
    result = ret_fl("audit", *twice, "--data", run_dir, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "name every model once" in result.stderr
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_keep_their_checkpoints_apart(run_dir: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(run_dir, tmp_path / parent / "run")
    models = checkpoint_models([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "checkpoints")
    assert len(set(models)) == 6
    assert all((model / "unet").is_dir() for model in models)
    assert len(set(unique_names(models))) == 6


def test_names_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    assert unique_names([Path("/a/b/final"), Path("/a/c/final")]) == ["b/final", "c/final"]
    assert unique_names([Path("/a/b"), Path("/a/c/final"), Path("/a/d/final")]) == ["b", "c/final", "d/final"]
