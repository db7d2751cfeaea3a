"""SampleStore: what is fetched by ID is what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ret_fl.data.store import SampleStore


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 3, 4, 5), dtype=np.uint8)


LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


def test_fetch_equals_the_reference_conversion(pixels: np.ndarray) -> None:
    store = SampleStore(pixels, LABELS, 3)
    ids = torch.tensor([9, 0, 3, 3])
    images, labels = store.fetch(ids, torch.device("cpu"))
    expected = pixels[ids.numpy()].astype(np.float64) / 255 * 2 - 1
    assert images.dtype == torch.float32 and images.shape == (4, 3, 4, 5)
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert labels is not None and labels.dtype == torch.int64 and labels.tolist() == [0, 0, 0, 0]


def test_black_is_minus_one_and_white_is_one() -> None:
    store = SampleStore(np.array([[[0, 255]]], dtype=np.uint8))
    assert store.image_shape == (1, 1, 2)  # a channel axis is added to grey images
    images, labels = store.fetch(torch.tensor([0]))
    assert images.flatten().tolist() == [-1.0, 1.0] and labels is None
    assert store.unit().flatten().tolist() == [0.0, 1.0]


def test_fetching_does_not_change_the_store(pixels: np.ndarray) -> None:
    store = SampleStore(pixels)
    before = store.fingerprint
    store.fetch(torch.arange(10))[0].zero_()
    store.unit().zero_()
    assert SampleStore(pixels).fingerprint == before


def test_fetching_no_ids_gives_an_empty_batch(pixels: np.ndarray) -> None:
    assert SampleStore(pixels).fetch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 3, 4, 5)


@pytest.mark.parametrize("bad", [[-1], [10], [2, 99, -3]])
def test_unknown_ids_are_named(pixels: np.ndarray, bad: list[int]) -> None:
    store = SampleStore(pixels)
    for fetch in (store.fetch, store.unit, store.subset):
        with pytest.raises(IndexError, match=f"unknown sample IDs .*{bad[-1]}.*: this store holds 0 to 9"):
            fetch(torch.tensor(bad))


def test_a_subset_is_the_named_samples_in_order(pixels: np.ndarray) -> None:
    store = SampleStore(pixels, LABELS, 3)
    part = store.subset(np.array([7, 2, 2, 5]))
    again = part.subset(torch.tensor([3, 0]))
    assert len(part) == 4 and len(again) == 2
    assert torch.equal(part.unit(), store.unit(np.array([7, 2, 2, 5])))
    assert torch.equal(again.unit(), store.unit(np.array([5, 7])))
    assert again.labels is not None and again.labels.tolist() == [2, 1]
    assert again.fingerprint == SampleStore(pixels[[5, 7]], LABELS[[5, 7]], 3).fingerprint
    with pytest.raises(IndexError, match="0 to 3"):
        part.fetch(torch.tensor([4]))


def test_the_fingerprint_sees_a_pixel_a_label_and_the_order(pixels: np.ndarray) -> None:
    changed = pixels.copy()
    changed[9, 2, 3, 4] ^= 1
    relabelled = LABELS.copy()
    relabelled[0] = 1
    turned = np.arange(10)[::-1]
    prints = {
        SampleStore(pixels, LABELS, 3).fingerprint,
        SampleStore(changed, LABELS, 3).fingerprint,
        SampleStore(pixels, relabelled, 3).fingerprint,
        SampleStore(pixels, LABELS, 4).fingerprint,
        SampleStore(pixels).fingerprint,
        SampleStore(pixels[turned], LABELS[turned], 3).fingerprint,
        SampleStore(pixels.reshape(10, 3, 5, 4), LABELS, 3).fingerprint,
    }
    assert len(prints) == 7
    assert SampleStore(torch.from_numpy(pixels), LABELS, 3).fingerprint in prints


def test_equal_images_and_only_they_share_a_content_hash(pixels: np.ndarray) -> None:
    hashes = SampleStore(np.concatenate([pixels, pixels[[4]]])).content_hashes
    assert hashes.dtype == np.uint64 and hashes.shape == (11,)
    assert hashes[10] == hashes[4] and len(set(hashes.tolist())) == 10


def test_a_memory_mapped_store_equals_one_in_memory(pixels: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pixels)
    for mode in ("c", "r"):
        mapped = SampleStore(np.load(tmp_path / "images.npy", mmap_mode=mode))
        assert mapped.fingerprint == SampleStore(pixels).fingerprint
        assert torch.equal(mapped.fetch(torch.arange(10))[0], SampleStore(pixels).fetch(torch.arange(10))[0])


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "error", "message"),
    [
        (np.zeros((2, 1, 4, 4)), None, 0, TypeError, "must be uint8"),
        (np.zeros((2, 4), np.uint8), None, 0, ValueError, r"must be \[N, C, H, W\]"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(3, int), 1, ValueError, r"shape \(2,\)"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2), 1, TypeError, "must be integers"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, 1]), 1, ValueError, "num_classes is 1"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, -1]), 2, ValueError, "num_classes is 2"),
        (np.zeros((2, 4, 4), np.uint8), None, 2, ValueError, "there are no labels"),
    ],
)
def test_unfit_input_is_refused(
    images: np.ndarray, labels: np.ndarray | None, num_classes: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SampleStore(images, labels, num_classes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batch(pixels: np.ndarray) -> None:
    store = SampleStore(pixels, LABELS, 3)
    images, labels = store.fetch(torch.arange(10), "cuda")
    assert images.is_cuda and labels is not None and labels.is_cuda
    torch.testing.assert_close(images.cpu(), store.fetch(torch.arange(10))[0])  # a GPU rounds otherwise
