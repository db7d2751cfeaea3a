"""How samples are first dealt to shards. Every sample lands in exactly one shard and no shard is empty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ret_fl.config import ConfigError, PartitionConfig
from ret_fl.loading import load
from ret_fl.plugins import SHARD_POLICIES


def partition(
    num_samples: int,
    labels: np.ndarray | None,
    num_classes: int,
    shards: int,
    config: PartitionConfig,
    seed: int,
    clusters: np.ndarray | None = None,
) -> np.ndarray:
    """The shard of each sample: int32 [num_samples], each in [0, shards).

    Args:
        num_samples: how many samples there are to deal.
        labels: int [num_samples], or None; 'iid' then cannot balance classes and deals as 'shuffled' does.
        num_classes: labels lie in [0, num_classes). Classes without a sample take no part.
        shards: K.
        config: the scheme and its parameters.
        seed: of every random choice made here.
        clusters: int [num_samples], equal for copies of one another; read unless partition.clusters is 'any'.

    Raises:
        ConfigError: the scheme cannot fill the shards, needs labels that are missing, or its file does not fit.
    """
    if num_samples < shards:
        raise ConfigError(
            f"too few images ({num_samples}) for {shards} shards: lower shards, or raise data.limit (0 takes all)"
        )
    if config.sizes and config.scheme in ("class", "dirichlet", "file"):
        raise ConfigError(
            f"partition.sizes holds for the schemes 'iid' and 'shuffled' only: empty it for {config.scheme!r}"
        )
    if labels is not None and (len(labels) != num_samples or np.any((labels < 0) | (labels >= num_classes))):
        raise ValueError(f"labels must be {num_samples} numbers in [0, {num_classes})")
    if labels is None and config.scheme in ("class", "dirichlet"):
        raise ConfigError(f"partition.scheme={config.scheme} needs classes and these images have none: use 'iid'")
    rng = np.random.default_rng(seed)
    if config.clusters != "any":
        if clusters is None or config.scheme not in ("iid", "shuffled"):
            raise ValueError(f"partition.clusters={config.clusters} needs clusters, and the scheme 'iid' or 'shuffled'")
        balanced = labels if config.scheme == "iid" else None
        sizes = shard_sizes(config, num_samples, shards)
        owner = by_cluster(clusters, balanced, sizes, config.clusters == "gather", rng).astype(np.int32)
    else:
        owner = _dealt(num_samples, labels, shards, config, rng)
    empty = np.flatnonzero(np.bincount(owner, minlength=shards) == 0)
    if len(empty):
        raise ConfigError(
            f"partition.scheme={config.scheme} leaves shards {empty.tolist()} of {shards} without an image: "
            "lower shards, raise data.limit, or change partition.scheme or its parameters"
        )
    return owner


def _dealt(
    num_samples: int, labels: np.ndarray | None, shards: int, config: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """What the shard policy that the scheme names says, checked: int32 [num_samples]."""
    (policy,) = load(SHARD_POLICIES, config.scheme, config.options)
    dealt = np.asarray(policy.call(num_samples, labels, shards, config, rng))
    if dealt.shape != (num_samples,) or dealt.dtype.kind not in "iu" or dealt.min() < 0 or dealt.max() >= shards:
        raise ConfigError(
            f"partition.scheme={config.scheme} must give {num_samples} whole numbers in 0..{shards - 1}, one a sample "
            f"(got shape {dealt.shape}, {dealt.dtype})"
        )
    return dealt.astype(np.int32)


def interleave(counts: np.ndarray) -> np.ndarray:
    """Group numbers (int64 [sum of counts]), group g standing counts[g] times, spread as evenly as they go.

    Every stretch holds the groups in proportion to their counts; equal counts give 0, 1, .., K-1, 0, 1, ...
    """
    groups = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(c) for c in counts]) if len(counts) else np.empty(0)
    keys = (within + 0.5) / np.asarray(counts)[groups]
    return groups[np.lexsort((groups, keys))]


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """int64 counts that sum to `total` exactly and follow `weights`; what rounding leaves goes to the largest rests."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def _members(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The sample IDs of each class that has any, each shuffled."""
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


BY_SPEED = "speed"
"""partition.sizes: relative to how fast the nodes train, as measured when they introduce themselves."""


def shard_sizes(config: PartitionConfig, num_samples: int, shards: int) -> np.ndarray:
    """Samples in each shard as `partition.sizes` says: int64 [shards]. Raises `ConfigError` if it says it badly."""
    if config.sizes in ("", BY_SPEED):  # before speeds are measured, all nodes count as equally fast
        return largest_remainder(np.ones(shards), num_samples)
    try:
        weights = np.array([float(s) for s in config.sizes.split(",")])
    except ValueError:
        raise ConfigError(f"partition.sizes must be numbers joined by commas (got {config.sizes!r})") from None
    if len(weights) != shards or not np.all(np.isfinite(weights) & (weights > 0)):
        raise ConfigError(f"partition.sizes must be {shards} positive numbers, one a shard (got {config.sizes!r})")
    return largest_remainder(weights, num_samples)


def by_cluster(
    clusters: np.ndarray, labels: np.ndarray | None, sizes: np.ndarray, gather: bool, rng: np.random.Generator
) -> np.ndarray:
    """The shard of each sample, int64 [n], where clusters are kept together (`gather`) or apart.

    Clusters of two and more are dealt first, the largest first: whole to the shard with most room left of `sizes`
    (int64 [K], their sum is n); or a sample to each shard in turn, the rest to those with most room, so that K or fewer
    alike samples never meet. What is like no other fills the shards up, its classes in proportion (`labels`: int [n]).
    """
    _, inverse, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    owner, room = np.full(len(clusters), -1), sizes.astype(np.int64).copy()
    groups = np.flatnonzero(counts > 1)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    for group in groups[np.lexsort((rng.permutation(len(groups)), -counts[groups]))]:
        ids = rng.permutation(members[group])
        by_room = np.lexsort((rng.permutation(len(room)), -room))
        target = np.full(len(ids), by_room[0]) if gather else by_room[np.arange(len(ids)) % len(room)]
        owner[ids] = target
        room -= np.bincount(target, minlength=len(room))
    singles = np.flatnonzero(owner < 0)
    if len(singles):
        left = largest_remainder(room.clip(0), len(singles))
        order = rng.permutation(singles) if labels is None else singles[np.concatenate(_members(labels[singles], rng))]
        owner[order] = interleave(left)
    return owner


def shuffled(
    num_samples: int, labels: np.ndarray | None, shards: int, config: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """Dealt at random, in the sizes that partition.sizes says."""
    owner = np.repeat(np.arange(shards), shard_sizes(config, num_samples, shards))
    return rng.permutation(owner)


def iid(
    num_samples: int, labels: np.ndarray | None, shards: int, config: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """Dealt at random with the classes in proportion; without classes as 'shuffled'."""
    if labels is None:
        return shuffled(num_samples, labels, shards, config, rng)
    owner = np.empty(num_samples, np.int64)
    # One deal runs through all classes without starting over, so the rests of the classes spread over the shards.
    owner[np.concatenate(_members(labels, rng))] = interleave(shard_sizes(config, num_samples, shards))
    return owner


def by_class(
    num_samples: int, labels: np.ndarray | None, shards: int, config: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """Each shard holds partition.classes-per-shard whole classes, or its part of them."""
    assert labels is not None
    members = _members(labels, rng)
    per_shard = min(config.classes_per_shard, len(members))
    if shards * per_shard < len(members):
        raise ConfigError(
            f"{shards} shards of {per_shard} classes cannot hold {len(members)} classes: raise "
            f"partition.classes-per-shard to {-(-len(members) // shards)} or more, or raise shards"
        )
    slots = np.arange(shards * per_shard)  # slot i is in shard i // per_shard and takes class i mod C
    owner = np.empty(num_samples, np.int64)
    dealt = 0
    for c, ids in enumerate(members):
        holders = slots[slots % len(members) == c] // per_shard
        owner[ids] = holders[(dealt + np.arange(len(ids))) % len(holders)]
        dealt += len(ids)
    return owner


def dirichlet(
    num_samples: int, labels: np.ndarray | None, shards: int, config: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """Each class is spread over the shards by shares drawn from a Dirichlet distribution (partition.alpha)."""
    assert labels is not None
    owner = np.empty(num_samples, np.int64)
    for ids in _members(labels, rng):
        shares = rng.dirichlet(np.full(shards, config.alpha))
        owner[ids] = np.repeat(np.arange(shards), largest_remainder(shares, len(ids)))
    # A small alpha can leave a shard nothing; redrawing might never end, so the largest shard gives one sample.
    counts = np.bincount(owner, minlength=shards)
    for empty in np.flatnonzero(counts == 0):
        donor = counts.argmax()
        owner[rng.choice(np.flatnonzero(owner == donor))] = empty
        counts[donor] -= 1
    return owner


def by_file(
    num_samples: int, labels: np.ndarray | None, shards: int, config: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """As the list in partition.path says."""
    path = Path(config.path).expanduser()
    if not config.path or path.suffix not in (".npy", ".json"):
        raise ConfigError(f"partition.scheme=file needs a .npy or .json file in partition.path (got {config.path!r})")
    try:
        owner = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.array(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"partition.path: cannot read {path}: {error}") from error
    if owner.shape != (num_samples,) or not np.issubdtype(owner.dtype, np.integer):
        raise ConfigError(
            f"partition.path: {path} must hold {num_samples} integers, one a training sample "
            f"(got shape {owner.shape}, {owner.dtype})"
        )
    if owner.min() < 0 or owner.max() >= shards:
        raise ConfigError(
            f"partition.path: {path} names shards {owner.min()} to {owner.max()}, but there are {shards}: "
            "numbers must be in 0..shards-1"
        )
    return owner
