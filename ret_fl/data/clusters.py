"""Clusters of training images: exact copies and, where data.near-duplicates asks for them, images that are alike.

What is done about them: `RedistributeEnsemble` (data.duplicates) and `partition` (partition.clusters).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.decode import cache_dir, describe_files
from ret_fl.data.near import (
    NEAR_BITS,
    NEAR_COSINE,
    first_of_each,
    joined_by_cosine,
    joined_by_hash,
    perceptual_hashes,
    pixel_features,
)
from ret_fl.data.store import SampleStore

READ = 4096
"""Images read at a time."""
KEPT = 5000
"""Distinct images from which on clusters of near-duplicates are kept in the cache: fewer take seconds."""

Clusters = NDArray[np.int64]
"""For each sample, the lowest ID of those in its cluster: int64 [N]. A sample like no other is its own cluster."""


def find_clusters(store: SampleStore, config: DataConfig, device: torch.device | str = "cpu") -> Clusters:
    """The cluster of each sample.

    Exact copies are always in one cluster. 50,000 images of 32x32 take a minute or two by hash or by pixels; from
    `KEPT` distinct ones on the result is kept in data.cache-dir. device: of the network that data.near-features names.

    Raises:
        ConfigError: imagehash or the network is missing, the network cannot take the images, or the cache cannot be
            written.
    """
    exact = first_of_each(store.content_hashes)
    if config.near_duplicates == "off":
        return exact
    rows = np.unique(exact)
    if len(rows) < KEPT:
        joined = _joined(store, rows, config, device)
    else:
        joined = _cached(_path(store, config), lambda: _joined(store, rows, config, device))
    return rows[joined[np.searchsorted(rows, exact)]]


def near_threshold(config: DataConfig) -> float:
    """data.near-threshold, or what 0 means."""
    return config.near_threshold or (NEAR_BITS if config.near_duplicates == "phash" else NEAR_COSINE)


def describe_clusters(clusters: Clusters) -> str:
    """'45 of 245 samples repeat another one, in 5 clusters of up to 10'; '' where each is its own."""
    sizes = np.unique(clusters, return_counts=True)[1]
    repeats = len(clusters) - len(sizes)
    if not repeats:
        return ""
    return (
        f"{repeats:,} of {len(clusters):,} samples repeat another one, in {int((sizes > 1).sum()):,} clusters of up to "
        f"{sizes.max():,}"
    )


def _joined(store: SampleStore, rows: Clusters, config: DataConfig, device: torch.device | str) -> Clusters:
    """As `joined_by_hash`, among the given rows of the store."""
    parts = torch.from_numpy(rows).split(READ)
    least = near_threshold(config)
    if config.near_duplicates == "phash":
        return joined_by_hash(np.concatenate([perceptual_hashes(store.pixels(p).numpy()) for p in parts]), least)
    features = _feature_model(config.near_features, device)
    return joined_by_cosine(torch.cat([features(store.pixels(part)) for part in parts]), least)


def _feature_model(spec: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Features float32 [n, F] of images uint8 [n, C, H, W]: of their pixels, or of the network at `spec`."""
    if not spec:
        return pixel_features
    from ret_fl.audit.features import load_features

    try:
        network = load_features(spec, device=device)
    except ValueError as error:
        raise ConfigError(f"data.near-features: {error}") from error

    def features(images: Tensor) -> Tensor:
        try:
            return network.features(images)
        except ValueError as error:
            raise ConfigError(f"data.near-features: {error}") from error

    return features


def _path(store: SampleStore, config: DataConfig) -> Path:
    """Where the clusters of this data under these settings are kept."""
    known: list[object] = [store.fingerprint, config.near_duplicates, near_threshold(config), config.near_features]
    if config.near_features:
        network = Path(config.near_features).expanduser()
        files = [network] if network.is_file() else sorted(p for p in network.rglob("*") if p.is_file())
        known.append(describe_files(files, network.parent))
    return cache_dir(config) / f"clusters-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.npy"


def _cached(path: Path, compute: Callable[[], Clusters]) -> Clusters:
    if path.is_file():
        return np.load(path, allow_pickle=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before minutes of comparing
    except OSError as error:
        raise ConfigError(f"cannot create the cache {path.parent}: {error}; set data.cache-dir") from error
    found = compute()
    scratch = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        with scratch.open("wb") as file:
            np.save(file, found)
        scratch.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write the cache {path.parent}: {error}; set data.cache-dir") from error
    finally:
        scratch.unlink(missing_ok=True)
    return found
