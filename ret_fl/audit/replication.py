"""Copies of training images among generated ones, by exact nearest-neighbour search in pixel space.

Three scores share one search. All distances D(g, x) are sums of squared pixel differences over C*H*W in [0, 1].

- `neighbour_ratio` and `memorized_quantity`: MQ of IET/AGC (arXiv 2407.15328, 2502.09434), D(g, x1) over the mean of
  the 50 smallest D(g, x). Its natural floor is high on low-dimensional data: print it for held-out images beside MQ.
- `carlini_ratio`: the un-squared form of Carlini et al. 2023 (arXiv 2301.13188), with their alpha.
- `calibrated_ratio` and `copy_rate`: D to the nearest training image over D to the nearest image of an equally large
  disjoint real set, which cancels how densely real images lie in that region. The headline number.

`ret_fl.audit.copies` computes all of them at once, beside the same of held-out images. Images may be uint8: they are
read as floats piece by piece, so beyond the images a call holds `memory_mb` of tensors, its results, and about 200
bytes for each training and reference image.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit.distances import MEMORY_MB, Images
from ret_fl.audit.realset import Device, Variant, queries_and_train, reference_set

PAPER_TAUS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAPER_K = 50
CARLINI_ALPHA = 0.5


def neighbour_ratio(
    generated: Images, train: Images, k: int = PAPER_K, *, device: Device = None, memory_mb: int = MEMORY_MB
) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest training image over the mean of the k nearest (that one included).

    Duplicates are removed from `train` first: left in, k copies of one image make the ratio of its copy 1, not 0.

    Args:
        generated: [G, ...] and
        train: [N, ...], float in [0, 1] or uint8.
        k: how many of the distinct training images the mean takes.
        device, memory_mb: as in `nearest`.

    Returns:
        ratio float64 [G] in [0, 1], 0 for an exact copy; index int64 [G]: the row of `train` (its first occurrence).

    Raises:
        ValueError: fewer than k distinct training images, or as in `nearest`.
    """
    queries, real = queries_and_train(generated, train, device, memory_mb)
    squared, index = real.nearest(queries, k)
    return ratio_to_mean(squared), index[:, 0]


def carlini_ratio(
    generated: Images,
    train: Images,
    k: int = PAPER_K,
    alpha: float = CARLINI_ALPHA,
    *,
    device: Device = None,
    memory_mb: int = MEMORY_MB,
) -> tuple[Tensor, Tensor]:
    """l2(g, x1) / (alpha * mean of the k nearest l2), un-squared (Carlini et al. 2023); memorized when small (<= 1).

    Other arguments, returns and errors as in `neighbour_ratio`; the ratio lies in [0, 1 / alpha].
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    queries, real = queries_and_train(generated, train, device, memory_mb)
    squared, index = real.nearest(queries, k)
    return ratio_to_mean(squared.sqrt()) / alpha, index[:, 0]


def ratio_to_mean(distance: Tensor) -> Tensor:
    """[G]: the first column of ascending [G, k] over the mean of all. With k = 1 a copy is 0/0: a copy it is."""
    return torch.where(distance[:, 0] == 0, 0.0, distance[:, 0] / distance.mean(1))


def memorized_quantity(ratio: Tensor | np.ndarray, taus: Iterable[float] = PAPER_TAUS) -> dict[float, float]:
    """MQ as a share: {tau: share of samples with ratio < tau}. Multiply by the sample count for the paper's number."""
    values = torch.as_tensor(ratio)
    if values.numel() == 0 or torch.isnan(values).any():
        raise ValueError(f"ratio must hold at least one number and no NaN, got shape {tuple(values.shape)}")
    return {tau: float((values < tau).double().mean()) for tau in taus}


def calibrated_ratio(
    generated: Images,
    train: Images,
    reference: Images,
    *,
    variant: Variant = "pixels",
    device: Device = None,
    memory_mb: int = MEMORY_MB,
) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest training image over that to the nearest reference image.

    A model trained with random shifts or mirror images copies in positions that raw pixels miss. The variants let
    both real sets move, so that the ratio stays calibrated.

    Args:
        generated: [G, ...]. Real held-out images here give the null of the score.
        train: [N, ...]; duplicates do not matter.
        reference: [N, ...] real images of the same source, none in `train`, as many as `train` has distinct ones.
        variant: "pixels" takes real images as they are; "shift" also moved by one pixel in each of 8 directions, the
            edge repeated in the vacated pixels as in `ret_fl.mitigation.taa`; "flip" also mirrored left to right.
        device, memory_mb: as in `nearest`. A variant takes no more memory, but 9 times (shift) or twice the time.

    Returns:
        ratio float64 [G] >= 0, 0 for an exact copy (infinite for a copy of a reference image; 1 for an image that is
        in both sets, which only moved images can be); index int64 [G]: the nearest row of `train`, its first
        occurrence.

    Raises:
        ValueError: `reference` shares an image with `train`, images that are not [N, C, H, W] where they have to move,
            or as in `nearest`.

    Warns:
        UserWarning: the two sets have different numbers of distinct images, which biases the ratio.
    """
    queries, real = queries_and_train(generated, train, device, memory_mb)
    other = reference_set(reference, real)
    distance, index = real.nearest_moved(queries, variant)
    return _calibrate(distance, other.nearest_moved(queries, variant)[0]), index


def _calibrate(to_train: Tensor, to_reference: Tensor) -> Tensor:
    return torch.where(to_train == to_reference, 1.0, to_train / to_reference)


@dataclass(frozen=True)
class CopyReport:
    """Copies among G generated images."""

    rate: float  # share of generated images that are copies
    low: float  # 95 % Wilson interval of the rate: sampling noise only, not that of the training seed
    high: float
    distinct: int  # distinct training images copied; a canary is one, though its repeats may differ
    copied: Tensor  # bool [G]
    ratio: Tensor  # float64 [G], `calibrated_ratio`
    index: Tensor  # int64 [G], nearest training row; of a canary the first, whichever repeat is nearest
    distance: Tensor  # float64 [G], squared distance to that training image, moved as the variant allows
    canary_rate: float | None = None  # share of generated images that copy a canary; None without canaries
    ordinary_rate: float | None = None  # share that copies any other training image; the two add up to `rate`
    canary_hits: Tensor | None = None  # int64 [n], copies of each canary


def copy_rate(generated: Images, train: Images, reference: Images, threshold: float = 0.3) -> float:
    """Share of generated images with `calibrated_ratio` below `threshold`; errors and warnings as there."""
    return copy_report(generated, train, reference, threshold).rate


def copy_report(
    generated: Images,
    train: Images,
    reference: Images,
    threshold: float = 0.3,
    *,
    canaries: Images | None = None,
    variant: Variant = "pixels",
    device: Device = None,
    memory_mb: int = MEMORY_MB,
) -> CopyReport:
    """Which generated images are copies, of what, and how sure the rate is.

    Args:
        generated, train, reference, variant, device, memory_mb: as in `calibrated_ratio`.
        threshold: calibrated ratio below which an image is a copy, > 0 and < 1.
        canaries: int64 [n, repeats], the rows of `train` that hold each canary; its repeats need not be equal.

    Raises:
        ValueError: threshold not in (0, 1), canary rows outside `train`, or as in `calibrated_ratio`.
    """
    require_threshold(threshold)
    rows = None if canaries is None else checked_canaries(canaries, len(train))
    queries, real = queries_and_train(generated, train, device, memory_mb)
    rows = None if rows is None else real.first[rows]
    other = reference_set(reference, real, rows)
    to_train, to_reference = real.nearest_moved(queries, variant), other.nearest_moved(queries, variant)
    return count_copies(to_train, to_reference, threshold, rows)


def count_copies(
    to_train: tuple[Tensor, Tensor], to_reference: tuple[Tensor, Tensor], threshold: float, canaries: Tensor | None
) -> CopyReport:
    """Distances and rows as `RealSet.nearest_moved` gives them; canaries: rows as there, int64 [n, repeats]."""
    distance, index = to_train[0], _one_a_canary(to_train[1], canaries)
    ratio = _calibrate(distance, to_reference[0])
    copied = ratio < threshold
    rate = float(copied.double().mean())
    low, high = wilson_interval(int(copied.sum()), len(copied))
    hits = None if canaries is None else _canary_hits(index[copied], canaries)
    canary_rate = None if hits is None else float(hits.sum()) / len(copied)
    return CopyReport(
        rate=rate,
        low=low,
        high=high,
        distinct=len(index[copied].unique()),
        copied=copied,
        ratio=ratio,
        index=index,
        distance=distance,
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


def excess(
    report_generated: CopyReport, report_floor: CopyReport, *, bootstrap: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How far the copy rate lies above the floor: (value, low, high), with a 95 % percentile bootstrap over both sets.

    Resampling n images of which h are copies is a binomial draw. Where one of the sets has no copies, or nothing but
    copies, all its resamples are alike and the bootstrap would claim to know its rate exactly: there the interval is
    Newcombe's, from both Wilson intervals (Statistics in Medicine 17:873, 1998, method 10).

    Args:
        report_generated: of the samples, and
        report_floor: of real held-out images, against the same training and reference images and threshold.
        bootstrap: resamples, >= 1.
        seed: of the resampling.

    Raises:
        ValueError: bootstrap < 1.
    """
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be >= 1 resamples, got {bootstrap}")
    reports = (report_generated, report_floor)
    value = report_generated.rate - report_floor.rate
    if any(report.rate in (0.0, 1.0) for report in reports):
        top, floor = reports
        low = value - math.hypot(top.rate - top.low, floor.high - floor.rate)
        high = value + math.hypot(top.high - top.rate, floor.rate - floor.low)
        return value, low, high
    rng = np.random.default_rng(seed)
    resampled, floors = (rng.binomial(len(r.copied), r.rate, bootstrap) / len(r.copied) for r in reports)
    low, high = np.percentile(resampled - floors, (2.5, 97.5))
    return value, float(low), float(high)


def require_threshold(threshold: float) -> None:
    """Raises `ValueError` unless it is above 0, and below 1: from there on a copy may lie nearer to the reference."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be > 0 and < 1 (0.3 by default), got {threshold}")


def checked_canaries(canaries: Images, count: int) -> Tensor:
    """Checked canary rows int64 [n, repeats] on the CPU, of `count` training images."""
    rows = torch.as_tensor(canaries)
    if rows.ndim != 2 or rows.is_floating_point():
        raise ValueError(f"canaries must be int64 [n, repeats], got {rows.dtype} {tuple(rows.shape)}")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"canary rows must lie in 0..{count - 1}, the rows of train")
    return rows.cpu().long()


def _one_a_canary(rows: Tensor, canaries: Tensor | None) -> Tensor:
    """The same rows, those of a canary's repeats as that of its first."""
    for own in canaries if canaries is not None else []:
        rows = torch.where(torch.isin(rows, own), own[0], rows)
    return rows


def _canary_hits(copied_rows: Tensor, canaries: Tensor) -> Tensor:
    """int64 [n]: how many of `copied_rows` hold each canary of [n, repeats]; all are first occurrences."""
    hits = [torch.isin(copied_rows, rows).sum() for rows in canaries]
    return torch.stack(hits) if hits else copied_rows.new_zeros(0)
