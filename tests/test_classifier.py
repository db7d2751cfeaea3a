"""The classifier of the data is good, repeatable and cached."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ret_fl.audit import run
from ret_fl.audit.classifier import MAX_SIDE, OF_TURNS, FeatureClassifier, small_images, train_classifier, turned
from ret_fl.audit.fidelity import confident_share
from ret_fl.audit.run import AuditData, Options
from ret_fl.data.store import SampleStore


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
    assert first.recipe == again.recipe != other.recipe
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


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "weights of another network"])
def test_a_damaged_cache_means_training_again(digits: tuple[Tensor, Tensor], tmp_path: Path, damage: str) -> None:
    images, labels = digits[0][:100], digits[1][:100]
    path = tmp_path / "classifier.safetensors"
    trained = train_classifier(images, labels, 10, epochs=1, path=path)
    whole = path.read_bytes()
    if damage == "weights of another network":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        weights = trained.state_dict() | {"head.bias": torch.zeros(3)}
        save_file(weights, path, metadata=metadata)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not weights", "empty": b""}[damage])
    again = train_classifier(images, labels, 10, epochs=1, path=path)
    assert torch.equal(again.features(images), trained.features(images))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (1, 11, 9), (3, 28, 28)])
def test_the_classifier_takes_any_size(shape: tuple[int, int, int]) -> None:
    images = (255 * torch.rand(20, *shape)).to(torch.uint8)
    model = train_classifier(images.numpy(), np.arange(20) % 2, 2, epochs=1)
    assert model.features(images).shape == (20, 64)


def photos(count: int, height: int = 96, width: int = 120) -> Tensor:
    """uint8 images of two kinds in turn, dark and bright, each with noise of its own."""
    bright = 100 * (torch.arange(count) % 2)[:, None, None, None]
    noise = torch.randint(0, 100, (count, 3, height, width), generator=torch.Generator().manual_seed(0))
    return (bright + noise).to(torch.uint8)


@pytest.mark.parametrize(("size", "small"), [((96, 120), (51, 64)), ((64, 9), (64, 9)), ((8, 1024), (8, 64))])
def test_large_images_are_made_smaller_and_others_left_alone(size: tuple[int, int], small: tuple[int, int]) -> None:
    images = photos(5, *size)
    assert small_images(images).shape[2:] == small
    assert small_images(images).dtype == torch.uint8
    torch.testing.assert_close(small_images(images / 255), small_images(images) / 255, atol=0.51 / 255, rtol=0)
    assert len(small_images(images[:0])) == 0


def test_the_classifier_never_sees_a_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time grows with the area: a set of 512 x 512 would take 64 times as long as one of 64 x 64."""
    images, seen = photos(40, 300, 400), []
    forward = FeatureClassifier.forward

    def watched(model: FeatureClassifier, batch: Tensor) -> Tensor:
        seen.append(max(batch.shape[2:]))
        return forward(model, batch)

    monkeypatch.setattr(FeatureClassifier, "forward", watched)
    model = train_classifier(images, torch.arange(40) % 2, 2, epochs=2)
    kinds = model.probabilities(images).argmax(1)
    assert len(seen) == 3
    assert max(seen) <= MAX_SIDE
    assert torch.equal(kinds, torch.arange(40) % 2)
    assert torch.equal(model.features(images), model.features(small_images(images)))


def test_training_tells_how_far_it_is(digits: tuple[Tensor, Tensor]) -> None:
    told: list[tuple[int, int]] = []
    train_classifier(digits[0][:100], digits[1][:100], 10, epochs=3, on_progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


class Counted(SampleStore):
    """A store that notes how many images are asked for at a time."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images, torch.arange(len(images)) % 2, 2)
        self.asked: list[int] = []

    def pixels(self, ids: Tensor | np.ndarray | None = None) -> Tensor:
        self.asked.append(len(self) if ids is None else len(ids))
        return super().pixels(ids)


@pytest.mark.parametrize(("one_split", "most"), [(True, 40), (False, 10)])
def test_the_images_of_an_audit_are_chosen_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_split: bool, most: int
) -> None:
    """From all sets. Where their labels may not agree they are not used, and every image counts four times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for setting, value in (("CLASSIFIED", 40), ("READ", 7), ("PATIENCE", 0.0)):
        monkeypatch.setattr(run, setting, value)
    images, stages = photos(600), []
    data = AuditData("photos", Counted(images[:400]), held_out=Counted(images[400:]), one_split=one_split)
    model = run._classifier(data, Options(), stages.append)
    assert model is not None
    assert model.name == (FeatureClassifier.name if one_split else OF_TURNS)
    read = [store.asked for store in (data.train, data.held_out) if isinstance(store, Counted)]
    assert sum(map(sum, read)) == most
    assert max(map(max, read)) <= 7
    assert sum(read[0]) == pytest.approx(most * 400 / 600, abs=1)
    assert stages[0] == "a classifier of the data, for its features"
    assert stages[1:] == [f"{stages[0]}: {done} of 20 passes" for done in range(1, 21)]


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


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12)])
def test_four_turns_of_an_image_are_four_images_and_turning_back_gives_it_again(shape: tuple[int, int, int]) -> None:
    images = torch.arange(2 * np.prod(shape)).reshape(2, *shape)
    ways, way = turned(images)
    assert way.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(ways[:2], images)
    assert len(torch.unique(ways, dim=0)) == 8
    again, _ = turned(ways[4:6])
    assert any(torch.equal(again[k : k + 2], images) for k in range(0, 8, 2))


def test_images_without_labels_get_a_classifier_of_their_turns(
    digits: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "user_cache", lambda name: tmp_path)
    images = (digits[0] * 255).round().to(torch.uint8)
    model = run._classifier(AuditData("digits", SampleStore(images[:1000])), Options(), lambda stage: None)
    assert model is not None and model.name == OF_TURNS
    ways, way = turned(images[1000:])
    assert (model.probabilities(ways).argmax(1) == way).double().mean() > 0.8  # a 0 or 8 looks alike upside down
