"""Fidelity measures equal their definitions; the classifier is good, repeatable and cached."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ret_fl.audit.fidelity import (
    FeatureClassifier,
    confident_share,
    frechet_distance,
    kernel_distance,
    precision_recall,
    train_classifier,
)


def gauss(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> FeatureClassifier:
    images, labels = digits
    return train_classifier(images[:1400], labels[:1400], 10)


def test_the_classifier_reads_held_back_digits(classifier: FeatureClassifier, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    probabilities = classifier.probabilities(images[1400:])
    assert (probabilities.argmax(1) == labels[1400:]).double().mean() >= 0.95
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities)))
    assert confident_share(probabilities) > 0.9
    features = classifier.features(images[1400:])
    assert features.dtype == torch.float32
    assert features.shape == (len(images) - 1400, 64)


def test_training_depends_on_its_arguments_alone(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    first = train_classifier(images, labels, 10, epochs=2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = train_classifier(images, labels, 10, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.features(images), again.features(images))
    other = train_classifier(images, labels, 10, epochs=2, seed=1)
    assert not torch.equal(first.features(images), other.features(images))


def test_a_cached_classifier_is_the_same_one_and_a_stale_one_is_replaced(
    digits: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    path = tmp_path / "cache" / "classifier.safetensors"
    trained = train_classifier(images, labels, 10, epochs=1, path=path)
    stale = train_classifier(images, labels, 10, epochs=2, path=path)
    assert not torch.equal(trained.features(images), stale.features(images))

    def must_not_train(*_: object) -> None:
        raise AssertionError("trained again in spite of the cache")

    monkeypatch.setattr("ret_fl.audit.fidelity._fit", must_not_train)
    loaded = train_classifier(images, labels, 10, epochs=2, path=path)
    assert torch.equal(stale.features(images), loaded.features(images))
    assert torch.equal(stale.probabilities(images), loaded.probabilities(images))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (1, 11, 9), (3, 28, 28)])
def test_the_classifier_takes_any_size(shape: tuple[int, int, int]) -> None:
    images = (255 * torch.rand(20, *shape)).to(torch.uint8)
    model = train_classifier(images.numpy(), np.arange(20) % 2, 2, epochs=1)
    assert model.features(images).shape == (20, 64)


def test_frechet_distance_of_equal_sets_is_zero() -> None:
    features = gauss(0, 2000, 16)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_equals_the_closed_form_of_gaussians() -> None:
    base = gauss(0, 4000, 6)
    # Whitened exactly, so that the sample moments are those of the closed form.
    base = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(base.T)), (base - base.mean(0)).T, upper=False
    ).T
    scales, shift = torch.tensor([0.5, 1, 2, 3, 4, 0], dtype=torch.float64), torch.arange(6, dtype=torch.float64)
    expected = shift.square().sum() + (1 - scales).square().sum()
    assert frechet_distance(base, base * scales + shift) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_equals_the_matrix_square_root_formula() -> None:
    a, b = gauss(0, 3000, 5) @ gauss(1, 5, 5), gauss(2, 3000, 5) @ gauss(3, 5, 5) + 0.3
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_warns_of_few_generated_samples_only() -> None:
    with pytest.warns(UserWarning, match="999 generated samples"):
        frechet_distance(gauss(0, 2000, 4), gauss(1, 999, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(gauss(0, 500, 4), gauss(1, 1000, 4))


def test_kernel_distance_equals_a_double_loop() -> None:
    a, b = gauss(0, 9, 5), gauss(1, 7, 5)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 5 + 1) ** 3

    within_a = sum(kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (9 * 8)
    within_b = sum(kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (7 * 6)
    between = sum(kernel(x, y) for x in a for y in b) / (9 * 7)
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    values = [kernel_distance(gauss(2 * seed, 60, 8), gauss(2 * seed + 1, 40, 8)) for seed in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)
    assert kernel_distance(gauss(0, 60, 8), gauss(1, 40, 8) + 1) > 10 * np.std(values)


def brute_precision(real: Tensor, generated: Tensor, k: int) -> float:
    radii = [sorted(float((r - s).norm()) for j, s in enumerate(real) if j != i)[k - 1] for i, r in enumerate(real)]
    hits = [any(float((g - r).norm()) <= radius for r, radius in zip(real, radii, strict=True)) for g in generated]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_a_brute_force(k: int) -> None:
    real, generated = gauss(0, 40, 3), 1.3 * gauss(1, 30, 3) + 0.4
    precision, recall = precision_recall(real, generated, k=k)
    assert precision == brute_precision(real, generated, k)
    assert recall == brute_precision(generated, real, k)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_of_constructed_sets() -> None:
    real = gauss(0, 200, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    two_modes = torch.cat([real, real + 100])
    one_mode = real + 1e-6
    assert precision_recall(two_modes, one_mode) == (1.0, 0.5)


def test_confident_share_counts_rows_above_the_threshold() -> None:
    assert confident_share(np.array([[0.95, 0.05], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])) == 0.5


def test_bad_input_is_refused(classifier: FeatureClassifier, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0\.\.16"):
        classifier.features(16 * images)
    with pytest.raises(ValueError, match="H and W >= 8"):
        classifier.features(images[:, :, :4])
    with pytest.raises(ValueError, match="one per image"):
        train_classifier(images, labels[:5], 10)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, got 0\.\.9"):
        train_classifier(images, labels, 5)
    with pytest.raises(ValueError, match="num_classes must be >= 2"):
        train_classifier(images, labels, 1)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.9"):
        precision_recall(gauss(0, 10, 4), gauss(1, 20, 4), k=10)
    with pytest.raises(ValueError, match="4 values each and generated features 5"):
        frechet_distance(gauss(0, 10, 4), gauss(1, 10, 5))
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(gauss(0, 1, 4), gauss(1, 10, 4))
    with pytest.raises(ValueError, match="probabilities"):
        confident_share(torch.zeros(5))
