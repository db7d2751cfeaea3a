"""The copy-quality plane holds every audit that has a place in it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from audits import COPIES, FEW, make_audit, make_fidelity
from matplotlib.text import Text
from PIL import Image

from ret_fl.audit.plane import plane_features, plane_figure, plane_panel, plane_points
from ret_fl.audit.schema import Audit, Interval


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
        assert low < 0 and high >= COPIES.high  # a point at 0 is whole
        assert "stop 1" not in labels and "stop 2" not in labels  # the curve says its order by its ends
    assert len(plane_points([bare], make_fidelity())) == 0
    with pytest.raises(ValueError, match="audit with a reference set"):
        plane_figure([bare], None, [])


def stop(name: str, rate: float, frechet: float, precision: float) -> Audit:
    share = Interval(value=rate, low=0.8 * rate, high=1.2 * rate + 0.002)
    return make_audit(name, share, fidelity=[make_fidelity(frechet=frechet, precision=precision)])


def test_what_training_images_score_is_within_the_plane() -> None:
    for figure in (plane_panel(q, [make_audit("own", FEW)], make_audit("base"), []) for q in ("frechet", "precision")):
        (axes,) = figure.axes
        (real,) = [line for line in axes.lines if line.get_label() == "training images"]
        low, high = axes.get_ylim()
        assert low < real.get_ydata()[0] < high  # type: ignore[index]


def test_a_model_at_the_end_of_the_curve_is_drawn_once() -> None:
    stops = [stop("round 1", 0.0, 40, 0.1), stop("round 2", 0.01, 20, 0.3), stop("round 3", 0.1, 15, 0.5)]
    whole = stops[2].model_copy(update={"model": stops[2].model.model_copy(update={"name": "central"})})
    for base in (whole, None):
        own = [stop("own", 0.005, 12, 0.6), whole]
        (axes,) = plane_panel("frechet", own, base, stops).axes
        labels = [text.get_text() for text in axes.texts]
        assert labels.count("central") == 1 and "round 3" not in labels and {"own", "round 1"} <= set(labels)
        (curve,) = [line for line in axes.lines if line.get_label() == "one training, stopped early"]
        assert curve.get_markevery() == [0, 1] and len(np.asarray(curve.get_xdata())) == 3


def test_labels_of_close_points_hide_neither_each_other_nor_a_point() -> None:
    stops = [stop(f"central, round {i}", 0.001 * i, 12 + 0.05 * i, 0.5 + 0.005 * i) for i in range(3)]
    figure = plane_panel("frechet", [stop("own", 0.0015, 12, 0.5), stop("second", 0, 12.02, 0.5)], None, stops)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = axes.transData.transform([(0.0015, 12), (0, 12.02), (0, 12), (0.001, 12.05), (0.002, 12.1)])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_features_of_another_training_of_the_classifier_have_no_place_beside_these() -> None:
    one, other = make_fidelity(recipe="a"), make_fidelity(recipe="b")
    audits = [make_audit(str(i), fidelity=[f]) for i, f in enumerate([other, one, one])]
    features = plane_features(audits)
    assert features == one
    assert [p.label for p in plane_points(audits, features)] == ["1", "2"]
    assert len(plane_points(audits, make_fidelity())) == 3  # an older audit knows the name alone
