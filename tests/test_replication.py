"""The copy audit counts every copy, nothing else, and does not depend on how it is computed."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import brute_force, noise
from torch import Tensor

from ret_fl.audit.copies import replication
from ret_fl.audit.replication import (
    PAPER_TAUS,
    CopyReport,
    calibrated_ratio,
    carlini_ratio,
    copy_rate,
    copy_report,
    excess,
    memorized_quantity,
    neighbour_ratio,
    wilson_interval,
)


@pytest.mark.parametrize("memory_mb", [1, 16])
def test_every_score_is_the_same_in_a_megabyte(real: tuple[Tensor, Tensor, Tensor], memory_mb: int) -> None:
    train, reference, held_out = real
    twice = torch.cat([train, train])
    generated = torch.cat([train[:9] + 0.01, held_out[:30]])
    assert torch.equal(neighbour_ratio(generated, twice, memory_mb=memory_mb)[0], neighbour_ratio(generated, twice)[0])
    assert torch.equal(carlini_ratio(generated, twice, memory_mb=memory_mb)[0], carlini_ratio(generated, twice)[0])
    for variant in ("pixels", "shift"):
        small = copy_report(generated, twice, reference, variant=variant, memory_mb=memory_mb)
        large = copy_report(generated, twice, reference, variant=variant)
        assert torch.equal(small.ratio, large.ratio)
        assert torch.equal(small.index, large.index)


def test_an_exact_copy_has_ratio_zero_and_counts(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, _, _ = real
    ratio, index = neighbour_ratio(train[:20], train)
    assert torch.equal(ratio, torch.zeros(20, dtype=torch.float64))
    assert torch.equal(index, torch.arange(20))
    assert memorized_quantity(ratio) == dict.fromkeys(PAPER_TAUS, 1.0)


def test_a_copy_off_by_a_hundred_millionth_counts() -> None:
    # The reference parses 5.9e-08 from a file name as 5.9 and loses it (METHOD.md 6.1).
    train = noise(0, 100, 3, 8, 8)
    generated = train[:1].clone()
    generated[0, 0, 0, 0] += 4e-4
    ratio, _ = neighbour_ratio(generated, train)
    assert 1e-9 < ratio.item() < 1e-7
    assert memorized_quantity(ratio)[0.15] == 1.0


def test_the_ratio_is_the_minimum_over_the_mean_of_fifty(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, _, held_out = real
    ratio, index = neighbour_ratio(held_out[:100], train)
    squared, expected_index = brute_force(held_out[:100], train, 50)
    torch.testing.assert_close(ratio, squared[:, 0] / squared.mean(1), rtol=1e-6, atol=0)
    assert torch.equal(index, expected_index[:, 0])
    plain, _ = carlini_ratio(held_out[:100], train, alpha=0.5)
    torch.testing.assert_close(plain, squared[:, 0].sqrt() / (0.5 * squared.sqrt().mean(1)), rtol=1e-6, atol=0)


def test_duplicates_left_in_the_training_set_do_not_hide_copies(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, _ = real
    repeated = torch.cat([train[:5].repeat(50, 1, 1, 1), train])
    copies = train[:5] + 1e-3
    ratio, index = neighbour_ratio(copies, repeated)
    assert memorized_quantity(ratio)[0.15] == 1.0
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert copy_rate(copies, repeated, reference) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1), st.lists(st.floats(0, 1), min_size=2))
def test_memorized_quantity_grows_with_tau(ratios: list[float], taus: list[float]) -> None:
    shares = memorized_quantity(torch.tensor(ratios, dtype=torch.float64), sorted(taus))
    assert list(shares.values()) == sorted(shares.values())


def test_real_held_out_images_are_hardly_ever_copies(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    assert copy_rate(held_out, train, reference) < 0.03
    assert copy_rate(held_out, reference, train) < 0.03


def test_copies_are_counted_and_attributed(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    repeated = torch.cat([train, train[[3, 7]].repeat(9, 1, 1, 1)])
    canaries = torch.tensor([[3, *range(200, 218, 2)], [7, *range(201, 219, 2)]])
    fresh = held_out[calibrated_ratio(held_out, train, reference)[0] > 0.5][:85]
    generated = torch.cat([train[[3] * 6 + [7] * 2], train[20:27], fresh])
    report = copy_report(generated, repeated, reference, canaries=canaries)
    assert report.copied.tolist() == [True] * 15 + [False] * 85
    assert report.rate == pytest.approx(0.15)
    assert report.rate == copy_rate(generated, repeated, reference, threshold=0.3)
    assert report.low < 0.15 < report.high
    assert report.distinct == 9
    assert report.index[:8].tolist() == [3] * 6 + [7] * 2
    assert report.canary_hits is not None
    assert report.canary_hits.tolist() == [6, 2]
    assert report.canary_rate == pytest.approx(0.08)
    assert report.ordinary_rate == pytest.approx(0.07)


def test_canaries_whose_repeats_differ_are_each_one_image(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    noise = 0.02 * torch.randn(18, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    repeated = torch.cat([train, (train[[3, 7]].repeat(9, 1, 1, 1) + noise).clamp(0, 1)])
    canaries = torch.tensor([[3, *range(200, 218, 2)], [7, *range(201, 219, 2)]])
    fresh = held_out[calibrated_ratio(held_out, train, reference)[0] > 0.5][:80]
    generated = torch.cat([repeated[[3, 200, 202, 204]], repeated[[7, 217]], train[20:24], fresh])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 218 distinct training images are 200, as many as reference ones
        report = copy_report(generated, repeated, reference, canaries=canaries)
        found, _ = replication(generated, repeated, reference, held_out[80:], canaries)
    assert report.canary_hits is not None and report.canary_hits.tolist() == [4, 2]
    assert report.distinct == 6 and int(report.copied.sum()) == 10
    assert report.index[:6].tolist() == [3] * 4 + [7] * 2
    assert found.copy_rates[0].canary_hits == [4, 2] and found.copy_rates[0].distinct == 6
    listed = [worst.train for worst in found.worst]
    assert len(set(listed)) == len(listed) and 3 in listed and not any(row >= 200 for row in listed)
    with pytest.warns(UserWarning, match="train has 218 distinct images, reference 200"):
        copy_report(generated, repeated, reference)


def test_a_report_without_canaries_leaves_them_out(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    report = copy_report(held_out[:50], train, reference)
    assert report.canary_rate is report.ordinary_rate is report.canary_hits is None


def test_the_reported_distance_is_that_to_the_nearest_training_image(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    report = copy_report(held_out[:80], train, reference)
    assert report.distance.dtype == torch.float64
    torch.testing.assert_close(report.distance, brute_force(held_out[:80], train, 1)[0][:, 0], rtol=1e-6, atol=0)


def report_of(hits: int, total: int) -> CopyReport:
    low, high = wilson_interval(hits, total)
    copied = torch.arange(total) < hits
    return CopyReport(
        hits / total, low, high, hits, copied, (~copied).double(), torch.arange(total), (~copied).double()
    )


def test_excess_agrees_with_the_normal_interval_for_many_samples() -> None:
    value, low, high = excess(report_of(3000, 10000), report_of(500, 5000), bootstrap=20000)
    error = 1.96 * math.sqrt(0.3 * 0.7 / 10000 + 0.1 * 0.9 / 5000)
    assert value == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.2 - error, 0.2 + error), abs=4e-4)
    assert excess(report_of(30, 100), report_of(9, 90), seed=4) == excess(report_of(30, 100), report_of(9, 90), seed=4)


def test_excess_of_nothing_over_nothing_is_not_certain() -> None:
    value, low, high = excess(report_of(0, 100), report_of(0, 1000))
    assert value == 0.0
    assert high == pytest.approx(wilson_interval(0, 100)[1])
    assert low == pytest.approx(-wilson_interval(0, 1000)[1])


def test_excess_over_a_floor_without_hits_equals_newcombes_example() -> None:
    # Newcombe 1998, table II: 10/10 against 0/20 and 5/56 against 0/29, method 10
    assert excess(report_of(10, 10), report_of(0, 20)) == pytest.approx((1.0, 0.6791, 1.0), abs=1e-4)
    assert excess(report_of(5, 56), report_of(0, 29)) == pytest.approx((0.0893, -0.0381, 0.1926), abs=1e-4)


@given(st.integers(0, 40), st.integers(0, 30))
def test_excess_lies_within_its_interval(hits: int, floor_hits: int) -> None:
    value, low, high = excess(report_of(hits, 40), report_of(floor_hits, 30))
    assert -1 <= low <= value <= high <= 1
    assert low < high


def test_no_copies_still_leave_an_upper_bound() -> None:
    low, high = wilson_interval(0, 100)
    assert low == 0.0
    assert high == pytest.approx(0.0370, abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_bad_settings_are_refused(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.raises(ValueError, match="threshold must be > 0"):
        copy_rate(held_out, train, reference, threshold=0)
    with pytest.raises(ValueError, match="alpha must be > 0"):
        carlini_ratio(held_out, train, alpha=0)
    with pytest.raises(ValueError, match=r"canary rows must lie in 0\.\.199"):
        copy_report(held_out, train, reference, canaries=torch.tensor([[200]]))
    with pytest.raises(ValueError, match="bootstrap must be >= 1"):
        excess(report_of(1, 9), report_of(1, 9), bootstrap=0)
    with pytest.raises(ValueError, match="no NaN"):
        memorized_quantity(torch.tensor([torch.nan]))
