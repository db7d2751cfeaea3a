"""How similar samples are to training images, in the features of an image model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.distances import Images, pixel_rows, require_same_size

# Features of one image differ by rounding between batches, and float32 cosines by 1e-6: above this they are one image.
# Distinct digits reach .9991 in the features of their classifier.
TWIN = 1 - 1e-5
MAX_TILE = (2048, 8192)


def similarity(
    generated_features: Images,
    train_features: Images,
    held_out_features: Images | None = None,
    *,
    name: str,
    memory_mb: int = 1024,
) -> schema.Similarity:
    """Cosine similarity of generated images to the most similar training image.

    percentile_95 of SSCD features is the memorization score of the Stable Diffusion papers (Somepalli et al. 2023,
    arXiv 2305.20086; IET-AGC), above_half their replication rate. The floors are those of held-out images, the
    background is percentile_95 of training images against the *other* ones. There, a cosine above 1 - 1e-5 counts as
    the same image and every image counts once: copies in the training set would otherwise make the background 1. None
    where all training images are one.

    Args:
        generated_features, train_features, held_out_features: float [G, F], [N, F] and [H, F] of one `FeatureModel`;
            any length, they are normalised here.
        name: of that model.
        memory_mb: bound on the tensors held beyond inputs and outputs; the result does not depend on it.

    Raises:
        ValueError: different F, values that are not finite, rows that are all zero, or memory_mb < 1.
    """
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be >= 1, got {memory_mb}")
    train = _feature_rows(train_features, f"{name} features of training images")
    generated = _feature_rows(generated_features, f"{name} features of generated images", like=train)
    best = _most_similar(generated, train, memory_mb)
    floor = None
    if held_out_features is not None:
        held_out = _feature_rows(held_out_features, f"{name} features of held-out images", like=train)
        floor = _most_similar(held_out, train, memory_mb)
    background = _background(train, memory_mb)
    return schema.Similarity(
        features=name,
        mean=float(best.mean()),
        percentile_50=_percentile(best, 50),
        percentile_95=_percentile(best, 95),
        above_half=_above_half(best),
        floor_percentile_95=None if floor is None else _percentile(floor, 95),
        floor_above_half=None if floor is None else _above_half(floor),
        background_percentile_95=_percentile(background, 95) if len(background) else None,
    )


def _feature_rows(features: Images, name: str, like: Tensor | None = None) -> Tensor:
    rows = pixel_rows(features, name).float()
    if like is not None:
        require_same_size(rows, like, name, "those of training images")
        rows = rows.to(like.device)
    if zero := int((rows == 0).all(1).sum()):
        raise ValueError(
            f"{name} are all zero in {zero} of {len(rows)} rows, so they have no cosine: use other features"
        )
    return rows


def _percentile(values: Tensor, percent: float) -> float:
    return float(values.quantile(percent / 100))


def _above_half(values: Tensor) -> float:
    return float((values > 0.5).double().mean())


def _most_similar(queries: Tensor, points: Tensor, memory_mb: int) -> Tensor:
    """float64 [G]: the largest cosine of every query ([G, F]) to the points ([N, F])."""
    best = queries.new_full((len(queries),), -1.0)
    for row, _, cosine in _cosine_tiles(queries, points, memory_mb):
        rows = slice(row, row + len(cosine))
        best[rows] = torch.maximum(best[rows], cosine.amax(1))
    return best.clamp(max=1).double().cpu()


def _background(points: Tensor, memory_mb: int) -> Tensor:
    """float64 [M]: the largest cosine of every distinct point ([N, F]) to a distinct other one."""
    best = points.new_full((len(points),), -torch.inf)
    repeated = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for row, col, cosine in _cosine_tiles(points, points, memory_mb):
        rows = slice(row, row + len(cosine))
        twins = cosine > TWIN
        # Below the diagonal are the earlier images; of twins only the first counts.
        repeated[rows] |= twins.tril(row - col - 1).any(1)
        best[rows] = torch.maximum(best[rows], cosine.masked_fill_(twins, -torch.inf).amax(1))
    return best[~repeated & best.isfinite()].double().cpu()


def _cosine_tiles(queries: Tensor, points: Tensor, memory_mb: int) -> Iterator[tuple[int, int, Tensor]]:
    """Tiles of the cosines of rows, float32, each with its first row and column."""
    elements, width = memory_mb * 2**20 // 4, points.shape[1]
    tile_p = min(len(points), MAX_TILE[1], max(1, elements // (6 * width)))
    tile_q = min(len(queries), MAX_TILE[0], max(1, elements // (6 * max(width, tile_p))))
    for col in range(0, len(points), tile_p):
        unit_points = _unit(points[col : col + tile_p])
        for row in range(0, len(queries), tile_q):
            yield row, col, _unit(queries[row : row + tile_q]) @ unit_points.T


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).float()
