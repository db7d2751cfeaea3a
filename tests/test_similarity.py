"""Similarity equals its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ret_fl.audit.similarity import similarity


def gauss(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_cosines(a: Tensor, b: Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return (x @ y.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))


def test_similarity_equals_a_brute_force() -> None:
    generated, train, held_out = gauss(0, 60, 5), gauss(1, 80, 5), gauss(2, 30, 5)
    scores = similarity(generated, train, held_out, name="toy")
    best = brute_cosines(generated, train).max(1)
    others = brute_cosines(train, train) - 3 * np.eye(80)
    assert scores.features == "toy"
    assert scores.mean == pytest.approx(best.mean(), abs=1e-6)
    assert scores.percentile_50 == pytest.approx(np.percentile(best, 50), abs=1e-6)
    assert scores.percentile_95 == pytest.approx(np.percentile(best, 95), abs=1e-6)
    assert scores.above_half == (best > 0.5).mean()
    assert scores.floor_percentile_95 == pytest.approx(
        np.percentile(brute_cosines(held_out, train).max(1), 95), abs=1e-6
    )
    assert scores.floor_above_half == (brute_cosines(held_out, train).max(1) > 0.5).mean()
    assert scores.background_percentile_95 == pytest.approx(np.percentile(others.max(1), 95), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(2, 90), st.sampled_from([1, 3, 64, 1000, 5000]), st.data())
def test_similarity_depends_on_neither_tiles_nor_order_nor_length(
    g: int, n: int, width: int, data: st.DataObject
) -> None:
    generated, train = gauss(g, g, width), gauss(n, n, width)
    train[n // 2] = train[0]  # a copy, often in another tile
    # 1 MB holds tiles of 43 rows of 1000, of 8 rows of 5000.
    whole, tiled = similarity(generated, train, name="toy"), similarity(generated, train, name="toy", memory_mb=1)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    lengths = 10.0 ** torch.linspace(-3, 3, n)[:, None]
    moved = similarity(generated * 7, (train * lengths)[order], name="toy")
    for other in (tiled, moved):
        for field, value in whole.model_dump(exclude={"features", "above_half", "floor_above_half"}).items():
            assert getattr(other, field) == pytest.approx(value, abs=2e-6), field


def test_a_copy_has_similarity_one_and_its_opposite_minus_one() -> None:
    train = gauss(0, 50, 300)
    copies = similarity(train[10:20], train, name="toy")
    assert copies.mean == pytest.approx(1, abs=1e-6)
    assert copies.percentile_50 <= 1
    assert copies.above_half == 1
    assert copies.background_percentile_95 is not None
    assert copies.background_percentile_95 < 0.5
    assert similarity(-train[:1], train[:1], name="toy").mean == pytest.approx(-1, abs=1e-6)


def test_copies_in_the_training_set_do_not_move_its_background() -> None:
    train = gauss(0, 40, 6)
    copied = torch.cat([train, train[:3].repeat(50, 1) * (1 + 1e-6 * gauss(1, 150, 6))])
    scores = [similarity(train[:1], points, name="toy").background_percentile_95 for points in (train, copied)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    assert similarity(train[:1], train[:1].repeat(5, 1), name="toy").background_percentile_95 is None


def test_similarity_refuses_features_without_a_cosine() -> None:
    train = gauss(0, 9, 4)
    with pytest.raises(ValueError, match="toy features of generated images hold NaN or infinity in 1 of 9"):
        similarity(train.clone().index_fill_(0, torch.tensor([2]), torch.nan), train, name="toy")
    with pytest.raises(ValueError, match="toy features of training images are all zero in 9 of 9"):
        similarity(train, 0 * train, name="toy")
    with pytest.raises(ValueError, match="toy features of held-out images have 3 values each"):
        similarity(train, train, train[:, :3], name="toy")
    with pytest.raises(ValueError, match="memory_mb"):
        similarity(train, train, name="toy", memory_mb=0)
