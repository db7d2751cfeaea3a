"""Copies of training images among generated ones, by exact nearest-neighbour search in pixel space.

Three scores share one search. All distances D(g, x) are sums of squared pixel differences over C*H*W in [0, 1].

- `neighbour_ratio` and `memorized_quantity`: MQ of IET/AGC (arXiv 2407.15328, 2502.09434), D(g, x1) over the mean of
  the 50 smallest D(g, x). Its natural floor is high on low-dimensional data: print it for held-out images beside MQ.
- `carlini_ratio`: the un-squared form of Carlini et al. 2023 (arXiv 2301.13188), with their alpha.
- `calibrated_ratio` and `copy_rate`: D to the nearest training image over D to the nearest image of an equally large
  disjoint real set, which cancels how densely real images lie in that region. The headline number.

`replication` computes all of them at once, beside the same of held-out images. Images may be uint8: they are read as
floats piece by piece, so beyond the images a call holds `memory_mb` of tensors, its results, and about 200 bytes for
each training and reference image.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.distances import MEMORY_MB, ImageRows, Images, image_rows, nearest, require_same_size

PAPER_TAUS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAPER_K = 50
CARLINI_ALPHA = 0.5
KEY_ELEMENTS = 2**16

Variant = Literal["pixels", "shift", "flip"]
Device = torch.device | str | None


def deduplicate(images: Images) -> Tensor:
    """int64 [M]: the first occurrence of every distinct image, ascending; images are equal if so in float32."""
    return _first_occurrence(image_rows(images))[0].unique()


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
    queries, real = _queries_and_train(generated, train, device, memory_mb)
    squared, index = real.nearest(queries, k)
    return _ratio_to_mean(squared), index[:, 0]


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
    queries, real = _queries_and_train(generated, train, device, memory_mb)
    squared, index = real.nearest(queries, k)
    return _ratio_to_mean(squared.sqrt()) / alpha, index[:, 0]


def _ratio_to_mean(distance: Tensor) -> Tensor:
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
    queries, real = _queries_and_train(generated, train, device, memory_mb)
    other = _reference_set(reference, real)
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
    distinct: int  # distinct training images copied
    copied: Tensor  # bool [G]
    ratio: Tensor  # float64 [G], `calibrated_ratio`
    index: Tensor  # int64 [G], nearest training row
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
        threshold: calibrated ratio below which an image is a copy, > 0.
        canaries: int64 [n, repeats], the rows of `train` that hold each canary.

    Raises:
        ValueError: threshold <= 0, canary rows outside `train`, or as in `calibrated_ratio`.
    """
    _require_threshold(threshold)
    rows = None if canaries is None else _canary_rows(canaries, len(train))
    queries, real = _queries_and_train(generated, train, device, memory_mb)
    other = _reference_set(reference, real)
    to_train, to_reference = real.nearest_moved(queries, variant), other.nearest_moved(queries, variant)
    return _report(to_train, to_reference, threshold, None if rows is None else real.first[rows])


def _report(
    to_train: tuple[Tensor, Tensor], to_reference: tuple[Tensor, Tensor], threshold: float, canaries: Tensor | None
) -> CopyReport:
    """Distances and rows as `_RealSet.nearest_moved` gives them; canaries: rows as there, int64 [n, repeats]."""
    distance, index = to_train
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


@dataclass(frozen=True)
class Scores:
    """What `replication` found for each of G images, all on the CPU."""

    squared: Tensor  # float64 [G, k], squared distances to the nearest distinct training images, ascending
    index: Tensor  # int64 [G], nearest training row, its first occurrence
    reports: dict[Variant, CopyReport]  # empty without a reference

    @property
    def neighbour_ratio(self) -> Tensor:
        """float64 [G], as the function of that name."""
        return _ratio_to_mean(self.squared)

    @property
    def carlini_ratio(self) -> Tensor:
        """float64 [G], as the function of that name."""
        return _ratio_to_mean(self.squared.sqrt()) / CARLINI_ALPHA

    @property
    def ratio(self) -> Tensor:
        """float64 [G], small for copies: the calibrated ratio, or without a reference the neighbour ratio."""
        return self.reports["pixels"].ratio if self.reports else self.neighbour_ratio


@dataclass(frozen=True)
class Details:
    """The scores behind a `schema.Replication`: of every sample, and of every held-out image where there are any."""

    generated: Scores
    held_out: Scores | None


def replication(
    generated: Images,
    train: Images,
    reference: Images | None,
    held_out: Images | None,
    canaries: Images | None,
    *,
    threshold: float = 0.3,
    k: int | None = PAPER_K,
    worst: int = 24,
    memory_mb: int = MEMORY_MB,
    device: Device = None,
) -> tuple[schema.Replication, Details]:
    """All scores of copying at once: the sets are checked once and no search runs twice.

    Args:
        generated: [G, C, H, W] and
        train: [N, C, H, W], float in [0, 1] or uint8.
        reference: as in `calibrated_ratio`; without it there are no copy rates.
        held_out: [M, C, H, W] real images that were not trained on: the floor of every score.
        canaries: as in `copy_report`; none listed is as good as None.
        threshold: as in `copy_report`.
        k: as in `neighbour_ratio`; None takes the papers' 50, or all distinct training images where they are fewer.
        worst: how many samples to list, the closest one to each of as many training images.
        memory_mb, device: as in `nearest`.

    Returns:
        The numbers for audit.json, copy rates in every variant ("flip" only where images are wider than a pixel), and
        the scores they were computed from.

    Raises:
        ValueError: worst < 0, fewer than k distinct training images, or as in `copy_report`.

    Warns:
        UserWarning: fewer than 50 neighbours, held-out images that are training images, or as in `calibrated_ratio`.
    """
    _require_threshold(threshold)
    if worst < 0:
        raise ValueError(f"worst must be >= 0, the number of samples to list, got {worst}")
    canary_rows = _canary_rows(canaries, len(train)) if canaries is not None and len(canaries) else None
    queries, real = _queries_and_train(generated, train, device, memory_mb)
    other = None if reference is None else _reference_set(reference, real)
    k = _default_k(len(real)) if k is None else k
    canary_rows = None if canary_rows is None else real.first[canary_rows]
    samples, floor = _scores(queries, real, other, k, threshold, canary_rows), None
    if held_out is not None:
        held_out_queries = _queries(held_out, "held_out", device)
        require_same_size(held_out_queries, real.distinct, "held_out", "train")
        if other is not None and (shared := other.keys & set(_content_keys(held_out_queries))):
            raise ValueError(
                f"held_out shares {len(shared)} images with reference: use other images, such an image never counts "
                "as a copy, and the floor would be too low"
            )
        floor = _scores(held_out_queries, real, other, k, threshold, None)
        if copies := int((floor.squared[:, 0] == 0).sum()):
            warnings.warn(
                f"{copies} of {len(held_out)} held-out images are also training images: they raise every floor",
                stacklevel=2,
            )
    return _summary(samples, floor, threshold, worst), Details(samples, floor)


def _default_k(distinct: int) -> int:
    if distinct < PAPER_K:
        warnings.warn(
            f"only {distinct} distinct training images: MQ and Carlini's share use k = {distinct} instead of the "
            f"papers' {PAPER_K}, and compare with no published number",
            stacklevel=3,
        )
    return min(PAPER_K, distinct)


def _scores(
    queries: ImageRows, real: "_RealSet", other: "_RealSet | None", k: int, threshold: float, canaries: Tensor | None
) -> Scores:
    """canaries: first occurrences int64 [n, repeats], as `_report` takes them."""
    squared, nearest_k = real.nearest(queries, k)
    index = nearest_k[:, 0].clone()
    reports: dict[Variant, CopyReport] = {}
    if other is not None:
        to_train, to_reference = (squared[:, 0], index), other.nearest_moved(queries, "pixels")
        variants: tuple[Variant, ...] = ("pixels", "shift", "flip") if real.shape[-1] > 1 else ("pixels", "shift")
        for variant in variants:
            reports[variant] = _report(
                real.nearest_moved(queries, variant, to_train),
                other.nearest_moved(queries, variant, to_reference),
                threshold,
                canaries,
            )
    return Scores(squared, index, reports)


def _summary(samples: Scores, floor: Scores | None, threshold: float, worst: int) -> schema.Replication:
    floors = {} if floor is None else memorized_quantity(floor.neighbour_ratio)
    return schema.Replication(
        copy_rates=[
            _copy_rate_entry(variant, threshold, report, None if floor is None else floor.reports[variant])
            for variant, report in samples.reports.items()
        ],
        k=samples.squared.shape[1],
        memorized=[
            schema.MemorizedQuantity(tau=tau, generated=share, floor=floors.get(tau))
            for tau, share in memorized_quantity(samples.neighbour_ratio).items()
        ],
        carlini=[
            schema.CarliniShare(
                alpha=CARLINI_ALPHA, generated=_carlini_share(samples), floor=floor and _carlini_share(floor)
            )
        ],
        distance=_median_distance(samples),
        held_out_distance=floor and _median_distance(floor),
        worst=_worst_copies(samples, worst),
    )


def _copy_rate_entry(
    variant: Variant, threshold: float, report: CopyReport, floor: CopyReport | None
) -> schema.CopyRate:
    above = None
    if floor is not None:
        value, low, high = excess(report, floor)
        above = schema.Interval(value=value, low=low, high=high)
    return schema.CopyRate(
        variant=variant,
        threshold=threshold,
        rate=schema.Interval(value=report.rate, low=report.low, high=report.high),
        floor=floor and schema.Interval(value=floor.rate, low=floor.low, high=floor.high),
        above_floor=above,
        distinct=report.distinct,
        canary=report.canary_rate,
        ordinary=report.ordinary_rate,
        canary_hits=None if report.canary_hits is None else report.canary_hits.tolist(),
    )


def _carlini_share(scores: Scores) -> float:
    return float((scores.carlini_ratio <= 1).double().mean())


def _median_distance(scores: Scores) -> float:
    return float(np.median(scores.squared[:, 0].numpy()))


def _worst_copies(samples: Scores, count: int) -> list[schema.WorstCopy]:
    """The sample closest to each training image, closest first."""
    order = samples.ratio.argsort(stable=True)
    _, first = np.unique(samples.index[order].numpy(), return_index=True)
    return [
        schema.WorstCopy(
            sample=int(sample),
            train=int(samples.index[sample]),
            ratio=float(samples.ratio[sample]) if samples.reports else None,
            distance=float(samples.squared[sample, 0]),
        )
        for sample in order[np.sort(first)[:count]]
    ]


class _RealSet:
    """Real images to find copies of: checked and hashed once, viewed without duplicates, searched without a copy."""

    def __init__(self, images: Images, name: str, device: torch.device, memory_mb: int) -> None:
        rows = _unit_rows(images, name)
        self.name = name
        self.shape = tuple(images.shape[1:])
        self.first, self.keys = _first_occurrence(rows)  # int64 [N]; the distinct images' digests
        self.kept = self.first.unique()
        self.distinct = rows if len(self.kept) == len(rows) else replace(rows, rows=self.kept)
        self.distinct = self.distinct.to(device)
        self.memory_mb = memory_mb

    def __len__(self) -> int:
        """How many images are distinct."""
        return len(self.kept)

    def nearest(self, queries: ImageRows, k: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the function `nearest`; indices are rows of all images, of the first occurrence."""
        if not 1 <= k <= len(self):
            raise ValueError(
                f"k must lie in 1..{len(self)}, the number of distinct training images, got {k}: lower k or give more "
                "training images"
            )
        squared, index = nearest(queries, replace(self.distinct, columns=columns), k, memory_mb=self.memory_mb)
        return squared, self.kept[index]

    def nearest_moved(
        self, queries: ImageRows, variant: Variant, unmoved: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Squared distance float64 [G] and row int64 [G] of the nearest image in any position, ties to the lower row.

        unmoved: the answer for "pixels", if it is known.
        """
        moves = _moves(self.shape, variant, self.name)
        if unmoved is None:
            squared, row = self.nearest(queries, 1)
            unmoved = squared[:, 0], row[:, 0]
        best, index = unmoved
        for columns in moves:
            squared, row = (found[:, 0] for found in self.nearest(queries, 1, columns))
            closer = (squared < best) | ((squared == best) & (row < index))
            best, index = torch.where(closer, squared, best), torch.where(closer, row, index)
        return best, index


def _moves(shape: tuple[int, ...], variant: Variant, name: str) -> list[Tensor]:
    """For every position but the original, int64 [C*H*W]: which pixel each pixel of the moved image comes from."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    if variant == "pixels":
        return []
    if len(shape) != 3 or (variant == "flip" and shape[2] < 2):
        raise ValueError(
            f"variant {variant!r} moves images [N, C, H, W] (to mirror them, W >= 2), but {name} are [N, "
            f"{', '.join(map(str, shape))}]: give them in that shape, or take variant 'pixels'"
        )
    pixels = torch.arange(math.prod(shape)).view(shape)
    if variant == "flip":
        return [pixels.flip(2).flatten()]
    down, right = ([(torch.arange(n) - step).clamp(0, n - 1) for step in (-1, 0, 1)] for n in shape[1:])
    return [
        pixels[:, y][:, :, x].flatten() for i, y in enumerate(down) for j, x in enumerate(right) if (i, j) != (1, 1)
    ]


def _queries_and_train(generated: Images, train: Images, device: Device, memory_mb: int) -> tuple[ImageRows, _RealSet]:
    queries = _queries(generated, "generated", device)
    real = _RealSet(train, "train", queries.values.device, memory_mb)
    require_same_size(queries, real.distinct, "generated", "train")
    return queries, real


def _queries(images: Images, name: str, device: Device) -> ImageRows:
    rows = _unit_rows(images, name)
    return rows if device is None else rows.to(torch.device(device))


def _reference_set(reference: Images, train: _RealSet) -> _RealSet:
    other = _RealSet(reference, "reference", train.distinct.values.device, train.memory_mb)
    require_same_size(train.distinct, other.distinct, "train", "reference")
    if shared := train.keys & other.keys:
        raise ValueError(
            f"reference shares {len(shared)} images with train: use real images that were never trained on, "
            "else copies of the shared ones pass unnoticed"
        )
    if len(train) != len(other):
        warnings.warn(
            f"train has {len(train)} distinct images, reference {len(other)}: the calibrated ratio is only unbiased "
            "for sets of equal size (a smaller reference raises copy rate and floor, so give more images if you can)",
            stacklevel=3,
        )
    return other


def _require_threshold(threshold: float) -> None:
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0 (0.3 by default), got {threshold}")


def _canary_rows(canaries: Images, count: int) -> Tensor:
    """Checked canary rows int64 [n, repeats] on the CPU, of `count` training images."""
    rows = torch.as_tensor(canaries)
    if rows.ndim != 2 or rows.is_floating_point():
        raise ValueError(f"canaries must be int64 [n, repeats], got {rows.dtype} {tuple(rows.shape)}")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"canary rows must lie in 0..{count - 1}, the rows of train")
    return rows.cpu().long()


def _canary_hits(copied_rows: Tensor, canaries: Tensor) -> Tensor:
    """int64 [n]: how many of `copied_rows` hold each canary of [n, repeats]; all are first occurrences."""
    hits = [torch.isin(copied_rows, rows).sum() for rows in canaries]
    return torch.stack(hits) if hits else copied_rows.new_zeros(0)


def _unit_rows(images: Images, name: str) -> ImageRows:
    """`image_rows`, with a warning when they cannot be images in [0, 1]: mixed ranges hide every copy."""
    rows = image_rows(images, name)
    if rows.values.dtype != torch.uint8:
        low, high = (bound.item() for bound in torch.aminmax(rows.values))
        if low < -0.5 or high > 1.5:
            warnings.warn(
                f"{name} range over {low:.3g}..{high:.3g}, expected [0, 1]: rescale all sets alike", stacklevel=4
            )
    return rows


def _first_occurrence(rows: ImageRows) -> tuple[Tensor, Set[bytes]]:
    """int64 [N]: for every row, the first row with the same float32 values; and the distinct rows' digests."""
    seen: dict[bytes, int] = {}
    first = [seen.setdefault(key, row) for row, key in enumerate(_content_keys(rows))]
    return torch.tensor(first), seen.keys()


def _content_keys(rows: ImageRows) -> Iterator[bytes]:
    """A digest of every row's float32 values; adding 0 makes -0.0 and 0.0 the same image."""
    for tile in rows.tiles(max(1, KEY_ELEMENTS // rows.dim)):
        yield from (hashlib.sha256(row).digest() for row in (tile.float() + 0.0).cpu().numpy())
