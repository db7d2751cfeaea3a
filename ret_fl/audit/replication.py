"""Copies of training images among generated ones, by exact nearest-neighbour search in pixel space.

Three scores share one search. All distances D(g, x) are sums of squared pixel differences over C*H*W in [0, 1].

- `neighbour_ratio` and `memorized_quantity`: MQ of IET/AGC (arXiv 2407.15328, 2502.09434), D(g, x1) over the mean of
  the 50 smallest D(g, x). Its natural floor is high on low-dimensional data: print it for held-out images beside MQ.
- `carlini_ratio`: the un-squared form of Carlini et al. 2023 (arXiv 2301.13188), with their alpha.
- `calibrated_ratio` and `copy_rate`: D to the nearest training image over D to the nearest image of an equally large
  disjoint real set, which cancels how densely real images lie in that region. The headline number.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit.distances import Images, nearest, pixel_rows, require_same_size

PAPER_TAUS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def deduplicate(images: Images) -> Tensor:
    """int64 [M]: the first occurrence of every distinct image, ascending; images are equal if so in float32."""
    first = _first_occurrence(pixel_rows(images))
    return first.unique()


def neighbour_ratio(generated: Images, train: Images, k: int = 50) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest training image over the mean of the k nearest (that one included).

    Duplicates are removed from `train` first: left in, k copies of one image make the ratio of its copy 1, not 0.

    Returns:
        ratio float64 [G] in [0, 1], 0 for an exact copy; index int64 [G]: the row of `train` (its first occurrence).

    Raises:
        ValueError: fewer than k distinct training images, or as in `nearest`.
    """
    return _ratio_to_mean(generated, train, k, power=1.0, alpha=1.0)


def carlini_ratio(generated: Images, train: Images, k: int = 50, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """l2(g, x1) / (alpha * mean of the k nearest l2), un-squared (Carlini et al. 2023); memorized when small (<= 1).

    Returns and errors as in `neighbour_ratio`; the ratio lies in [0, 1 / alpha].
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    return _ratio_to_mean(generated, train, k, power=0.5, alpha=alpha)


def _ratio_to_mean(generated: Images, train: Images, k: int, power: float, alpha: float) -> tuple[Tensor, Tensor]:
    generated, rows = _unit_rows(generated, "generated"), _unit_rows(train, "train")
    kept = deduplicate(rows)
    if not 1 <= k <= len(kept):
        raise ValueError(f"k must lie in 1..{len(kept)}, the number of distinct training images, got {k}")
    squared, index = nearest(generated, rows[kept.to(rows.device)], k)
    distance = squared**power
    ratio = distance[:, 0] / (alpha * distance.mean(1))
    # With k = 1 an exact copy is 0/0; a copy it is.
    return torch.where(distance[:, 0] == 0, 0.0, ratio), kept[index[:, 0]]


def memorized_quantity(ratio: Tensor | np.ndarray, taus: Iterable[float] = PAPER_TAUS) -> dict[float, float]:
    """MQ as a share: {tau: share of samples with ratio < tau}. Multiply by the sample count for the paper's number."""
    values = torch.as_tensor(ratio)
    if values.numel() == 0 or torch.isnan(values).any():
        raise ValueError(f"ratio must hold at least one number and no NaN, got shape {tuple(values.shape)}")
    return {tau: float((values < tau).double().mean()) for tau in taus}


def calibrated_ratio(generated: Images, train: Images, reference: Images) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest training image over that to the nearest reference image.

    Args:
        generated: [G, ...]. Real held-out images here give the null of the score.
        train: [N, ...]; duplicates do not matter.
        reference: [N, ...] real images of the same source, none in `train`, as many as `train` has distinct ones.

    Returns:
        ratio float64 [G] >= 0, 0 for an exact copy (infinite for a copy of a reference image); index int64 [G]: the
        nearest row of `train`, its first occurrence.

    Raises:
        ValueError: `reference` shares an image with `train`, or as in `nearest`.

    Warns:
        UserWarning: the two sets have different numbers of distinct images, which biases the ratio.
    """
    generated = _unit_rows(generated, "generated")
    train, reference = _unit_rows(train, "train"), _unit_rows(reference, "reference")
    require_same_size(train, reference, "train", "reference")
    train_keys, reference_keys = set(_content_keys(train)), set(_content_keys(reference))
    if shared := train_keys & reference_keys:
        raise ValueError(
            f"reference shares {len(shared)} images with train: use real images that were never trained on, "
            "else copies of the shared ones pass unnoticed"
        )
    if len(train_keys) != len(reference_keys):
        warnings.warn(
            f"train has {len(train_keys)} distinct images, reference {len(reference_keys)}: the calibrated ratio is "
            "only unbiased for sets of equal size",
            stacklevel=2,
        )
    kept = deduplicate(train)
    to_train, index = nearest(generated, train[kept.to(train.device)], 1)
    to_reference, _ = nearest(generated, reference, 1)
    return (to_train / to_reference)[:, 0], kept[index[:, 0]]


@dataclass(frozen=True)
class CopyReport:
    """Copies among G generated images."""

    rate: float  # share of generated images that are copies
    low: float  # 95 % Wilson interval of the rate: sampling noise only, not that of the training seed
    high: float
    distinct: int  # distinct training images copied
    copied: Tensor  # bool [G]
    ratio: Tensor  # float64 [G], `calibrated_ratio`
    index: Tensor  # int64 [G], nearest training row
    canary_rate: float | None = None  # share of generated images that copy a canary; None without canaries
    ordinary_rate: float | None = None  # share that copies any other training image; the two add up to `rate`
    canary_hits: Tensor | None = None  # int64 [n], copies of each canary


def copy_rate(generated: Images, train: Images, reference: Images, threshold: float = 0.3) -> float:
    """Share of generated images with `calibrated_ratio` below `threshold`; errors and warnings as there."""
    return copy_report(generated, train, reference, threshold).rate


def copy_report(
    generated: Images, train: Images, reference: Images, threshold: float = 0.3, *, canaries: Images | None = None
) -> CopyReport:
    """Which generated images are copies, of what, and how sure the rate is.

    Args:
        generated, train, reference: as in `calibrated_ratio`.
        threshold: calibrated ratio below which an image is a copy, > 0.
        canaries: int64 [n, repeats], the rows of `train` that hold each canary.

    Raises:
        ValueError: threshold <= 0, canary rows outside `train`, or as in `calibrated_ratio`.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0 (0.3 by default), got {threshold}")
    ratio, index = calibrated_ratio(generated, train, reference)
    copied = ratio < threshold
    rate = float(copied.double().mean())
    low, high = wilson_interval(int(copied.sum()), len(copied))
    hits = None if canaries is None else _canary_hits(index[copied], pixel_rows(train), torch.as_tensor(canaries))
    canary_rate = None if hits is None else float(hits.sum()) / len(copied)
    return CopyReport(
        rate=rate,
        low=low,
        high=high,
        distinct=len(index[copied].unique()),
        copied=copied,
        ratio=ratio,
        index=index,
        canary_rate=canary_rate,
        ordinary_rate=None if canary_rate is None else rate - canary_rate,
        canary_hits=hits,
    )


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (95 % by default): unlike a bootstrap it does not collapse at 0 hits."""
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"need 0 <= hits <= total and total >= 1, got {hits} of {total}")
    share, scale = hits / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def _canary_hits(copied_rows: Tensor, train: Tensor, canaries: Tensor) -> Tensor:
    """int64 [n]: how many of `copied_rows` (first occurrences in `train`) hold each canary of [n, repeats]."""
    if canaries.ndim != 2 or canaries.is_floating_point():
        raise ValueError(f"canaries must be int64 [n, repeats], got {canaries.dtype} {tuple(canaries.shape)}")
    if canaries.numel() and not 0 <= int(canaries.min()) <= int(canaries.max()) < len(train):
        raise ValueError(f"canary rows must lie in 0..{len(train) - 1}, the rows of train")
    first = _first_occurrence(train)[canaries.cpu().long()]
    return torch.stack([torch.isin(copied_rows, rows).sum() for rows in first]) if len(first) else first.new_zeros(0)


def _unit_rows(images: Images, name: str) -> Tensor:
    """`pixel_rows`, with a warning when they cannot be images in [0, 1]: mixed ranges hide every copy."""
    rows = pixel_rows(images, name)
    low, high = rows.min().item(), rows.max().item()
    if low < -0.5 or high > 1.5:
        warnings.warn(f"{name} range over {low:.3g}..{high:.3g}, expected [0, 1]: rescale all sets alike", stacklevel=4)
    return rows


def _content_keys(rows: Tensor) -> list[bytes]:
    """A digest of every row's float32 values; adding 0 makes -0.0 and 0.0 the same image."""
    return [hashlib.sha256(row.tobytes()).digest() for row in (rows.float() + 0.0).cpu().numpy()]


def _first_occurrence(rows: Tensor) -> Tensor:
    """int64 [N]: for every row, the first row with the same content."""
    seen: dict[bytes, int] = {}
    return torch.tensor([seen.setdefault(key, row) for row, key in enumerate(_content_keys(rows))])
