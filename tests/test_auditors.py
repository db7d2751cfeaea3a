"""Auditors, the plug-ins of the audit: what they add, and that one that fails loses nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ret_fl

from ret_fl.audit.folder import load_audit
from ret_fl.audit.inputs import AuditData, Evidence, Options
from ret_fl.audit.swapped import swapped
from ret_fl.auditing import audit_folder, audit_model, own_auditors, own_drawing
from ret_fl.data.store import SampleStore


def test_an_auditor_adds_its_numbers_to_audit_json_and_to_the_report(run_dir: Path, tmp_path: Path) -> None:
    answer = ret_fl(
        "audit", run_dir, "--auditor", "own_plugins:Count", "--auditor", "variety", "--out", tmp_path / "audit"
    )
    assert answer.exit_code == 0, answer.output
    audit, _ = load_audit(tmp_path / "audit")
    counted, variety = audit.added
    assert counted.values == {"samples": 12, "training images": 34, "parameters": audit.model.parameters}
    assert (counted.auditor, counted.about, counted.settings) == (
        "own_plugins:Count",
        "Counts images.",
        {"fail": False},
    )
    assert variety.source == "built-in" and all(value > 0 for value in variety.values.values())
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "By the auditor own_plugins:Count, by its path. Counts images." in page
    assert [name for name in (*counted.values, *variety.values) if name not in page] == []


def test_swapped_finds_no_copies_where_only_the_training_images_were_copied(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, reference = (rng.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8) for _ in range(2))
    data = AuditData("noise", SampleStore(np.repeat(train, 2, axis=0)), SampleStore(reference))
    copies = np.concatenate([train[:3], reference[:1], rng.integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)])
    samples = torch.from_numpy(copies).float() / 255
    told = swapped(Evidence(tmp_path, samples, data, lambda: None, Options()))
    assert told == {"copy rate": 3 / 8, "with both sets in each other's place": 1 / 8}
    with pytest.raises(ValueError, match="reference"):
        swapped(Evidence(tmp_path, samples, replace(data, reference=None), lambda: None, Options()))


def test_an_auditor_that_fails_is_a_warning_and_the_audit_stays(run_dir: Path, tmp_path: Path) -> None:
    options = Options(auditors="own_plugins:Count", auditor_options="fail = true")
    audit = audit_model(run_dir, out=tmp_path, options=options, leakage=False)
    assert audit.added == [] and audit.replication.copy_rates
    assert "the auditor own_plugins:Count failed: KeyError: 'nothing counted'" in audit.warnings


def test_other_auditors_than_the_runs_own_make_another_audit(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    flat = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(flat | {"audit.auditors": "variety"}))
    own = own_drawing(copy)
    assert own_auditors(copy, Options()).auditors == "variety"
    assert audit_folder(copy, own, own_auditors(copy, Options())) == copy / "audit"
    assert audit_folder(copy, own, Options()) == Path("audits/copy")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--auditor", "nowhere:X"], "audit.auditors: 'nowhere:X'"), (["--auditor-options", "a = 1"], "--auditor")],
)
def test_a_bad_auditor_is_refused_before_anything_is_drawn(
    run_dir: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    answer = ret_fl("audit", run_dir, "--out", tmp_path / "audit", *arguments)
    assert answer.exit_code == 1 and told in answer.output
    assert not (tmp_path / "audit").exists()
