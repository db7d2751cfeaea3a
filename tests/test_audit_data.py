"""Audits against real images: what they find in samples of which it is known, and which images they take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import EPSILON, trained

from ret_fl.audit.generate import Generated
from ret_fl.audit.inputs import AuditData
from ret_fl.audit.run import run_audit
from ret_fl.audit.similarity import similarity
from ret_fl.audit.verdict import Finding, judge
from ret_fl.auditing import Drawing, audit_model, draw, measure, open_data
from ret_fl.config import DataConfig
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import make_scheduler
from ret_fl.diffusion.sampling import save_pipeline


@pytest.fixture(scope="module")
def digits() -> AuditData:
    return open_data("digits")


def ready(images: torch.Tensor) -> Generated:
    return Generated(images, "images", "ready", None, None, None)


def test_real_images_never_trained_on_as_samples_score_the_floor(digits: AuditData) -> None:
    """The null: one half of the held-out images stands for samples, the other for the floor."""
    assert digits.held_out is not None
    first, second = torch.randperm(len(digits.held_out), generator=torch.Generator().manual_seed(0)).chunk(2)
    data = replace(digits, held_out=digits.held_out.subset(second))
    audit, _ = run_audit(Path("real"), ready(digits.held_out.unit(first)), data)
    finding, _ = judge(audit)
    assert finding is Finding.NONE
    for rate in audit.replication.copy_rates:
        assert rate.above_floor is not None and rate.floor is not None
        assert rate.above_floor.low <= 0 <= rate.above_floor.high
        assert rate.floor.value < 0.05


def test_a_model_that_memorized_its_images_is_found_to_copy_the_canaries_first(tmp_path: Path) -> None:
    """Twelve digits, two of them ten times, seen until little else is drawn."""
    splits = load_splits(DataConfig(limit=12))
    again = np.repeat([0, 1], 9)
    canaries = np.c_[[0, 1], 12 + np.arange(18).reshape(2, 9)]
    data = AuditData(
        "digits", splits.train.subset(np.r_[:12, again]), splits.reference, splits.held_out, canaries, one_split=True
    )
    save_pipeline(tmp_path / "model", trained(data.train, 200), make_scheduler(EPSILON), 1)
    generated = draw(tmp_path / "model", tmp_path / "audit", Drawing(samples=100, steps=25))
    audit, _ = measure(tmp_path / "model", generated, data, leakage=False)
    assert judge(audit)[0] is Finding.COPIES
    rate = audit.replication.copy_rates[0]
    assert rate.rate.value > 0.3
    assert rate.floor is not None and rate.floor.value < 0.1
    assert rate.canary is not None and rate.canary > 0.8 * rate.rate.value
    first, second, *_ = audit.replication.worst
    assert {first.train, second.train} == {0, 1}
    assert second.ratio is not None and second.ratio < 0.2


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


def halves(digits: AuditData, folder: Path) -> tuple[Path, Path]:
    """60 training and 60 other images, as .npy files."""
    for name in ("train", "others"):
        ids = np.arange(60) + 60 * (name == "others")
        np.save(folder / f"{name}.npy", digits.train.pixels(ids).numpy())
    return folder / "train.npy", folder / "others.npy"


def test_a_reference_no_larger_than_the_training_set_gives_a_floor(digits: AuditData, tmp_path: Path) -> None:
    train, others = halves(digits, tmp_path)
    data = open_data(train, others)
    assert data.reference is not None and data.held_out is not None
    assert (len(data.reference), len(data.held_out)) == (48, 12)
    assert not np.intersect1d(data.reference.content_hashes, data.held_out.content_hashes).size
    audit, _ = run_audit(tmp_path, ready(data.train.unit(np.arange(20))), data)
    assert audit.replication.copy_rates[0].floor is not None
    assert any("equal size" in w for w in audit.warnings)


def test_a_reference_beside_held_out_images_is_taken_whole(digits: AuditData, tmp_path: Path) -> None:
    assert digits.reference is not None
    train, others = halves(digits, tmp_path)
    np.save(tmp_path / "more.npy", digits.reference.pixels(np.arange(30)).numpy())
    data = open_data(train, others, tmp_path / "more.npy")
    assert data.reference is not None and data.held_out is not None
    assert (len(data.reference), len(data.held_out)) == (60, 30)


def test_a_folder_is_preferred_to_a_built_in_source_of_its_name(
    digits: AuditData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(open_data("digits").train) == len(digits.train)
    Path("digits").mkdir()
    Image.fromarray(digits.train.pixels(np.arange(1))[0, 0].numpy()).save("digits/one.png")
    assert len(open_data("digits").train) == 1


class Counting:
    """Features that are pixels, and how many images they were asked for."""

    name = "counting"
    seen = 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1).float()


def test_an_image_model_sees_every_image_once(digits: AuditData) -> None:
    held_out = digits.reference.subset(np.arange(60))  # type: ignore[union-attr]
    data = AuditData("digits", digits.train.subset(np.array([*range(80), 3, 3])), None, held_out)
    model, generated = Counting(), digits.train.unit(np.arange(100, 170))
    audit, _ = run_audit(Path("x"), ready(generated), data, feature_models=[model])
    assert model.seen == 80 + 60 + 70
    own, train, floor = (s.flatten(1).float() for s in (generated, data.train.pixels(), held_out.pixels()))
    assert audit.similarity == [similarity(own, train, floor, name="counting")]


def test_a_store_of_one_size_only(digits: AuditData) -> None:
    grey = SampleStore(torch.zeros(5, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"16x16.*--image-size"):
        run_audit(Path("x"), ready(digits.train.unit(np.arange(5))), AuditData("grey", grey))
