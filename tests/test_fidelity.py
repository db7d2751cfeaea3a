"""Fidelity measures equal their definitions, and are those of the right sets."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import FakeInception, save_script
from torch import Tensor

from ret_fl.audit.classifier import train_classifier
from ret_fl.audit.features import FeatureModel, load_features
from ret_fl.audit.fidelity import confident_share, fidelity, frechet_distance, kernel_distance, precision_recall
from ret_fl.audit.inception import inception_score


def gauss(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.9"):
        precision_recall(gauss(0, 10, 4), gauss(1, 20, 4), k=10)
    with pytest.raises(ValueError, match="4 values each and generated features 5"):
        frechet_distance(gauss(0, 10, 4), gauss(1, 10, 5))
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(gauss(0, 1, 4), gauss(1, 10, 4))
    with pytest.raises(ValueError, match="probabilities"):
        confident_share(torch.zeros(5))


PEAK = """
import torch
from ret_fl.audit.fidelity import fidelity, kernel_distance, precision_recall

class Means:
    name = "means"

    def features(self, images):
        return images.flatten(2).float().mean(2)

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def measure(held_out, train, real):
    fidelity(Means(), train[:1000], held_out, train, memory_mb=32)
    precision_recall(real, real[:2000], memory_mb=32)
    kernel_distance(real, real[:2000], memory_mb=32)

torch.set_num_threads(1)
train = torch.randint(0, 256, (40000, 3, 32, 32), dtype=torch.uint8)
train[7] = train[3]
real = torch.rand(20000, 8, dtype=torch.float64)
measure(train[:100], train[:1100], real[:2500])  # what the libraries load once
before = kilobytes("VmRSS")
measure(train[:100], train, real)
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
def test_quality_keeps_to_its_memory() -> None:
    # A copy of the images would be 117 MB, 1024 rows of distances between the features 164 MB.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32 + 80


@pytest.mark.parametrize("memory_mb", [1, 3])
def test_quality_is_the_same_in_a_megabyte(memory_mb: int) -> None:
    real, made = gauss(0, 3000, 4), gauss(1, 2000, 4)
    assert precision_recall(real, made, memory_mb=memory_mb) == precision_recall(real, made)
    assert kernel_distance(real, made, memory_mb=memory_mb) == pytest.approx(kernel_distance(real, made), rel=1e-9)


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> FeatureModel:
    return train_classifier(digits[0][:900], digits[1][:900], 10, epochs=8)


def test_fidelity_equals_its_parts(classifier: Any, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0]
    train, held_out = images[:900], images[900:1300]
    generated = (images[1300:1500] + 0.1 * torch.rand(200, 1, 8, 8)).clamp(0, 1)
    with pytest.warns(UserWarning, match="200 generated samples") as caught:
        scores = fidelity(classifier, generated, held_out, train)
    assert len(caught) == 1
    real, made = classifier.features(held_out), classifier.features(generated)
    with pytest.warns(UserWarning):
        assert scores.frechet == frechet_distance(real, made)
    assert scores.kid == kernel_distance(real, made)
    assert (scores.precision, scores.recall) == precision_recall(real, made, 3)
    assert scores.confident == confident_share(classifier.probabilities(generated))
    assert (scores.features, scores.against, scores.images) == ("classifier of the data", "held-out", 400)
    # Training images in the samples' place are closer than noisy ones.
    assert scores.real_frechet is not None
    assert scores.real_frechet < scores.frechet
    assert scores.real_precision is not None
    assert scores.real_recall is not None
    assert min(scores.real_precision, scores.real_recall) > 0.85


def test_the_stand_ins_are_as_many_distinct_training_images(classifier: Any, digits: tuple[Tensor, Tensor]) -> None:
    held_out, train = digits[0][900:1300], digits[0][:120]
    copied = torch.cat([train, train[:1].repeat(300, 1, 1, 1)])
    with pytest.warns(UserWarning) as caught:
        scores = fidelity(classifier, digits[0][1300:1500], held_out, copied)
    assert any("only 120 distinct training images stand in for 200" in str(w.message) for w in caught)
    real = classifier.features(held_out)
    shuffled = classifier.features(train)
    with pytest.warns(UserWarning):
        expected = frechet_distance(real, shuffled)
    assert scores.real_frechet == pytest.approx(expected, rel=1e-6)
    assert (scores.real_precision, scores.real_recall) == precision_recall(real, shuffled, 3)


@pytest.mark.parametrize("held_out", [0, 49])
def test_few_held_out_images_leave_the_training_images(
    classifier: Any, digits: tuple[Tensor, Tensor], held_out: int
) -> None:
    images = digits[0]
    train = torch.cat([images[:100], images[:50]])
    rest = images[900 : 900 + held_out] if held_out else None
    with pytest.warns(UserWarning):
        scores = fidelity(classifier, images[1300:1400], rest, train)
    assert (scores.against, scores.images) == ("train", 100)
    assert scores.real_frechet is None
    assert scores.real_precision is None
    assert scores.real_recall is None


def test_fidelity_in_the_features_of_a_given_model(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model = load_features(str(save_script(FakeInception(), tmp_path / "inception-2015-12-05.pt")))
    images = digits[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # enough samples
        scores = fidelity(model, images[:1000], images[1000:1700], images[:1000])
    assert scores.confident is None
    assert scores.real_frechet == pytest.approx(scores.frechet, rel=1e-6)
    real, made = model.features(images[1000:1700]), model.features(images[:1000])
    assert scores.frechet == frechet_distance(real, made)
    assert (scores.precision, scores.recall) == precision_recall(real, made, 3)


def test_the_inception_score_is_that_of_its_definition() -> None:
    p = gauss(0, 95, 7).mul(2).softmax(1)
    scores = []
    for part in np.array_split(p.numpy(), 10):
        kl = part * (np.log(part) - np.log(part.mean(axis=0)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    assert inception_score(p) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_the_inception_score_runs_from_1_to_the_number_of_classes() -> None:
    assert inception_score(torch.full((50, 5), 0.2)) == pytest.approx((1, 0))
    assert inception_score(torch.eye(5).repeat(20, 1)) == pytest.approx((5, 0))
    with pytest.raises(ValueError, match="10 images or more"):
        inception_score(torch.eye(5))
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(gauss(0, 20, 5))


def test_inception_tells_what_papers_report_and_no_other_model_does(
    classifier: Any, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = load_features(str(save_script(FakeInception(), tmp_path / "inception-2015-12-05.pt")))
    images = digits[0]
    train = torch.cat([images[:500], images[:100]])  # repeats count in a published FID
    with pytest.warns(UserWarning, match="500 distinct training images stand in"):
        scores = fidelity(model, images[600:1600], images[1600:1700], train)
    features = model.features(images[600:1600])
    assert scores.train_frechet == frechet_distance(model.features(train), features)
    expected = inception_score(model.class_probabilities(images[600:1600]))
    assert (scores.inception_score, scores.inception_deviation) == expected and expected[0] > 1
    assert scores.real_inception_score is not None and scores.real_inception_score > 1
    with pytest.warns(UserWarning):
        other = fidelity(classifier, images[600:700], images[1600:1700], train)
    assert other.train_frechet is other.inception_score is None


def test_every_image_is_seen_once_and_there_are_as_many_stand_ins_as_samples(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0]

    class Recorder:
        name = "pixels"

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def features(self, images: Tensor) -> Tensor:
            self.seen.append(images)
            return images.flatten(1)

    model = Recorder()
    with pytest.warns(UserWarning, match="70 generated samples"):
        fidelity(model, images[:70], images[100:180], images[200:700].numpy())
    held_out, generated, stand_ins = model.seen
    assert torch.equal(held_out, images[100:180])
    assert torch.equal(generated, images[:70])
    assert len(stand_ins.unique(dim=0)) == 70
    # No first rows: data are often sorted by class.
    assert not torch.equal(stand_ins, images[200:270])
    pool = {image.numpy().tobytes() for image in images[200:700]}
    assert all(image.numpy().tobytes() in pool for image in stand_ins)


def test_fidelity_refuses_tiny_sets_and_broken_models(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images = digits[0]
    model = load_features(str(save_script(FakeInception(), tmp_path / "inception-2015-12-05.pt")))
    with pytest.raises(ValueError, match=r"at least 4 \(distinct\) images in every set, got 3"):
        fidelity(model, images[:3], images[:100], images[:100])
    with pytest.raises(ValueError, match=r"at least 4 \(distinct\) images in every set, got 1"):
        fidelity(model, images[:100], images[:100], images[:1].repeat(9, 1, 1, 1))

    class Nan:
        name = "my features"

        def features(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 3), torch.nan)

    with pytest.raises(ValueError, match="my features gives NaN or infinity for 100 of 100 images"):
        fidelity(Nan(), images[:100], images[:100], images[:100])
