"""Near-duplicates are found as a double loop finds them, and clusters are weighted, dropped, gathered and spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Federation, ret_fl
from federations import Recorder
from hypothesis import given
from hypothesis import strategies as st
from image_models import save_script
from ledgers import ledger_of
from orders import ALL_T, make_order, train
from pictures import load

from ret_fl.config import ConfigError, DataConfig, PartitionConfig, RunConfig, Scalar
from ret_fl.data import clusters as clusters_module
from ret_fl.data.clusters import describe_clusters, find_clusters
from ret_fl.data.near import joined_by_cosine, pixel_features
from ret_fl.data.partition import partition
from ret_fl.data.sources import deal, load_splits
from ret_fl.data.store import SampleStore
from ret_fl.ledger import Moves, ShardLedger
from ret_fl.recorder import canaries_found
from ret_fl.redistribution import propose
from ret_fl.rundir import RunDir

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]

NEAR: dict[str, Scalar] = {
    "data.canaries": 3,
    "data.canary-repeats": 4,
    "data.canary-jitter": 8.0,
    "data.near-duplicates": "cosine",
}
"""24 digits, three of them with three noisy repeats: 33 samples."""


def blobs(seed: int, count: int) -> torch.Tensor:
    """float32 [count, 6]: directions around a few centres, some of them without length."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4, 6))[rng.integers(0, 4, count)] + 0.2 * rng.normal(size=(count, 6))
    return torch.from_numpy(rows * (rng.random((count, 1)) < 0.9)).float()


# --- finding ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(1, 40), st.floats(0.5, 0.995))
def test_clusters_by_cosine_are_those_of_a_double_loop(seed: int, count: int, least: float) -> None:
    rows = blobs(seed, count)
    unit = torch.nn.functional.normalize(rows, dim=1)
    cluster = list(range(count))
    for i in range(count):
        for j in range(i):
            if unit[i] @ unit[j] >= least:
                cluster = [min(cluster[i], cluster[j]) if c in (cluster[i], cluster[j]) else c for c in cluster]
    assert joined_by_cosine(rows, least).tolist() == cluster


def test_clusters_do_not_depend_on_how_the_comparison_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(3, 300)
    whole = joined_by_cosine(rows, 0.97)
    assert 10 < len(np.unique(whole)) < 290
    for block, columns in ((7, 300), (300, 7), (16, 64)):
        monkeypatch.setattr("ret_fl.data.near.BLOCK", block)
        monkeypatch.setattr("ret_fl.data.near.COLUMNS", columns)
        assert np.array_equal(joined_by_cosine(rows, 0.97), whole)


def test_a_chain_of_alike_images_is_one_cluster() -> None:
    angles = torch.arange(10) * 0.1
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    assert joined_by_cosine(rows, 0.99).tolist() == [0] * 10  # though the ends are at cosine .62


def test_pixels_are_compared_whatever_their_brightness_and_contrast() -> None:
    images = torch.randint(0, 100, (1, 3, 40, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = pixel_features(torch.cat([images, 2 * images + 50, 255 - images]))
    assert features.shape == (3, 3 * 16 * 16)
    first, brighter, negative = torch.nn.functional.normalize(features, dim=1)
    assert float(first @ brighter) == pytest.approx(1, abs=1e-5)
    assert float(first @ negative) == pytest.approx(-1, abs=1e-5)
    even = torch.full((2, 1, 8, 8), 7, dtype=torch.uint8)
    assert joined_by_cosine(pixel_features(even), 0.5).tolist() == [0, 1]


def test_jittered_canaries_are_the_clusters_that_are_found() -> None:
    exact = load(source="digits", limit=200, canaries=5, canary_repeats=10)
    splits = load(source="digits", limit=200, canaries=5, canary_repeats=10, canary_jitter=8)
    train, canaries = splits.train, splits.canaries
    assert np.array_equal(canaries, exact.canaries)
    originals = np.arange(200)
    assert np.array_equal(train.pixels(originals), exact.train.pixels(originals))  # noise is on repeats alone
    noise = train.pixels(canaries[:, 1:].ravel()).float() - exact.train.pixels(canaries[:, 1:].ravel()).float()
    free = exact.train.pixels(canaries[:, 1:].ravel()).float()
    inside = noise[(free > 40) & (free < 215)]  # where nothing is cut off
    assert len(inside) > 500 and float(inside.std()) == pytest.approx(8, rel=0.1) and abs(float(inside.mean())) < 1
    assert len(set(train.content_hashes.tolist())) == 245
    assert "5 of them 10 times, with noise" in splits.describe()
    config = DataConfig(near_duplicates="cosine")
    found = find_clusters(train, config)
    expected = np.arange(245)
    expected[canaries] = canaries[:, :1]
    assert np.array_equal(found, expected)
    assert describe_clusters(found) == "45 of 245 samples repeat another one, in 5 clusters of up to 10"
    assert describe_clusters(find_clusters(train, DataConfig())) == ""
    # exact copies are clusters without any such setting, and the first sample names each
    assert np.array_equal(find_clusters(exact.train, DataConfig()), expected)


def test_a_perceptual_hash_finds_a_brighter_photograph_and_exact_copies_stay_together() -> None:
    pytest.importorskip("imagehash")
    faces = load(source="faces", reference=False, held_out=0).train.pixels()
    brighter = (faces[:10].float() * 0.9 + 12).round().to(torch.uint8)
    store = SampleStore(torch.cat([faces, brighter, faces[:3], torch.zeros(2, 1, 24, 24, dtype=torch.uint8)]))
    found = find_clusters(store, DataConfig(near_duplicates="phash"))
    assert found.tolist() == [*range(100), *range(10), 0, 1, 2, 113, 113]


def test_features_may_be_a_networks(tmp_path: Path) -> None:
    store = load(source="digits", limit=40, canaries=2, canary_repeats=3, canary_jitter=8).train
    mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network = save_script(mean, tmp_path / "mean.pt")
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": false, "do_normalize": false}')
    config = DataConfig(near_duplicates="cosine", near_features=str(network))
    found = find_clusters(store, config)
    assert not found.any()  # all of them have grey means: the cosine of (m, m, m) and (n, n, n) is 1
    config = config.model_copy(update={"near_features": str(tmp_path / "nothing.pt")})
    with pytest.raises(ConfigError, match=r"data\.near-features: no image model at"):
        find_clusters(store, config)


def test_clusters_of_many_images_are_kept_until_data_or_settings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters_module, "KEPT", 20)
    store = load(source="digits", limit=30, canaries=2, canary_jitter=8).train
    config = DataConfig(near_duplicates="cosine", cache_dir=str(tmp_path / "cache"))
    first = find_clusters(store, config)
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(clusters_module, "joined_by_cosine", None)
    assert np.array_equal(find_clusters(store, config), first)
    for other in (config.model_copy(update={"near_threshold": 0.9}), config.model_copy(update={"near_features": "x"})):
        with pytest.raises((TypeError, ConfigError)):
            find_clusters(store, other)
    with pytest.raises(TypeError):
        find_clusters(store.subset(np.arange(25)), config)
    monkeypatch.undo()
    monkeypatch.setattr(clusters_module, "KEPT", 20)
    blocked = config.model_copy(update={"cache_dir": str(kept)})
    with pytest.raises(ConfigError, match=r"set data\.cache-dir"):
        find_clusters(store, blocked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.near-threshold": 0.9}, "data.near-threshold=0.9 with data.near-duplicates=off"),
        ({"data.near-duplicates": "cosine", "data.near-threshold": 4}, "at most 1"),
        ({"data.near-duplicates": "phash", "data.near-threshold": 32}, "at most 31"),
        ({"data.near-duplicates": "phash", "data.near-features": "x"}, r"near-duplicates=cosine only \(got phash\)"),
        ({"partition.clusters": "spread", "partition.scheme": "class"}, "'iid' and 'shuffled' only"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat(settings)


# --- dealing ----------------------------------------------------------------------------------------------------------

clustered = st.lists(st.integers(0, 12), min_size=8, max_size=80).map(np.array)
"""Clusters of a few samples, as many as 80 of them alike."""


def dealt(groups: np.ndarray, shards: int, seed: int, labelled: bool, **settings: object) -> np.ndarray:
    labels = np.random.default_rng(seed).integers(0, 3, len(groups)) if labelled else None
    scheme = "iid" if labelled else "shuffled"
    config = PartitionConfig.model_validate({"scheme": scheme} | settings)
    return partition(len(groups), labels, 3 if labelled else 0, shards, config, seed, groups)


@given(clustered, st.integers(1, 6), st.integers(0, 9), st.booleans())
def test_spread_keeps_alike_samples_apart_and_shards_equal(
    clusters: np.ndarray, shards: int, seed: int, labelled: bool
) -> None:
    owner = dealt(clusters, shards, seed, labelled, clusters="spread")
    assert owner.shape == clusters.shape and owner.dtype == np.int32
    assert np.ptp(np.bincount(owner, minlength=shards)) <= 1
    for own in (owner[clusters == c] for c in np.unique(clusters)):
        counts = np.bincount(own, minlength=shards)
        assert counts.max() == -(-len(own) // shards)  # one where it is not larger than K
        assert counts.max() - counts.min() <= 1


@given(clustered, st.integers(2, 4), st.integers(0, 9))
def test_spread_keeps_alike_samples_apart_though_shards_are_unequal(
    clusters: np.ndarray, shards: int, seed: int
) -> None:
    sizes = ",".join(["6", "3", "2", "1"][:shards])
    try:
        owner = dealt(clusters, shards, seed, False, clusters="spread", sizes=sizes)
    except ConfigError:
        return  # a shard of none
    for own in (owner[clusters == c] for c in np.unique(clusters)):
        assert np.bincount(own).max() == -(-len(own) // shards)


@given(clustered, st.integers(1, 6), st.integers(0, 9), st.booleans())
def test_gather_never_splits_a_cluster_and_is_as_even_as_they_allow(
    clusters: np.ndarray, shards: int, seed: int, labelled: bool
) -> None:
    if len(np.unique(clusters)) < shards:
        with pytest.raises(ConfigError, match="without an image"):
            dealt(clusters, shards, seed, labelled, clusters="gather")
        return
    owner = dealt(clusters, shards, seed, labelled, clusters="gather")
    assert owner.shape == clusters.shape
    _, counts = np.unique(clusters, return_counts=True)
    for c in np.unique(clusters):
        assert len(set(owner[clusters == c])) == 1
    even = len(clusters) / shards
    largest = counts.max() if counts.max() > 1 else 1
    assert np.bincount(owner, minlength=shards).max() < even + largest
    if counts.max() == 1:
        assert np.ptp(np.bincount(owner, minlength=shards)) <= 1


def test_clusters_are_dealt_as_asked_with_sizes_and_classes_kept() -> None:
    clusters = np.r_[np.repeat([0, 1], 10), 2 + np.arange(180)]
    labels = np.arange(200) % 4
    for how in ("gather", "spread"):
        config = PartitionConfig(clusters=how, sizes="2,1,1")  # type: ignore[arg-type]
        owner = partition(200, labels, 4, 3, config, 0, clusters)
        assert np.bincount(owner).tolist() == [100, 50, 50]
        singles = owner[20:], labels[20:]
        for c in range(4):
            held = np.bincount(singles[0][singles[1] == c], minlength=3) / np.bincount(singles[0], minlength=3)
            assert np.abs(held - 0.25).max() < 0.05
        meet = max(np.bincount(owner[clusters == c]).max() for c in (0, 1))
        assert meet == (10 if how == "gather" else 4)
    assert not np.array_equal(partition(200, labels, 4, 3, config, 1, clusters), owner)


def test_a_run_deals_near_duplicates_as_asked(tiny: Tiny) -> None:
    for how, most in (("gather", 4), ("spread", 2)):
        config = tiny(NEAR, {"partition.clusters": how})
        data = load_splits(config.data)
        owner = deal(config, data)
        assert [int(np.bincount(owner[row]).max()) for row in data.canaries] == [most] * 3


# --- weighing and dropping --------------------------------------------------------------------------------------------


def visits_of(federate: Federate, config: RunConfig) -> tuple[Federation, np.ndarray]:
    fed = federate(config)
    fed.run()
    return fed, fed.strategy.ledger.visits


def test_near_duplicates_share_the_visits_of_one_image(tiny: Tiny, federate: Federate) -> None:
    config = tiny(NEAR, {"local-epochs": 40, "num-server-rounds": 1, "agc.mode": "off", "batch-size": 32})
    canaries = load_splits(config.data).canaries
    fed, visits = visits_of(federate, config)
    others = np.setdiff1d(np.arange(33), canaries)
    assert visits.sum() == 33 * 40  # as many images as without
    assert visits[canaries].sum(1).mean() == pytest.approx(visits[others].mean(), rel=0.25)
    assert fed.strategy.ledger.copies[canaries].tolist() == [[4.0] * 4] * 3


def test_dropped_duplicates_are_visited_never_and_the_others_see_as_many_images(tiny: Tiny, federate: Federate) -> None:
    changes: dict[str, Scalar] = {"data.duplicates": "drop", "redistribution.policy": "random+quarantine"}
    config = tiny(NEAR, changes, {"redistribution.fraction": 0.5, "num-server-rounds": 4, "local-epochs": 3})
    fed, visits = visits_of(federate, config)
    canaries = load_splits(config.data).canaries
    assert visits.sum() == 4 * 3 * 33
    assert (visits[canaries[:, 1:]] == 0).all() and (np.delete(visits, canaries[:, 1:].ravel()) > 0).all()
    assert sum(len(s.moves) for s in fed.rounds) > 0
    for owners in fed.owners:
        assert sorted(Counter(owners)) == [0, 1] and len(owners) == 33  # every sample is in one shard all the same


def test_an_order_names_dropped_samples_with_probability_nought(tiny: Tiny, federate: Federate) -> None:
    config = tiny(NEAR, {"data.duplicates": "drop", "num-server-rounds": 1})
    seen = Recorder()
    federate(config, seen).run()
    told = {int(i): float(p) for _, order in seen.orders for i, p in zip(order.ids, order.probability, strict=True)}
    assert {i for i, p in told.items() if p == 0} == set(load_splits(config.data).canaries[:, 1:].ravel().tolist())
    assert set(told) == set(range(33)) and set(told.values()) == {0.0, 1.0}


def test_a_shard_of_dropped_samples_alone_is_refused_and_never_made_by_moves(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(NEAR, {"data.duplicates": "drop"})
    dropped = load_splits(config.data).canaries[:, 1:].ravel()
    owner = np.zeros(33, int)
    owner[dropped] = 1
    np.save(tmp_path / "shards.npy", owner)
    asked = tiny(NEAR, {"data.duplicates": "drop", "partition.scheme": "file"})
    asked = RunConfig.from_flat(asked.to_flat() | {"partition.path": str(tmp_path / "shards.npy")})
    with pytest.raises(ConfigError, match=r"drop leaves shards \[1\] of 2 nothing to train on"):
        deal(asked, load_splits(asked.data))

    ledger = ledger_of(2, 2)

    def take_the_last(*_: object) -> Moves:
        return Moves.between(np.array([2]), 1, 0)

    asked_moves = [take_the_last], ledger, [], np.random.default_rng(0), config.redistribution
    assert len(propose(*asked_moves)) == 1
    ledger.copies[3] = np.inf
    assert len(propose(*asked_moves)) == 0


def test_a_bank_is_warmed_by_samples_that_are_visited(tiny: Tiny) -> None:
    config = tiny(ALL_T, {"agc.warm-passes": 3})
    report = train(config, make_order(config, probability=np.repeat([1, 0], 10).astype(np.float32))).report
    assert report.visits[10:].sum() == 0 and report.visits.sum() == 20
    assert report.bank_visits.sum() == 3 * 10 + 20


# --- finding canaries by their losses ---------------------------------------------------------------------------------


def test_a_run_tells_how_well_losses_find_its_canaries(run_dir: Path) -> None:
    run = RunDir(run_dir)
    canaries = load_splits(run.read_config().data).canaries
    rows = run.rows()
    assert rows[-1]["canary_auc"] == canaries_found(ShardLedger.load(run.ledger), canaries)
    assert all(0 <= row["canary_auc"] <= 1 for row in rows)
    line = f"AUC {rows[-1]['canary_auc']:.2f}"
    assert f"canaries found by loss: {line}" in ret_fl("show", run_dir).output
    assert f"| canaries found by loss | {line} (.5 is guessing) |" in run.summary.read_text()
