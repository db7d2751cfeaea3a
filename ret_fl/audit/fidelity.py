"""How good and how diverse generated images are, in the features of a network."""

import warnings

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.classifier import OF_TURNS, FeatureClassifier
from ret_fl.audit.distances import MEMORY_MB, Images, nearest, pixel_rows, require_same_size
from ret_fl.audit.features import FeatureModel, checked_features
from ret_fl.audit.inception import SPLITS, inception_score
from ret_fl.audit.realset import deduplicate

# Frechet distances of 500 samples move by +-.3 with the noise seed (digits, 64 features).
ENOUGH_SAMPLES = 1000
BLOCK_ROWS = 1024
"""Rows looked at, or compared with all others, at a time; fewer where they would not fit in memory."""
NEIGHBOUR = 3
ENOUGH_HELD_OUT = 50


def fidelity(
    model: FeatureModel,
    generated: Images,
    held_out: Images | None,
    train: Images,
    *,
    seed: int = 0,
    memory_mb: int = MEMORY_MB,
) -> schema.Fidelity:
    """Quality and diversity of generated images in the features of `model`.

    They are compared with the held-out images, or with the distinct training images where fewer than 50 are held out.
    Frechet distances fall with the number of images on either side: compare only audits of equal numbers.
    real_*: a random choice of as many distinct training images as there are generated ones (all, if fewer) in their
    place; None where the training images are what is compared with. train_frechet and inception_score are of
    Inception-v3 only, as papers have them. `confident` needs a `FeatureClassifier` of classes.

    Args:
        model: a `FeatureClassifier`, a `load_features` result, or any `FeatureModel`.
        generated, train: [G, C, H, W] and [N, C, H, W], float in [0, 1] or uint8.
        held_out: real images never trained on, or None.
        seed: of the random choice.
        memory_mb: bound on what is held beyond the images, their features (in float64) and what the model itself needs.

    Returns:
        The numbers; `images` counts the real images compared with.

    Raises:
        ValueError: fewer than 4 images in a set (the precision's radius is that of the 3rd neighbour), images that
            the model refuses, or features that are not finite.

    Warns:
        UserWarning: fewer than 1000 generated images, or fewer distinct training images than generated ones.
    """
    generated, train = torch.as_tensor(generated), torch.as_tensor(train)
    distinct = deduplicate(train)
    real, rows, against = train, distinct, "train"
    if held_out is not None and len(held_out) >= ENOUGH_HELD_OUT:
        real, rows, against = torch.as_tensor(held_out), torch.arange(len(held_out)), "held-out"
    fewest = min(len(generated), len(rows), len(distinct))
    if fewest <= NEIGHBOUR:
        raise ValueError(f"fidelity needs at least {NEIGHBOUR + 1} (distinct) images in every set, got {fewest}")

    def features_of(images: Tensor, rows: Tensor) -> Tensor:
        return _features(model, images, rows, memory_mb)

    real_features, features = features_of(real, rows), features_of(generated, torch.arange(len(generated)))
    precision, recall = precision_recall(real_features, features, NEIGHBOUR, memory_mb=memory_mb)
    confident = None
    if isinstance(model, FeatureClassifier) and model.name != OF_TURNS:
        confident = confident_share(model.probabilities(generated))
    published = _published(model, generated, features, train, distinct, seed, memory_mb)
    scores: tuple[float, float, float] | tuple[None, None, None] = (None, None, None)
    if against == "held-out":
        stand_ins = features_of(train, _stand_ins(distinct, len(generated), model.name, seed))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # few samples: said once, of the generated
            distance = frechet_distance(real_features, stand_ins)
        scores = distance, *precision_recall(real_features, stand_ins, NEIGHBOUR, memory_mb=memory_mb)
    return schema.Fidelity(
        features=model.name,
        against=against,
        images=len(rows),
        frechet=frechet_distance(real_features, features),
        kid=kernel_distance(real_features, features, memory_mb=memory_mb),
        precision=precision,
        recall=recall,
        confident=confident,
        real_frechet=scores[0],
        real_precision=scores[1],
        real_recall=scores[2],
        recipe=model.recipe if isinstance(model, FeatureClassifier) else model.name,
        **published,
    )


def _published(
    model: FeatureModel, generated: Tensor, features: Tensor, train: Tensor, distinct: Tensor, seed: int, memory_mb: int
) -> dict[str, float]:
    """What papers report of Inception-v3: FID against the training images, and IS; nothing of other models."""
    classify = getattr(model, "class_probabilities", None)
    if classify is None or len(generated) < SPLITS or (probabilities := classify(generated)) is None:
        return {}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # few samples: said once
        frechet = frechet_distance(_features(model, train, torch.arange(len(train)), memory_mb), features)
    score, deviation = inception_score(probabilities)
    found = {"train_frechet": frechet, "inception_score": score, "inception_deviation": deviation}
    if len(distinct) >= SPLITS:
        stand_ins = distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))]
        found["real_inception_score"] = inception_score(classify(train[stand_ins[: len(generated)]]))[0]
    return found


def _stand_ins(distinct: Tensor, count: int, name: str, seed: int) -> Tensor:
    """`count` rows of distinct training images, to be put in the generated ones' place."""
    if len(distinct) < count:
        warnings.warn(
            f"{name}: only {len(distinct)} distinct training images stand in for {count} generated ones, so "
            "their Frechet distance is biased upwards",
            stacklevel=3,
        )
    return distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:count]]


def _features(model: FeatureModel, images: Tensor, rows: Tensor, memory_mb: int) -> Tensor:
    """Features of some of the images, a part of them read at a time, as bytes and as float32 at most."""
    size = _block(memory_mb, 5 * images[0].numel())
    parts = rows.to(images.device).split(size)
    return torch.cat([checked_features(model.features(images[part]), model.name, len(part)) for part in parts])


def _block(memory_mb: int, row_bytes: int) -> int:
    return max(1, min(BLOCK_ROWS, memory_mb * 2**20 // row_bytes))


def frechet_distance(features_a: Images, features_b: Images) -> float:
    """Frechet distance of Gaussians fitted to real ([N, F]) and generated ([M, F]) features (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), with symmetric eigenvalues only: no complex square roots.

    Raises:
        ValueError: fewer than 2 rows on a side, different F, or values that are not finite.

    Warns:
        UserWarning: fewer than 1000 generated rows, whose estimate depends on the noise seed.
    """
    a, b = _feature_pair(features_a, features_b)
    if len(b) < ENOUGH_SAMPLES:
        warnings.warn(
            f"Frechet distance of {len(b)} generated samples: below {ENOUGH_SAMPLES} it moves with the noise seed",
            stacklevel=2,
        )
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(features_a: Images, features_b: Images, *, memory_mb: int = MEMORY_MB) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / F + 1)^3 (Binkowski et al. 2018), over all rows at once.

    Its expectation is 0 for equal distributions, so single values may be negative.

    Args:
        features_a, features_b: [N, F] and [M, F], real and generated.
        memory_mb: bound on what is held beyond the features in float64.

    Raises:
        ValueError: fewer than 2 rows on a side, different F, or values that are not finite.
    """
    a, b = _feature_pair(features_a, features_b)

    def within(x: Tensor) -> float:
        own = (x.square().sum(1) / x.shape[1] + 1) ** 3
        return (_kernel_sum(x, x, memory_mb) - float(own.sum())) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * _kernel_sum(a, b, memory_mb) / (len(a) * len(b))


def _kernel_sum(x: Tensor, y: Tensor, memory_mb: int) -> float:
    parts = x.split(_block(memory_mb, 8 * len(y)))
    return sum(float((rows @ y.T).div_(y.shape[1]).add_(1).pow_(3).sum()) for rows in parts)


def precision_recall(
    real_features: Images, generated_features: Images, k: int = 3, *, memory_mb: int = MEMORY_MB
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    A manifold is the union of balls around its points, each reaching to that point's k-th nearest other point.
    Precision is the share of generated points on the real manifold, recall the share of real points on the generated.

    Args:
        real_features: [N, F].
        generated_features: [M, F].
        k: neighbour that sets the radius, < N and < M. Precision grows with it.
        memory_mb: bound on what is held beyond the features in float64.

    Raises:
        ValueError: k outside 1..min(N, M)-1, different F, or values that are not finite.
    """
    real, generated = _feature_pair(real_features, generated_features)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"k must lie in 1..{min(len(real), len(generated)) - 1}, below both set sizes, got {k}")
    return _share_on_manifold(generated, real, k, memory_mb), _share_on_manifold(real, generated, k, memory_mb)


def _share_on_manifold(points: Tensor, centres: Tensor, k: int, memory_mb: int) -> float:
    # Of the k + 1 nearest, the first is the centre itself or a twin of it.
    radii = nearest(centres, centres, k + 1, memory_mb=memory_mb)[0][:, k].sqrt()
    # Written in place: small results between large blocks would keep the C library from using their memory again.
    inside, start = torch.empty(len(points), dtype=torch.bool), 0
    for rows in points.split(_block(memory_mb, 9 * len(centres))):
        near = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").le(radii)
        torch.any(near, 1, out=inside[start : start + len(rows)])
        start += len(rows)
    return float(inside.double().mean())


def confident_share(probabilities: Tensor | np.ndarray, threshold: float = 0.9) -> float:
    """Share of rows of `probabilities` [N, classes] whose largest entry exceeds `threshold`."""
    values = torch.as_tensor(probabilities)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"probabilities must be a non-empty [N, classes] array, got shape {tuple(values.shape)}")
    return float((values.max(1).values > threshold).double().mean())


def _feature_pair(a: Images, b: Images) -> tuple[Tensor, Tensor]:
    """Both sets as float64 [N, F] on the CPU: covariances and radii are differences of close numbers."""
    rows_a, rows_b = pixel_rows(a, "real features"), pixel_rows(b, "generated features")
    require_same_size(rows_a, rows_b, "real features", "generated features")
    if min(len(rows_a), len(rows_b)) < 2:
        raise ValueError(f"need at least 2 rows of features on each side, got {len(rows_a)} and {len(rows_b)}")
    return rows_a.cpu().double(), rows_b.cpu().double()
