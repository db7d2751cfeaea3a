"""Audits of whole runs and models: what they measure, what they leave behind, and how they refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from audits import make_audit
from conftest import TINY, ret_fl, run_server
from PIL import Image

from ret_fl.audit.folder import load_audit
from ret_fl.audit.inputs import AuditData, Options, distinct_rows
from ret_fl.audit.schema import Audit, Measuring
from ret_fl.auditing import Drawing, audit_folder, audit_model, open_data, own_drawing
from ret_fl.config import RunConfig


@pytest.fixture(scope="module")
def digits() -> AuditData:
    return open_data("digits")


# --- a run is audited at its end --------------------------------------------------------------------------------


def test_a_run_ends_with_its_audit(run_dir: Path) -> None:
    audit, pictures = load_audit(run_dir)
    assert (audit.model.kind, audit.model.samples, audit.data.train, audit.data.distinct) == ("run", 12, 34, 24)
    assert (audit.data.canaries, audit.data.canary_repeats) == (2, 6)
    data = open_data(run_dir)
    assert data.reference is not None and data.held_out is not None and audit.data.fingerprints is not None
    assert list(audit.data.fingerprints.model_dump().values()) == [
        store.fingerprint for store in (data.train, data.reference, data.held_out)
    ]
    assert all(f.recipe for f in audit.fidelity)
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
    assert {h.group: sum(h.counts) for h in audit.losses} == {n: len(v) for n, v in pictures.losses.items()}
    assert pictures.skip_by_timestep is not None and audit.training.skips is not None
    assert audit.training.skips.share == pictures.skip_by_timestep[1].tolist()
    assert (audit.model.prompts, audit.model.guidance, audit.model.image_size) == ([], None, 0)
    assert audit.measuring == Measuring(members=2000, seed=5, device="cpu")
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


def test_an_audit_made_before_more_was_kept_can_be_read() -> None:
    older = make_audit()
    written = older.model_dump_json(exclude_unset=True)
    assert not any(name in written for name in ("fingerprints", "recipe", "measuring", "worst_variant", "examined"))
    assert Audit.model_validate_json(written) == older


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_audits_a_run_again_as_at_its_end(run_dir: Path, tmp_path: Path) -> None:
    """Nothing is drawn again and every number stays, those that hang on the seed, too."""
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    kept = {p: p.stat().st_mtime_ns for p in (copied / "audit" / "samples").rglob("*.npz")}
    assert kept
    result = ret_fl("audit", copied, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert {p: p.stat().st_mtime_ns for p in (copied / "audit" / "samples").rglob("*.npz")} == kept
    first, again = load_audit(run_dir)[0], load_audit(copied)[0]
    assert (again.model.samples, again.model.seed, again.model.steps) == (12, 5, 4)
    assert (again.replication, again.fidelity, again.leakage) == (first.replication, first.fidelity, first.leakage)


def test_an_audit_by_other_settings_leaves_the_runs_own_alone(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (run_dir / "audit" / "audit.json").read_bytes()
    result = ret_fl("audit", run_dir, "--samples", 8, "--no-leakage")
    assert result.exit_code == 0, result.output
    audit, _ = load_audit(Path("audits/run"))
    assert (audit.model.samples, audit.model.seed, audit.model.steps) == (8, 5, 4)
    assert (run_dir / "audit" / "audit.json").read_bytes() == before
    assert "stays as it is" in result.stdout
    assert "warning: run: Frechet distance of 8 generated samples" in result.stderr


def test_only_the_audit_of_its_own_images_and_data_goes_into_a_run(run_dir: Path) -> None:
    own = own_drawing(run_dir)
    assert audit_folder(run_dir, own, Options()) == run_dir / "audit"
    assert audit_folder(run_dir, own, Options(memory_mb=64), str(run_dir)) == run_dir / "audit"
    for drawing, options, sets in (
        (replace(own, seed=6), Options(), ()),
        (replace(own, image_size=16), Options(), ()),
        (own, Options(threshold=0.5), ()),
        (own, Options(members=10), ()),
        (own, Options(), ("digits",)),
        (own, Options(), (None, "others.npy")),
        (own, Options(), (None, None, "others.npy")),
    ):
        assert audit_folder(run_dir, drawing, options, *sets) == Path("audits/run")
    assert audit_folder(run_dir, own, Options(), leakage=False) == Path("audits/run")
    assert audit_folder(run_dir, own, Options(), features=["sscd.pt"]) == Path("audits/run")
    assert audit_folder(run_dir / "final", Drawing(), Options()) == Path("audits/final")


def test_models_of_one_name_have_audits_of_their_own(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for parent in ("a", "b"):
        shutil.copytree(run_dir / "final", tmp_path / parent / "final")
    for parent, folder in (("a", "final"), ("b", "b-final"), ("a", "final")):
        model = Path(parent) / "final"
        audit_model(model, run_dir, drawing=Drawing(4, steps=1), leakage=False)
        assert load_audit(Path("audits") / folder)[0].model.path == str(model)
    assert {p.name for p in Path("audits").iterdir()} == {"final", "b-final"}


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


def test_a_run_on_other_data_says_so_and_keeps_its_groups_to_itself(run_dir: Path, tmp_path: Path) -> None:
    audit = audit_model(run_dir, "digits", out=tmp_path, drawing=Drawing(samples=8, steps=2))
    assert any("trained on other images" in w for w in audit.warnings)
    _, pictures = load_audit(tmp_path)
    assert set(pictures.losses) == {"training", "never trained on"}


def test_a_model_of_another_size_is_not_asked_for_losses(run_dir: Path, tmp_path: Path) -> None:
    audit = audit_model(run_dir / "final", "glyphs", out=tmp_path, drawing=Drawing(samples=8, steps=2, image_size=16))
    assert audit.leakage is None
    assert any("leakage left out" in w for w in audit.warnings)


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
    "an empty folder": (lambda run, tmp: [run / "final", "--data", tmp], ["--data", "no PNG"]),
    "a typing error": (
        lambda run, tmp: [run / "final", "--data", "digitz"],
        ["--data digitz: there is no such file", "digits, mnist", "owner/name"],
    ),
    "a built-in source as reference": (lambda run, tmp: [run, "--reference", "digits"], ["--data only"]),
    "held-out images that are not there": (
        lambda run, tmp: [run, "--held-out", tmp / "no.npy"],
        ["--held-out", "no.npy: there is no such file"],
    ),
    "a folder that is no model": (
        lambda run, tmp: [tmp.parent / "bare", "--data", run],
        ["nothing to audit", "model_index.json", "no PNG"],
    ),
    "pictures of another size": (
        lambda run, tmp: [tmp.parent / "pictures", "--data", tmp / "small.npy"],
        ["generated images are 1x5x5", "1x6x6", "--image-size"],
    ),
    "a threshold that all images pass": (lambda run, tmp: [run, "--threshold", 1], ["threshold must be > 0 and < 1"]),
    "an array that is no image model": (
        lambda run, tmp: [run, "--features", tmp / "new.npy"],
        ["new.npy is not a TorchScript file", "'inception'"],
    ),
    "a reference that was trained on": (
        lambda run, tmp: [run, "--reference", tmp / "train.npy", "--samples", 4, "--steps", 1],
        ["reference shares 24 images with train"],
    ),
    "held-out images that are the reference": (
        lambda run, tmp: [run, "--reference", tmp / "new.npy", "--held-out", tmp / "new.npy", "--samples", 4],
        ["held_out shares 24 images with reference"],
    ),
    "held-out images that were trained on": (
        lambda run, tmp: [run, "--held-out", tmp / "train.npy", "--samples", 4],
        ["held_out shares 24 images with train"],
    ),
    "held-out images that are the run's reference": (
        lambda run, tmp: [run, "--held-out", tmp / "reference.npy", "--samples", 4],
        ["held_out shares 24 images with reference"],
    ),
    "ready images without data": (lambda run, tmp: [tmp / "new.npy"], ["--data"]),
    "an image model that is not there": (lambda run, tmp: [run, "--features", tmp / "sscd.pt"], ["no image model"]),
    "an image model for other inputs": (lambda run, tmp: [run, "--features", tmp / "four.pt"], ["four refuses inputs"]),
    "images too small for an image model": (
        lambda run, tmp: [tmp / "small.npy", "--data", tmp / "small.npy", "--features", tmp / "four.pt"],
        ["H and W >= 8"],
    ),
    "a reference of another size": (
        lambda run, tmp: [run, "--reference", tmp / "small.npy"],
        ["reference images are 1x6x6", "--image-size"],
    ),
    "a threshold that nothing lies below": (lambda run, tmp: [run, "--threshold", 0], ["threshold must be > 0"]),
    "three training images": (
        lambda run, tmp: [run, "--data", tmp / "three.npy"],
        ["at least 4 distinct training images, got 3"],
    ),
    "a device that is not there": (lambda run, tmp: [run, "--device", "cuda:99"], ["cuda:99"]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_audit_that_cannot_be_made_says_why_before_anything_is_drawn(
    run_dir: Path, tmp_path: Path, arguments: Callable[[Path, Path], list[object]], words: list[str]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    real = open_data(run_dir)
    np.save(folder / "train.npy", real.train.pixels().numpy())
    np.save(folder / "new.npy", real.held_out.pixels(np.arange(24)).numpy())  # type: ignore[union-attr]
    np.save(folder / "reference.npy", real.reference.pixels(np.arange(24)).numpy())  # type: ignore[union-attr]
    np.save(folder / "three.npy", real.train.pixels(distinct_rows(real.train)[[0, 1, 2, 2]]).numpy())
    np.save(folder / "small.npy", np.arange(30 * 36, dtype=np.uint8).reshape(30, 6, 6))
    torch.jit.script(torch.nn.Conv2d(4, 4, 1)).save(folder / "four.pt")
    for name in ("bare", "pictures"):
        (tmp_path / name).mkdir()
    Image.new("L", (5, 5)).save(tmp_path / "pictures" / "one.png")
    if words == ["--data", "no PNG"]:
        for file in folder.iterdir():
            file.unlink()
    result = ret_fl("audit", *arguments(run_dir, folder), "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_built_in_sources_split_is_told_and_a_part_of_ready_images_spread(digits: AuditData, tmp_path: Path) -> None:
    """Images sorted by origin: the first 20 are copies, the others are not."""
    images = torch.cat([digits.train.pixels(np.arange(20)), digits.held_out.pixels(np.arange(60))])  # type: ignore
    np.save(tmp_path / "made.npy", images.numpy())
    result = ret_fl("audit", tmp_path / "made.npy", "--data", "digits", "--samples", 40, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "719 training images of 1x8x8, 359 held out, 719 for reference" in result.output
    assert "--data RUN" in result.output
    audit, _ = load_audit(tmp_path / "out")
    assert audit.replication.copy_rates[0].rate.value == pytest.approx(0.25, abs=0.06)
    assert any("40 of 80 images of made.npy" in w and "--samples 80" in w for w in audit.warnings)


def test_an_interrupted_audit_says_how_to_go_on(run_dir: Path, tmp_path: Path) -> None:
    command = ["audit", run_dir / "final", "--data", run_dir, "--samples", 100_000, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from ret_fl.cli import app; app()", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # where tests run in the background of a shell, Ctrl-C is ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "out").glob("samples/*/*.npz")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "kept in" in told and "the same command goes on" in told and "Traceback" not in told
