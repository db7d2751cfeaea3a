"""Whitened pixels: copies are near 1, images that are merely alike are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ret_fl.audit.whitened import WhitenedPixels
from ret_fl.config import DataConfig
from ret_fl.data.sources import load_splits


def test_components_are_uncorrelated_and_of_equal_variance() -> None:
    """The definition, against numpy: on the images they were made of, the covariance of features is the identity."""
    held_out = load_splits(DataConfig(limit=200)).held_out.pixels()
    features = WhitenedPixels(held_out).features(held_out).double().numpy()
    covariance = np.cov(features.T)
    assert np.abs(covariance - np.eye(len(covariance))).max() < 1e-3
    rows = held_out.flatten(1).double().numpy() / 255
    shares = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    shares = np.cumsum(shares) / shares.sum()
    assert features.shape[1] == int(np.searchsorted(shares, 0.99)) + 1


def test_a_noisy_copy_is_found_where_raw_pixels_call_everything_alike() -> None:
    splits = load_splits(DataConfig(limit=200))
    assert splits.reference is not None
    train, others = splits.train.unit(np.arange(200)), splits.reference.unit(np.arange(200))
    noise = 0.05 * torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
    copies = (train + noise).clamp(0, 1)

    def nearest(rows: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return (F.normalize(rows, dim=1) @ F.normalize(points, dim=1).T).amax(1)

    whitened = WhitenedPixels(splits.held_out.pixels())
    own, trained, foreign = (whitened.features(images) for images in (copies, train, others))
    gap = nearest(own, trained).median() - nearest(foreign, trained).median()
    raw_gap = (
        nearest(copies.flatten(1), train.flatten(1)).median() - nearest(others.flatten(1), train.flatten(1)).median()
    )
    assert nearest(own, trained).median() > 0.9
    assert gap > 3 * raw_gap


def test_many_images_come_to_what_each_comes_to_alone() -> None:
    """They are looked at in parts, as large ones would not fit in memory as floats."""
    images = torch.rand(600, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    model = WhitenedPixels(images[:150])
    alone = torch.cat([model.features(images[i : i + 1]) for i in (0, 255, 256, 599)])
    assert torch.allclose(model.features(images)[[0, 255, 256, 599]], alone, atol=1e-5)


def test_large_images_are_made_smaller_and_few_or_equal_ones_refused() -> None:
    images = torch.rand(100, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    assert WhitenedPixels(images).features(images[:2]).shape[1] < 100
    with pytest.raises(ValueError, match="100 images at least, got 99"):
        WhitenedPixels(images[:99])
    with pytest.raises(ValueError, match="differ"):
        WhitenedPixels(images[:1].expand(100, -1, -1, -1))
