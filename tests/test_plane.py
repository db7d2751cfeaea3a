"""The copy-quality plane holds every audit that has a place in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from audits import COPIES, FEW, make_audit, make_fidelity
from PIL import Image

from ret_fl.audit.plane import plane_features, plane_figure, plane_points
from ret_fl.audit.schema import Interval


def test_the_plane_holds_every_audit_that_has_a_place(tmp_path: Path) -> None:
    bare = make_audit("bare", fidelity=[])
    stops = [make_audit(f"stop {i}", Interval(value=i / 20, low=i / 21, high=i / 19)) for i in range(4)]
    figure = plane_figure([make_audit("$own$", FEW), bare], make_audit("base"), stops)
    figure.savefig(tmp_path / "plane.png")
    assert Image.open(tmp_path / "plane.png").size[0] > 600
    for axes in figure.axes:
        labels = [text.get_text() for text in axes.texts]
        assert {"$own$", "base", "stop 0", "stop 3"} <= set(labels) and "bare" not in labels
        assert any("good" in label for label in labels)
        low, high = axes.get_xlim()
        assert low == 0 and high >= COPIES.high
    assert len(plane_points([bare], make_fidelity())) == 0
    with pytest.raises(ValueError, match="audit with a reference set"):
        plane_figure([bare], None, [])


def test_features_of_another_training_of_the_classifier_have_no_place_beside_these() -> None:
    one, other = make_fidelity(recipe="a"), make_fidelity(recipe="b")
    audits = [make_audit(str(i), fidelity=[f]) for i, f in enumerate([other, one, one])]
    features = plane_features(audits)
    assert features == one
    assert [p.label for p in plane_points(audits, features)] == ["1", "2"]
    assert len(plane_points(audits, make_fidelity())) == 3  # an older audit knows the name alone
