"""The copy audit counts every copy, nothing else, and does not depend on how it is computed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from ret_fl.audit import distances
from ret_fl.audit.replication import (
    PAPER_TAUS,
    calibrated_ratio,
    carlini_ratio,
    copy_rate,
    copy_report,
    deduplicate,
    memorized_quantity,
    nearest,
    neighbour_ratio,
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
    with pytest.raises(ValueError, match="no NaN"):
        memorized_quantity(torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="memory_mb"):
        nearest(held_out, train, 1, memory_mb=0)
