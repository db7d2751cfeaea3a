"""The copy audit counts every copy, nothing else, and does not depend on how it is computed."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from ret_fl.audit import distances, schema
from ret_fl.audit.replication import (
    PAPER_TAUS,
    CopyReport,
    Variant,
    calibrated_ratio,
    carlini_ratio,
    copy_rate,
    copy_report,
    deduplicate,
    excess,
    memorized_quantity,
    nearest,
    neighbour_ratio,
    replication,
    wilson_interval,
)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gap = queries.double().flatten(1)[:, None] - points.double().flatten(1)[None]
    found, index = gap.square().sum(-1).sort(dim=1, stable=True)
    return found[:, :k], index[:, :k]


def digits() -> Tensor:
    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor, Tensor]:
    images = digits()
    return images[:200], images[200:400], images[400:]


SETS = {
    "random": (noise(0, 37, 3, 16, 16), noise(1, 300, 3, 16, 16)),
    "near-duplicates": (noise(1, 200, 3, 16, 16)[:40] + 1e-4 * noise(2, 40, 3, 16, 16), noise(1, 200, 3, 16, 16)),
    "one crowded image": (noise(3, 5, 1, 8, 8), noise(4, 1, 1, 8, 8) + 1e-4 * noise(5, 400, 1, 8, 8)),
    "constant": (torch.full((4, 1, 8, 8), 0.5), torch.full((90, 1, 8, 8), 0.5)),
    "grey levels": (torch.linspace(0, 1, 9)[:, None].expand(9, 64), torch.linspace(0, 1, 101)[:, None].expand(101, 64)),
    "double": (noise(6, 20, 64).double(), noise(7, 90, 64).double()),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [1, 7, 50])
def test_distances_equal_a_float64_brute_force(name: str, k: int) -> None:
    queries, points = SETS[name]
    found, index = nearest(queries, points, k)
    expected, expected_index = brute_force(queries, points, k)
    assert found.dtype == torch.float64
    assert index.dtype == torch.int64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
    if name in ("random", "near-duplicates", "constant", "double"):
        assert torch.equal(index, expected_index)


def test_a_copy_is_at_distance_exactly_zero_and_ties_go_to_the_first() -> None:
    points = noise(0, 500, 3072)
    twice = torch.cat([points, points])
    found, index = nearest(points[:50], twice, 2)
    assert torch.equal(found, torch.zeros(50, 2, dtype=torch.float64))
    assert torch.equal(index, torch.stack([torch.arange(50), torch.arange(50) + 500], 1))


def test_more_ties_than_spare_candidates_still_go_to_the_lowest_indices() -> None:
    points = torch.cat([noise(0, 60, 64), torch.zeros(200, 64)])
    _, index = nearest(torch.zeros(3, 64), points, 5)
    assert torch.equal(index, torch.arange(60, 65).expand(3, 5))


@given(
    seed=st.integers(0, 2**16), memory_mb=st.sampled_from([1, 2, 1024]), tile=st.integers(1, 60), k=st.integers(1, 9)
)
@settings(max_examples=25, deadline=None)
def test_neither_tiles_nor_order_change_the_answer(seed: int, memory_mb: int, tile: int, k: int) -> None:
    queries, points = noise(seed, 17, 48), noise(seed + 1, 130, 48)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(seed))
    found, index = nearest(queries, points, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "MAX_TILE", (tile, 2 * tile))
        patch.setattr(distances, "CACHE_ELEMENTS", 40 * tile)
        tiled, tiled_index = nearest(queries, points[order], k, memory_mb=memory_mb)
    assert torch.equal(tiled, found)
    assert torch.equal(order[tiled_index], index)


def test_a_product_in_low_precision_changes_nothing() -> None:
    queries, points = SETS["random"]
    expected = nearest(queries, points, 50)
    torch.set_float32_matmul_precision("medium")
    try:
        found = nearest(queries, points, 50)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_uint8_and_numpy_images_are_the_same_images() -> None:
    whole = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    found, index = nearest(whole[:5], torch.from_numpy(whole).float() / 255, 3)
    assert torch.equal(found[:, 0], torch.zeros(5, dtype=torch.float64))
    assert index[:, 0].tolist() == [0, 1, 2, 3, 4]


@given(seed=st.integers(0, 2**16), levels=st.sampled_from([1, 2, 256]), memory_mb=st.sampled_from([1, 64, 1024]))
@settings(max_examples=20, deadline=None)
def test_uint8_images_give_the_bits_that_floats_give(seed: int, levels: int, memory_mb: int) -> None:
    rng = np.random.default_rng(seed)
    queries, points = (torch.from_numpy(rng.integers(0, levels, (n, 3, 5, 4), np.uint8)) for n in (13, 150))
    points[100:140] = queries[0]
    points[100:140, 0, 0, 0] ^= torch.arange(40, dtype=torch.uint8) // 20
    found, index = nearest(queries, points, 7, memory_mb=memory_mb)
    as_floats, float_index = nearest(queries.float() / 255, points.float() / 255, 7)
    assert torch.equal(found, as_floats)
    assert torch.equal(index, float_index)
    torch.testing.assert_close(found, brute_force(queries / 255.0, points / 255.0, 7)[0], rtol=1e-5, atol=1e-12)


def test_half_precision_images_are_compared_as_floats() -> None:
    queries, points = noise(0, 9, 64).half(), noise(1, 120, 64).half()
    found, _ = nearest(queries, points, 3)
    torch.testing.assert_close(found, brute_force(queries, points, 3)[0], rtol=1e-5, atol=1e-12)


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


PEAK = """
import torch
from ret_fl.audit.replication import neighbour_ratio

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

torch.set_num_threads(1)
train = torch.randint(0, 256, (40000, 3072), dtype=torch.uint8)
train[7] = train[3]
neighbour_ratio(train[:64], train[:300], memory_mb=32)  # what the libraries load once
before = kilobytes("VmRSS")
neighbour_ratio(train[:64], train, memory_mb=32)
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
def test_a_large_uint8_set_is_never_held_as_floats() -> None:
    # The set is 117 MB, a float copy would be 469 MB more and a copy without the duplicate 117.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32 + 48


def test_deduplicate_keeps_first_occurrences() -> None:
    images = noise(0, 6, 1, 8, 8)
    assert deduplicate(images[[3, 1, 3, 0, 1, 5]]).tolist() == [0, 1, 3, 5]
    assert deduplicate(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1e-6, 1.0]])).tolist() == [0, 2]


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


def test_a_report_without_canaries_leaves_them_out(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    report = copy_report(held_out[:50], train, reference)
    assert report.canary_rate is report.ordinary_rate is report.canary_hits is None


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Content moves down and right by up to a pixel; the edge is repeated, as `grid_sample` with border padding."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[2:]
    return padded[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


STEPS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]


def test_shifted_copies_are_found_by_the_shift_variant_alone(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    copies = torch.cat([moved(train[i::8], *step) for i, step in enumerate(s for s in STEPS if s != (0, 0))])
    originals = torch.cat([torch.arange(i, 200, 8) for i in range(8)])
    copies = (copies + 0.02 * noise(0, *copies.shape)).clamp(0, 1)
    raw, shifted = (copy_report(copies, train, reference, variant=v) for v in ("pixels", "shift"))
    assert raw.rate < 0.05
    assert shifted.rate == 1.0
    assert torch.equal(shifted.index, originals)
    assert copy_report(held_out, train, reference, variant="shift").rate < 0.03


def test_mirrored_copies_are_found_by_the_flip_variant_alone(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    raw, flipped = (copy_report(train[:60].flip(3), train, reference, variant=v) for v in ("pixels", "flip"))
    # 0 and 8 may be their own mirror images
    assert raw.rate < 0.25
    assert flipped.rate == 1.0
    assert torch.equal(flipped.distance, torch.zeros(60, dtype=torch.float64))
    assert torch.equal(flipped.index, torch.arange(60))
    assert copy_report(held_out, train, reference, variant="flip").rate < 0.03


@pytest.mark.parametrize("variant", ["shift", "flip"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 2), (2, 1, 6)])
def test_moved_distances_equal_a_brute_force_over_all_positions(variant: Variant, shape: tuple[int, int, int]) -> None:
    generated, train, reference = (noise(i, n, *shape) for i, n in enumerate((40, 60, 60)))

    def closest(points: Tensor) -> tuple[Tensor, Tensor]:
        versions = [moved(points, *step) for step in STEPS] if variant == "shift" else [points, points.flip(3)]
        gaps = [generated.double().flatten(1)[:, None] - v.double().flatten(1) for v in versions]
        return torch.stack([gap.square().sum(-1) for gap in gaps]).amin(0).min(1)

    report = copy_report(generated, train, reference, variant=variant)
    torch.testing.assert_close(report.distance, closest(train)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(report.ratio, closest(train)[0] / closest(reference)[0], rtol=1e-5, atol=0)
    assert torch.equal(report.index, closest(train)[1])


def test_an_image_that_both_sets_hold_in_some_position_is_no_copy(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, _ = real
    reference = torch.cat([train[:1].flip(3), reference[1:]])
    assert copy_report(train[:2], train, reference, variant="flip").ratio.tolist() == [1.0, 0.0]


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


def audited(real: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Samples of which 20 copy (8 of them two canaries, 6 of them shifted), training, reference, held-out, canaries."""
    train, reference, held_out = real
    repeated = torch.cat([train, train[[3, 7]].repeat(4, 1, 1, 1)])
    canaries = torch.tensor([[3, 200, 202, 204, 206], [7, 201, 203, 205, 207]])
    copies = torch.cat([train[[3] * 6 + [7] * 2], train[20:26] + 0.01, moved(train[30:36], 1, -1)])
    return torch.cat([held_out[:80], copies]), repeated, reference, held_out[80:], canaries


def test_replication_holds_what_each_score_says_alone(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    found, details = replication(generated, train, reference, held_out, canaries, worst=5)
    assert found == schema.Replication.model_validate_json(found.model_dump_json())
    assert [entry.variant for entry in found.copy_rates] == ["pixels", "shift", "flip"]
    for entry in found.copy_rates:
        report = copy_report(generated, train, reference, variant=entry.variant, canaries=canaries)
        floor = copy_report(held_out, train, reference, variant=entry.variant)
        assert (entry.rate.value, entry.rate.low, entry.rate.high) == (report.rate, report.low, report.high)
        assert entry.floor == schema.Interval(value=floor.rate, low=floor.low, high=floor.high)
        assert entry.above_floor is not None
        assert (entry.above_floor.value, entry.above_floor.low, entry.above_floor.high) == excess(report, floor)
        assert (entry.distinct, entry.canary, entry.ordinary) == (
            report.distinct,
            report.canary_rate,
            report.ordinary_rate,
        )
        assert torch.equal(details.generated.reports[entry.variant].ratio, report.ratio)
        assert torch.equal(details.generated.reports[entry.variant].index, report.index)
    ratio, index = neighbour_ratio(generated, train)
    assert found.k == 50
    assert {entry.tau: entry.generated for entry in found.memorized} == memorized_quantity(ratio)
    floors = memorized_quantity(neighbour_ratio(held_out, train)[0])
    assert {entry.tau: entry.floor for entry in found.memorized} == floors
    (carlini,) = found.carlini
    assert carlini.alpha == 0.5
    assert carlini.generated == float((carlini_ratio(generated, train)[0] <= 1).double().mean())
    assert carlini.floor == float((carlini_ratio(held_out, train)[0] <= 1).double().mean())
    assert found.distance == pytest.approx(brute_force(generated, train, 1)[0].quantile(0.5).item())
    assert found.held_out_distance == pytest.approx(brute_force(held_out, train, 1)[0].quantile(0.5).item())
    assert torch.equal(details.generated.index, index)
    assert torch.equal(details.generated.neighbour_ratio, ratio)


def test_replication_counts_canaries_and_shifted_copies(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    found, _ = replication(generated, train, reference, held_out, canaries)
    raw, shifted, _ = found.copy_rates
    assert raw.canary_hits == shifted.canary_hits == [6, 2]
    assert raw.canary == pytest.approx(0.08)
    assert 0.14 <= raw.rate.value < 0.18
    assert 0.2 <= shifted.rate.value < 0.24
    assert raw.above_floor is not None
    assert raw.above_floor.low > 0.05


def test_the_worst_copies_are_one_for_each_training_image(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    found, _ = replication(generated, train, reference, held_out, canaries, worst=8)
    assert [copy.train for copy in found.worst[:2]] == [3, 7]
    assert {copy.train for copy in found.worst[2:]} == set(range(20, 26))
    assert [copy.sample for copy in found.worst[:2]] == [80, 86]
    assert [copy.ratio for copy in found.worst] == sorted(copy.ratio for copy in found.worst)
    assert found.worst[0].distance == found.worst[0].ratio == 0.0
    assert len(replication(generated, train, reference, held_out, canaries, worst=1000)[0].worst) < 100


def test_replication_without_reference_held_out_or_canaries(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, _, _, _ = audited(real)
    found, details = replication(generated, train, None, None, None)
    assert found.copy_rates == []
    assert details.held_out is found.held_out_distance is None
    assert {entry.floor for entry in found.memorized} == {None}
    assert [copy.train for copy in found.worst[:2]] == [3, 7]
    assert {copy.ratio for copy in found.worst} == {None}
    empty, _ = replication(generated, train, real[1], None, torch.zeros(0, 5, dtype=torch.int64))
    assert empty.copy_rates[0].canary is empty.copy_rates[0].canary_hits is empty.copy_rates[0].floor is None


def test_uint8_sets_are_audited_like_floats(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    whole = [(images * 255).round().to(torch.uint8) for images in (generated, train, reference, held_out)]
    floats = [images.float() / 255 for images in whole]
    found, _ = replication(whole[0].numpy(), *whole[1:], canaries, memory_mb=2)
    assert found == replication(*floats, canaries)[0]


def test_few_training_images_need_a_smaller_k(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    few = train[:24], reference[:24], held_out[:50], None
    with pytest.raises(
        ValueError, match=r"k must lie in 1\.\.24, the number of distinct training images, got 50: lower k"
    ):
        replication(train[:9], *few)
    with pytest.warns(UserWarning, match="only 24 distinct training images: .* k = 24"):
        found, _ = replication(train[:9], *few, k=None)
    assert found.k == 24
    assert replication(train[:9], train, None, None, None, k=None)[0].k == 50


def test_held_out_images_that_are_training_images_are_reported(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.warns(UserWarning, match="2 of 52 held-out images are also training images"):
        replication(held_out, train, reference, torch.cat([held_out[:50], train[:2]]), None)


def test_grey_columns_are_not_mirrored() -> None:
    sets = [noise(i, 60, 1, 8, 1) for i in range(3)]
    assert [entry.variant for entry in replication(*sets, None, None)[0].copy_rates] == ["pixels", "shift"]


def test_images_that_cannot_move_are_refused() -> None:
    flat = [noise(i, 60, 64) for i in range(3)]
    with pytest.raises(ValueError, match=r"'shift' moves images \[N, C, H, W\].*train are \[N, 64\]"):
        copy_report(*flat, variant="shift")
    with pytest.raises(ValueError, match="W >= 2"):
        copy_report(*(images[:, None, :, None] for images in flat), variant="flip")
    with pytest.raises(ValueError, match="one of pixels, shift, flip, got 'rotate'"):
        copy_report(*flat, variant="rotate")  # type: ignore[arg-type]


def test_no_copies_still_leave_an_upper_bound() -> None:
    low, high = wilson_interval(0, 100)
    assert low == 0.0
    assert high == pytest.approx(0.0370, abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_a_reference_that_holds_training_images_is_refused(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.raises(ValueError, match="shares 1 images"):
        copy_rate(held_out, train, torch.cat([reference[1:], train[:1]]))


def test_a_reference_of_another_size_is_reported(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.warns(UserWarning, match="200 distinct images, reference 150"):
        copy_rate(held_out, torch.cat([train, train]), reference[:150])


def test_a_mixed_value_range_is_reported(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.warns(UserWarning, match=r"generated range over -1\.\.1"):
        copy_rate(2 * held_out - 1, train, reference)


@pytest.mark.parametrize(
    ("queries", "points", "k", "message"),
    [
        (noise(0, 4, 64), noise(1, 9, 32), 1, "64 values each and points 32"),
        (noise(0, 4, 64), noise(1, 9, 64), 10, r"k must lie in 1\.\.9"),
        (noise(0, 4, 64), noise(1, 9, 64), 0, r"k must lie in 1\.\.9"),
        (noise(0, 4, 64) / 0, noise(1, 9, 64), 1, "queries hold NaN or infinity in 4 of 4"),
        (noise(0, 4, 64), torch.full((3, 64), torch.nan), 1, "points hold NaN or infinity in 3 of 3"),
        (torch.zeros(0, 64), noise(1, 9, 64), 1, "non-empty"),
        (torch.zeros(4, 64, dtype=torch.int64), noise(1, 9, 64), 1, "float in .* or uint8, got torch.int64"),
    ],
)
def test_bad_images_are_refused(queries: Tensor, points: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest(queries, points, k)


def test_k_counts_distinct_training_images() -> None:
    with pytest.raises(ValueError, match="number of distinct training images, got 50"):
        neighbour_ratio(noise(0, 3, 64), noise(1, 30, 64).repeat(4, 1))


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
    with pytest.raises(ValueError, match="worst must be >= 0"):
        replication(held_out, train, None, None, None, worst=-1)
    with pytest.raises(ValueError, match="held_out have 49 values each and train 64"):
        replication(held_out, train, None, held_out[:, :, 1:, 1:], None)
    with pytest.raises(ValueError, match="no NaN"):
        memorized_quantity(torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="memory_mb"):
        nearest(held_out, train, 1, memory_mb=0)
