"""Every scheme deals every sample to exactly one shard and leaves no shard empty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ret_fl.config import ConfigError, PartitionConfig
from ret_fl.data.partition import interleave, largest_remainder, partition


def deal(labels: np.ndarray, shards: int, seed: int = 0, **settings: object) -> np.ndarray:
    classes = int(labels.max()) + 1
    return partition(len(labels), labels, classes, shards, PartitionConfig(**settings), seed)


labelled = st.lists(st.integers(0, 5), min_size=12, max_size=80).map(np.array)


@given(
    labelled,
    st.integers(1, 8),
    st.integers(0, 9),
    st.sampled_from(["iid", "shuffled", "dirichlet"]),
    st.floats(0.01, 9),
)
def test_every_sample_is_in_exactly_one_shard_and_no_shard_is_empty(
    labels: np.ndarray, shards: int, seed: int, scheme: str, alpha: float
) -> None:
    owner = deal(labels, shards, seed, scheme=scheme, alpha=alpha)
    counts = np.bincount(owner, minlength=shards)
    assert owner.dtype == np.int32 and owner.shape == labels.shape
    assert counts.sum() == len(labels) and len(counts) == shards and counts.min() >= 1
    if scheme != "dirichlet":
        assert np.ptp(counts) <= 1


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 9))
def test_under_class_every_sample_lands_and_no_shard_holds_more_classes_than_asked(
    shards: int, per_shard: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(5), 20))
    if shards * per_shard < 5:
        with pytest.raises(ConfigError, match=r"raise partition\.classes-per-shard to"):
            deal(labels, shards, seed, scheme="class", classes_per_shard=per_shard)
        return
    owner = deal(labels, shards, seed, scheme="class", classes_per_shard=per_shard)
    assert np.bincount(owner, minlength=shards).min() >= 1
    for shard in range(shards):
        assert len(set(labels[owner == shard])) <= per_shard
    for c in range(5):
        held = np.bincount(owner[labels == c])
        assert np.ptp(held[held > 0]) <= 1  # cut evenly among the shards that hold the class


@given(labelled, st.integers(1, 6), st.integers(0, 9))
def test_iid_balances_every_class(labels: np.ndarray, shards: int, seed: int) -> None:
    owner = deal(labels, shards, seed, scheme="iid")
    for c in np.unique(labels):
        counts = np.bincount(owner[labels == c], minlength=shards)
        assert np.ptp(counts) <= 2


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 500))
def test_largest_remainder_hands_out_the_total_and_misses_no_share_by_one(weights: list[float], total: int) -> None:
    share = np.array(weights)
    counts = largest_remainder(share, total)
    assert counts.sum() == total
    assert np.all(np.abs(counts - share / share.sum() * total) < 1 + 1e-9)


def test_sizes_are_followed_by_shards_and_by_every_class() -> None:
    labels = np.repeat(np.arange(10), 100)
    owner = deal(labels, 4, scheme="iid", sizes="0.7,0.2,0.07,0.03")
    assert np.bincount(owner).tolist() == [700, 200, 70, 30]
    for c in range(10):
        assert np.abs(np.bincount(owner[labels == c], minlength=4) - [70, 20, 7, 3]).max() <= 2
    assert np.bincount(deal(labels, 3, scheme="shuffled", sizes="2,1,1")).tolist() == [500, 250, 250]


def test_interleave_of_equal_counts_is_a_round_robin() -> None:
    assert interleave(np.array([3, 3, 2])).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert interleave(np.array([], dtype=int)).tolist() == []


def test_a_small_alpha_is_more_skewed_than_a_large_one() -> None:
    labels = np.repeat(np.arange(10), 200)

    def spread(alpha: float) -> float:
        owner = deal(labels, 5, scheme="dirichlet", alpha=alpha)
        return float(np.mean([np.bincount(owner[labels == c], minlength=5).std() for c in range(10)]))

    assert spread(0.1) > 3 * spread(100.0)


def test_the_deal_depends_on_the_seed_alone() -> None:
    labels = np.arange(100) % 7
    for scheme in ("iid", "shuffled", "class", "dirichlet"):
        first = deal(labels, 4, 1, scheme=scheme)
        assert np.array_equal(first, deal(labels, 4, 1, scheme=scheme))
        assert not np.array_equal(first, deal(labels, 4, 2, scheme=scheme)) or scheme == "class"


def test_without_classes_iid_shuffles_and_class_schemes_refuse() -> None:
    owner = partition(10, None, 0, 3, PartitionConfig(scheme="iid"), 0)
    assert sorted(np.bincount(owner)) == [3, 3, 4]
    for scheme in ("class", "dirichlet"):
        with pytest.raises(ConfigError, match="needs classes"):
            partition(10, None, 0, 3, PartitionConfig(scheme=scheme), 0)


def test_a_shard_left_without_an_image_is_an_error_that_names_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"too few images \(3\) for 4 shards: lower shards, or raise data.limit"):
        partition(3, None, 0, 4, PartitionConfig(), 0)
    with pytest.raises(ConfigError, match=r"leaves shards \[1\] of 2 without an image"):
        partition(10, None, 0, 2, PartitionConfig(sizes="1000,1"), 0)


@pytest.mark.parametrize("sizes", ["1,2", "a,b,c", "1,0,1", "1,-1,1", "1,inf,1"])
def test_bad_sizes_are_refused(sizes: str) -> None:
    with pytest.raises(ConfigError, match=r"partition\.sizes"):
        partition(30, None, 0, 3, PartitionConfig(sizes=sizes), 0)


def test_sizes_for_a_scheme_that_ignores_them_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"partition\.sizes holds for"):
        deal(np.arange(30) % 3, 3, scheme="dirichlet", sizes="1,1,1")


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_file_decides_the_shards(tmp_path: Path, suffix: str) -> None:
    wanted = [0, 2, 1, 1, 2, 0, 0]
    path = tmp_path / f"shards.{suffix}"
    if suffix == "npy":
        np.save(path, np.array(wanted))
    else:
        path.write_text(json.dumps(wanted))
    assert partition(7, None, 0, 3, PartitionConfig(scheme="file", path=str(path)), 0).tolist() == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0, 1]", "must hold 4 integers"),
        ("[0, 1, 2, 3]", "numbers must be in 0..shards-1"),
        ("[0, 1, -1, 0]", "numbers must be in 0..shards-1"),
        ("[0.5, 1, 1, 0]", "must hold 4 integers"),
        ("not json", "cannot read"),
        ("[0, 0, 0, 0]", r"leaves shards \[1\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "shards.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        partition(4, None, 0, 2, PartitionConfig(scheme="file", path=str(path)), 0)


def test_a_pickled_or_missing_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "shards.npy", np.array([0, "x", None, 1], dtype=object), allow_pickle=True)
    for name in ("shards.npy", "missing.npy"):
        with pytest.raises(ConfigError, match="cannot read"):
            partition(4, None, 0, 2, PartitionConfig(scheme="file", path=str(tmp_path / name)), 0)
    with pytest.raises(ConfigError, match=r"needs a \.npy or \.json file"):
        partition(4, None, 0, 2, PartitionConfig(scheme="file"), 0)


def test_shards_by_speed_are_equal_until_speeds_are_known() -> None:
    """`ret-fl run` and `ret-fl doctor` deal the data to check it, before any node has come."""
    sizes = np.bincount(partition(10, None, 0, 3, PartitionConfig(sizes="speed"), 0))
    assert sizes.tolist() == [4, 3, 3]
