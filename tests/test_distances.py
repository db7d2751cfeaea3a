"""The nearest images are those of a brute force, however the search is cut and whatever it is given."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import brute_force, noise
from torch import Tensor

from ret_fl.audit import distances
from ret_fl.audit.distances import nearest

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


def test_a_memory_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_mb"):
        nearest(*SETS["random"], 1, memory_mb=0)
