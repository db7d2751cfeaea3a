"""The classifier of the data is good, repeatable and cached."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ret_fl.audit.classifier import FeatureClassifier, train_classifier
from ret_fl.audit.fidelity import confident_share


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

    monkeypatch.setattr("ret_fl.audit.classifier._fit", must_not_train)
    loaded = train_classifier(images, labels, 10, epochs=2, path=path)
    assert torch.equal(stale.features(images), loaded.features(images))
    assert torch.equal(stale.probabilities(images), loaded.probabilities(images))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (1, 11, 9), (3, 28, 28)])
def test_the_classifier_takes_any_size(shape: tuple[int, int, int]) -> None:
    images = (255 * torch.rand(20, *shape)).to(torch.uint8)
    model = train_classifier(images.numpy(), np.arange(20) % 2, 2, epochs=1)
    assert model.features(images).shape == (20, 64)


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
