"""Audits of whole runs and models: what they measure, what they leave behind, and how they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, ret_fl, run_server
from PIL import Image

from ret_fl.audit.attacks import _duplicates
from ret_fl.audit.folder import load_audit
from ret_fl.audit.generate import Generated, load_denoiser
from ret_fl.audit.inputs import AuditData, Options
from ret_fl.audit.run import run_audit
from ret_fl.audit.schema import Audit
from ret_fl.auditing import Drawing, audit_model, checkpoint_models, compare, open_data, unique_names
from ret_fl.config import DataConfig, RunConfig
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore


@pytest.fixture(scope="module")
def digits() -> AuditData:
    return open_data("digits")


def ready(images: torch.Tensor) -> Generated:
    return Generated(images, "images", "ready", None, None, None)


# --- a run is audited at its end --------------------------------------------------------------------------------


def test_a_run_ends_with_its_audit(run_dir: Path) -> None:
    audit, pictures = load_audit(run_dir)
    assert (audit.model.kind, audit.model.samples, audit.data.train, audit.data.distinct) == ("run", 12, 34, 24)
    assert (audit.data.canaries, audit.data.canary_repeats) == (2, 6)
    assert {c.variant for c in audit.replication.copy_rates} == {"pixels", "shift", "flip"}
    assert audit.replication.k == 24
    assert audit.leakage is not None
    assert [a.attack for a in audit.leakage.membership] == ["loss", "pia"]
    assert audit.leakage.membership[0].members == 24  # every image once, however often it stands there
    assert audit.leakage.exposure is not None
    assert len(audit.leakage.exposure.exposures) == 2
    assert audit.training is not None
    assert audit.training.rounds == 3
    assert audit.training.settings["data.canaries"] == 2
    assert any("1000" in w for w in audit.warnings)  # 12 samples are too few for a Frechet distance
    assert set(pictures.losses) == {"memorized", "high-loss", "others"}
    assert pictures.skip_by_timestep is not None
    html = (run_dir / "audit" / "report.html").read_text()
    assert "audited" in html
    assert "http" not in html.split("<body")[0].replace("http-equiv", "")


def test_skips_by_timestep_add_up_to_the_skip_rate(run_dir: Path) -> None:
    _, pictures = load_audit(run_dir)
    draws = np.sum([row["level_draws"] for row in pictures.rows], axis=0)
    assert pictures.skip_by_timestep is not None
    timesteps, share = pictures.skip_by_timestep
    rate = sum(row["skip_rate"] * row["images"] for row in pictures.rows) / sum(row["images"] for row in pictures.rows)
    assert (share * draws[draws > 0]).sum() / draws.sum() == pytest.approx(rate, abs=0.02)
    assert len(timesteps) == (draws > 0).sum()
    assert 0 < timesteps.min() < timesteps.max() < 1000


def test_an_audit_comes_back_as_it_was_saved(run_dir: Path, tmp_path: Path) -> None:
    audit, pictures = load_audit(run_dir)
    assert Audit.model_validate_json(audit.model_dump_json()) == audit
    copied = tmp_path / "copied"
    shutil.copytree(run_dir / "audit", copied)
    (copied / "report.html").unlink()
    result = ret_fl("report", copied)
    assert result.exit_code == 0, result.output
    assert (copied / "report.html").read_text() == (run_dir / "audit" / "report.html").read_text()
    assert pictures.samples is not None
    assert pictures.samples.shape == (12, 1, 8, 8)


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_audits_a_run_again_without_drawing_again(run_dir: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    kept = {p: p.stat().st_mtime_ns for p in (copied / "audit" / "samples").rglob("*.npz")}
    assert kept
    result = ret_fl("audit", copied, "--samples", 12, "--steps", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert {p: p.stat().st_mtime_ns for p in (copied / "audit" / "samples").rglob("*.npz")} == kept
    assert load_audit(copied)[0].replication == load_audit(run_dir)[0].replication


def test_ready_images_are_audited_against_a_folder(digits: AuditData, tmp_path: Path) -> None:
    """Copies in a folder of PNG files are found, and the first line says so."""
    for name, ids in (("photos", range(60)), ("made", [*range(40), *range(100, 110)])):
        (tmp_path / name).mkdir()
        for i, image in enumerate(digits.train.pixels(np.array(ids))):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / f"{i:03}.png")
    np.save(tmp_path / "others.npy", digits.reference.pixels(np.arange(90)).numpy())  # type: ignore[union-attr]
    result = ret_fl("audit", tmp_path / "made", "--data", tmp_path / "photos", "--reference", tmp_path / "others.npy",
                    "--out", tmp_path / "audit")  # fmt: skip
    assert result.exit_code == 0, result.output
    audit, _ = load_audit(tmp_path / "audit")
    assert audit.replication.copy_rates[0].rate.value == pytest.approx(0.8, abs=0.05)
    assert audit.replication.copy_rates[0].distinct == 40
    assert (audit.data.reference, audit.data.held_out) == (60, 30)  # the surplus of the reference is held out
    assert audit.leakage is None
    assert "80" in result.output


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


def test_every_checkpoint_is_a_model_of_less_training(run_dir: Path, tmp_path: Path) -> None:
    models = checkpoint_models(run_dir, tmp_path)
    assert [m.name for m in models] == [f"run, round {r}" for r in (1, 2, 3)]
    data = open_data(run_dir)
    audits, _ = compare(models[:1], data, tmp_path / "out", early_stop=models[1:], drawing=Drawing(12, steps=2))
    assert [a.model.name for a in audits] == ["run, round 1"]


def test_a_run_on_other_data_says_so_and_keeps_its_groups_to_itself(run_dir: Path, tmp_path: Path) -> None:
    audit = audit_model(run_dir, "digits", out=tmp_path, drawing=Drawing(samples=8, steps=2))
    assert any("trained on other images" in w for w in audit.warnings)
    _, pictures = load_audit(tmp_path)
    assert set(pictures.losses) == {"training", "never trained on"}


def test_a_model_of_another_size_is_not_asked_for_losses(run_dir: Path, tmp_path: Path) -> None:
    audit = audit_model(run_dir / "final", "glyphs", out=tmp_path, drawing=Drawing(samples=8, steps=2, image_size=16))
    assert audit.leakage is None
    assert any("leakage left out" in w for w in audit.warnings)


def test_canaries_weigh_no_more_among_members_than_in_the_data(run_dir: Path) -> None:
    data = open_data(run_dir)
    denoiser = load_denoiser(run_dir, "cpu")
    generated = ready(data.train.unit(np.arange(8)))
    audit, _ = run_audit(run_dir, generated, data, denoiser=denoiser, options=Options(members=10))
    assert audit.leakage is not None
    assert [a.members for a in audit.leakage.membership] == [10, 10]
    assert audit.leakage.exposure is not None
    assert len(audit.leakage.exposure.exposures) == 2


def test_a_run_resumed_without_samples_keeps_no_old_audit(run_dir: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    run_server(RunConfig.from_flat(json.loads((copied / "config.json").read_text())), copied, resume=True)
    assert (copied / "audit" / "audit.json").is_file()
    config = json.loads((copied / "config.json").read_text()) | {"samples": 0}
    (copied / "config.json").write_text(json.dumps(config))
    run_server(RunConfig.from_flat(config), copied, resume=True)
    assert not (copied / "audit" / "audit.json").exists()
    assert not (copied / "samples.npy").exists()
    assert "No audit" in (copied / "summary.md").read_text()


def test_an_audit_that_fails_loses_neither_model_nor_summary(tmp_path: Path) -> None:
    """A cache that cannot be written stops the classifier, after all training is done."""
    config = RunConfig.from_flat(TINY | {"samples": 8, "sample-steps": 2, "data.limit": 26})
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        run = run_server(config, tmp_path / "run")
    assert "The audit failed" in run.summary.read_text()
    assert (run.final / "unet").is_dir()


REFUSED: dict[str, tuple[Callable[[Path, Path], list[object]], list[str]]] = {
    "a model that is not there": (lambda run, tmp: [tmp / "nowhere", "--data", run], ["nowhere"]),
    "no training images": (lambda run, tmp: [run / "final"], ["--data"]),
    "a baseline that is none of the models": (lambda run, tmp: [run, "--baseline", tmp], ["--baseline"]),
    "images of another size": (lambda run, tmp: [run / "final", "--data", "mnist"], ["8x8", "16x16", "--image-size"]),
    "an empty folder": (lambda run, tmp: [run / "final", "--data", tmp], ["no PNG"]),
    "a reference that was trained on": (
        lambda run, tmp: [run, "--reference", tmp / "train.npy", "--samples", 4, "--steps", 1],
        ["reference shares 24 images with train"],
    ),
    "held-out images that are the reference": (
        lambda run, tmp: [run, "--reference", tmp / "new.npy", "--held-out", tmp / "new.npy", "--samples", 4],
        ["held_out shares 24 images with reference"],
    ),
    "ready images without data": (lambda run, tmp: [tmp / "new.npy"], ["--data"]),
    "a device that is not there": (lambda run, tmp: [run, "--device", "cuda:99"], ["cuda:99"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_audit_that_cannot_be_made_says_why(
    run_dir: Path, tmp_path: Path, arguments: Callable[[Path, Path], list[object]], words: list[str]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    real = open_data(run_dir)
    np.save(folder / "train.npy", real.train.pixels().numpy())
    np.save(folder / "new.npy", real.held_out.pixels(np.arange(24)).numpy())  # type: ignore[union-attr]
    if words == ["no PNG"]:
        for file in folder.iterdir():
            file.unlink()
    result = ret_fl("audit", *arguments(run_dir, folder), "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "out" / "audit.json").exists()


# --- the library ------------------------------------------------------------------------------------------------


def test_held_out_images_as_samples_score_their_own_floor(digits: AuditData) -> None:
    assert digits.held_out is not None
    audit, _ = run_audit(Path("real"), ready(digits.held_out.unit()), digits)
    rate = audit.replication.copy_rates[0]
    assert rate.floor is not None
    assert rate.rate == rate.floor
    assert rate.above_floor is not None
    assert rate.above_floor.low <= 0 <= rate.above_floor.high


def test_training_images_as_samples_are_all_copies(digits: AuditData) -> None:
    audit, pictures = run_audit(Path("copied"), ready(digits.train.unit(np.arange(50))), digits)
    assert audit.replication.copy_rates[0].rate.value == 1
    assert [w.ratio for w in audit.replication.worst] == [0] * len(audit.replication.worst)
    assert pictures.worst is not None
    assert torch.equal(pictures.worst.generated, pictures.worst.originals)


def test_without_reference_there_is_no_copy_rate_but_a_memorized_quantity(digits: AuditData) -> None:
    audit, _ = run_audit(Path("x"), ready(digits.train.unit(np.arange(20))), AuditData("digits", digits.train))
    assert audit.replication.copy_rates == []
    assert audit.replication.memorized[0].generated == 1
    assert audit.replication.memorized[0].floor is None


def test_the_python_of_the_readme_audits_a_model(run_dir: Path, tmp_path: Path) -> None:
    audit = audit_model(run_dir / "final", "digits", out=tmp_path, drawing=Drawing(samples=8, steps=2))
    assert audit.model.kind == "pipeline"
    assert (tmp_path / "report.html").is_file()
    assert audit.training is None


def test_suspects_keep_their_ids_where_only_some_images_are_measured() -> None:
    data = load_splits(DataConfig(limit=40, canaries=1, canary_repeats=5)).train
    assert len(data) == 44
    canary = int(np.argsort(np.unique(data.content_hashes, return_counts=True)[1])[-1])
    hash_of = np.unique(data.content_hashes)[canary]
    rows = np.flatnonzero(data.content_hashes == hash_of)
    measured = torch.from_numpy(np.sort(np.r_[rows[0], np.setdiff1d(np.arange(40), rows)[:20]]))
    losses = torch.full((len(measured), 4), 0.1) + 0.01 * torch.rand(len(measured), 4)
    losses[measured == rows[0]] = 0.001
    found = _duplicates(data, measured, losses, torch.tensor([50, 150, 250, 350]), 400)
    assert [(s.train, s.copies) for s in found.suspects] == [(rows[0], 5)]


def test_names_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    assert unique_names([Path("/a/b/final"), Path("/a/c/final")]) == ["b/final", "c/final"]
    assert unique_names([Path("/a/b"), Path("/a/c/final"), Path("/a/d/final")]) == ["b", "c/final", "d/final"]


def test_a_store_of_one_size_only(digits: AuditData) -> None:
    grey = SampleStore(torch.zeros(5, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"16x16.*--image-size"):
        run_audit(Path("x"), ready(digits.train.unit(np.arange(5))), AuditData("grey", grey))
