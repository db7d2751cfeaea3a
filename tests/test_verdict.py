"""The verdict claims what the intervals allow, and says what speaks against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from audits import COPIES, FEW, make_audit, make_fidelity, make_rate, make_replication, on_other_data
from hypothesis import given
from hypothesis import strategies as st

from ret_fl.audit.members import are_exposed
from ret_fl.audit.replication import CopyReport, count_copies, excess
from ret_fl.audit.schema import Exposure, Fingerprints, Interval, Leakage, Membership
from ret_fl.audit.verdict import Finding, judge, verdict


def test_copies_above_the_floor() -> None:
    text = verdict(make_audit(), None)
    assert text.startswith("Samples of central copy training images: 25.2 % (95 % interval 22.6 to 28.0 %) of 1,000")
    assert "0.64 % (0.34 to 1.22 %) of real images" in text


def test_no_copies_above_the_floor() -> None:
    text = verdict(make_audit(rate=FEW), None)
    assert text.startswith("No copying beyond chance shows")
    assert "copy training images" not in text


def test_copies_only_in_a_variant_are_not_missed() -> None:
    rates = [make_rate(FEW), make_rate(COPIES, variant="shift")]
    text = verdict(make_audit(replication=make_replication(rates)), None)
    assert "copy training images: 25.2 %" in text and "moved by a pixel" in text


def test_weak_evidence_is_called_weak() -> None:
    rate = make_rate(Interval(value=0.016, low=0.0099, high=0.0258),
                     above_floor=Interval(value=0.0096, low=0.0005, high=0.02))  # fmt: skip
    assert "evidence is weak" in verdict(make_audit(replication=make_replication([rate])), None)


def test_without_reference_there_is_no_verdict() -> None:
    text = verdict(make_audit(replication=make_replication([])), make_audit("base"))
    assert "cannot be told" in text and "add --reference" in text


def report(hits: int, total: int) -> CopyReport:
    """Of `total` images the first `hits` are copies."""
    copied = torch.arange(total) < hits
    to_train = (torch.where(copied, 0.1, 1.0), torch.zeros(total, dtype=torch.int64))
    return count_copies(to_train, (torch.ones(total), to_train[1]), 0.3, None)


@pytest.mark.parametrize(
    ("samples", "hits", "held_out", "chance", "finding"),
    [
        (100, 34, 6, 1, Finding.UNKNOWN),  # far above the floor, which is 3 to 56 %
        (1000, 77, 30, 1, Finding.UNKNOWN),
        (60, 0, 30, 1, Finding.UNKNOWN),
        (20, 0, 1397, 9, Finding.UNKNOWN),  # 16 % of samples may be copies
        (1000, 0, 6, 0, Finding.NONE),  # whatever the floor, below 0.4 % are copies
        (1000, 6, 359, 4, Finding.NONE),
        (100, 1, 1397, 9, Finding.NONE),
        (300, 2, 1397, 9, Finding.NONE),
        (1000, 990, 1000, 990, Finding.UNKNOWN),  # every real image counts as a copy
        (100, 34, 30, 1, Finding.COPIES),
    ],
)
def test_no_copies_are_said_only_where_some_would_have_been_seen(
    samples: int, hits: int, held_out: int, chance: int, finding: Finding
) -> None:
    drawn, real = report(hits, samples), report(chance, held_out)
    rate, floor, above = (
        Interval(value=value, low=low, high=high)
        for value, low, high in ((drawn.rate, drawn.low, drawn.high), (real.rate, real.low, real.high),
                                 excess(drawn, real))
    )  # fmt: skip
    own = make_rate(rate, floor=floor, above_floor=above)
    audit = make_audit(samples=samples, replication=make_replication([own]), leakage=None)
    found, text = judge(audit)
    assert found is finding
    assert ("could go unseen" in text) is (finding is Finding.UNKNOWN)


def test_without_held_out_images_the_floor_is_missing() -> None:
    rate = make_rate(COPIES, floor=None, above_floor=None)
    text = verdict(make_audit(replication=make_replication([rate])), None)
    assert text.startswith("Whether") and "without held-out images" in text


@pytest.mark.parametrize(("samples", "said"), [(999, True), (1000, False)])
def test_few_samples_are_said(samples: int, said: bool) -> None:
    assert ("are few" in verdict(make_audit(samples=samples), None)) is said


@pytest.mark.parametrize(("distance", "said"), [(4.1, True), (3.9, False)])
def test_a_model_that_hardly_learned_is_said(distance: float, said: bool) -> None:
    replication = make_replication([make_rate(FEW)], distance=distance, held_out_distance=2.0)
    text = verdict(make_audit(replication=replication), None)
    assert ("hardly learned" in text) is said
    assert ("a low copy rate says little" in text) is said
    assert text.startswith("central has hardly learned to draw: samples lie 2.0 times") is said


@pytest.mark.parametrize(
    ("precision", "real", "said"), [(0.08, 0.91, True), (0.1, 0.91, False), (0.09, None, True), (0.0, 0.9, True)]
)
def test_without_precision_a_model_has_hardly_learned(precision: float, real: float | None, said: bool) -> None:
    fidelity = [make_fidelity(precision=precision, real_precision=real)]
    finding, text = judge(make_audit(rate=FEW, fidelity=fidelity))
    assert (finding is Finding.UNLEARNED) is said
    assert ("hardly learned to draw: precision is" in text) is said
    finding, text = judge(make_audit(fidelity=fidelity))
    assert finding is Finding.COPIES and ("so the model has hardly learned" in text) is said


def membership(attack: str, value: float, low: float) -> Membership:
    auc = Interval(value=value, low=low, high=2 * value - low)
    return Membership(attack=attack, members=200, non_members=200, auc=auc, tpr_at_1_percent=FEW,
                      tpr_at_01_percent=FEW)  # fmt: skip


@pytest.mark.parametrize(
    ("attacks", "exposures", "said"),
    [
        ([("loss", 0.55, 0.49), ("pia", 0.88, 0.86)], [1.0, 1.5], "AUC 0.880 (0.860 to 0.900) by PIA"),
        ([("loss", 0.7, 0.65), ("pia", 0.6, 0.55)], [], "AUC 0.700 (0.650 to 0.750) by loss"),
        ([("loss", 0.54, 0.49), ("pia", 0.45, 0.4)], [0.4, 5.2, 2.1, 1.2, 3.1], None),
        ([], [10.2, 6.6, 4.3, 4.8, 6.8], "canaries are exposed by 6.54 bits"),
    ],
)
def test_members_told_apart_are_said_and_not_green(
    attacks: list[tuple[str, float, float]], exposures: list[float], said: str | None
) -> None:
    exposure = Exposure(exposures=exposures, mean=float(np.mean(exposures)), most=10.2) if exposures else None
    leakage = Leakage(membership=[membership(*a) for a in attacks], exposure=exposure, duplicates=None)
    finding, text = judge(make_audit(rate=FEW, leakage=leakage))
    assert finding is (Finding.TELLS if said else Finding.NONE)
    assert ("tells members apart" in text) is bool(said)
    assert said is None or said in text
    finding, text = judge(make_audit(leakage=leakage))
    assert finding is Finding.COPIES and ("told from others" in text) is bool(said)


@pytest.mark.parametrize("count", [1, 5, 100])
def test_canaries_never_trained_on_are_rarely_called_exposed(count: int) -> None:
    ranks = np.random.default_rng(0).uniform(size=(4000, count))
    means = -np.log2(ranks)
    called = [are_exposed(Exposure(exposures=list(row), mean=row.mean(), most=99)) for row in means]
    assert np.mean(called) == pytest.approx(0.025, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (FEW, "that is fewer copies than the baseline base, 25.2 % (22.6 to 28.0 %)"),
        (Interval(value=0.40, low=0.37, high=0.43), "that is more copies than the baseline base"),
        (Interval(value=0.22, low=0.195, high=0.2265), "no clear difference"),
        (Interval(value=0.30, low=0.2799, high=0.33), "no clear difference"),
    ],
)
def test_baselines_differ_only_beyond_their_intervals(rate: Interval, words: str) -> None:
    text = verdict(make_audit("own", rate), make_audit("base"))
    assert words in text
    assert sum(said in text for said in ("fewer copies", "more copies", "no clear difference")) == 1


def test_fewer_copies_at_worse_quality_may_be_less_training() -> None:
    worse = make_audit("own", FEW, fidelity=[make_fidelity(frechet=12.8)])
    assert "worse (12.8 against 10.7), so it may in part be less trained" in verdict(worse, make_audit("base"))
    other_features = make_audit("own", FEW, fidelity=[make_fidelity(frechet=12.8, features="inception")])
    assert "less trained" not in verdict(other_features, make_audit("base"))
    assert "less trained" not in verdict(make_audit("own", FEW), make_audit("base"))


def test_a_baseline_without_the_same_rate_cannot_be_compared() -> None:
    base = make_audit("base", replication=make_replication([make_rate(COPIES, threshold=0.2)]))
    assert "no copy rate to compare with" in verdict(make_audit("own"), base)
    assert "baseline" not in verdict(make_audit(), make_audit())


def test_a_baseline_of_other_data_is_not_compared() -> None:
    """Fewer copies of easier data are no merit of the model. Old audits tell data apart by their counts."""
    prints = [Fingerprints(train=name, reference="r", held_out="h") for name in "ab"]
    own, base = make_audit("own", FEW), make_audit("base")
    for changed in (on_other_data(base), on_other_data(base, distinct=199)):
        text = verdict(own, changed)
        assert "base was audited against other images" in text and "fewer" not in text
    own = on_other_data(own, fingerprints=prints[0])
    assert "fewer" in verdict(own, base)
    assert "fewer" in verdict(own, on_other_data(base, fingerprints=prints[0], source="the same, elsewhere"))
    assert "other images" in verdict(own, on_other_data(base, fingerprints=prints[1]))


@given(
    hits=st.integers(0, 1000), floor=st.integers(0, 1000), samples=st.sampled_from([10, 500, 1000, 50000]),
    base=st.none() | st.integers(0, 1000),
)  # fmt: skip
def test_a_verdict_is_one_sentence(hits: int, floor: int, samples: int, base: int | None) -> None:
    def share(of: int) -> Interval:
        return Interval(value=of / 1000, low=max(0, of / 1000 - 0.02), high=min(1, of / 1000 + 0.02))

    rate = make_rate(share(hits), floor=share(floor))
    audit = make_audit(samples=samples, replication=make_replication([rate]))
    text = verdict(audit, None if base is None else make_audit("base", share(base)))
    assert text.endswith(".") and ". " not in text
    assert ("copy training images: " in text) is (rate.rate.low > share(floor).high)
