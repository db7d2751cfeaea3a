"""All scores of copying at once, as audit.json holds them."""

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.distances import MEMORY_MB, ImageRows, Images, require_same_size
from ret_fl.audit.finding import find_copies
from ret_fl.audit.realset import (
    Device,
    RealSet,
    Variant,
    checked_queries,
    content_keys,
    queries_and_train,
    reference_set,
)
from ret_fl.audit.replication import (
    CARLINI_ALPHA,
    PAPER_K,
    CopyReport,
    checked_canaries,
    count_copies,
    excess,
    memorized_quantity,
    ratio_to_mean,
    require_threshold,
)


@dataclass(frozen=True)
class Scores:
    """What `replication` found for each of G images, all on the CPU."""

    squared: Tensor  # float64 [G, k], squared distances to the nearest distinct training images, ascending
    index: Tensor  # int64 [G], nearest training row, its first occurrence
    reports: dict[Variant, CopyReport]  # empty without a reference

    @property
    def neighbour_ratio(self) -> Tensor:
        """float64 [G], as the function of that name."""
        return ratio_to_mean(self.squared)

    @property
    def carlini_ratio(self) -> Tensor:
        """float64 [G], as the function of that name."""
        return ratio_to_mean(self.squared.sqrt()) / CARLINI_ALPHA


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
        ValueError: worst < 0, fewer than k distinct training images, held-out images that are training or reference
            images, or as in `copy_report`.

    Warns:
        UserWarning: fewer than 50 neighbours, or as in `calibrated_ratio`.
    """
    require_threshold(threshold)
    if worst < 0:
        raise ValueError(f"worst must be >= 0, the number of samples to list, got {worst}")
    canary_rows = checked_canaries(canaries, len(train)) if canaries is not None and len(canaries) else None
    queries, real = queries_and_train(generated, train, device, memory_mb)
    canary_rows = None if canary_rows is None else real.first[canary_rows]
    other = None if reference is None else reference_set(reference, real, canary_rows)
    k = _default_k(len(real)) if k is None else k
    floor = None
    if held_out is not None:
        held_out_queries = checked_queries(held_out, "held_out", device)
        require_same_size(held_out_queries, real.distinct, "held_out", "train")
        _refuse_known(held_out_queries, real, other)
        floor = _scores(held_out_queries, real, other, k, threshold, None)
    samples = _scores(queries, real, other, k, threshold, canary_rows)
    return _summary(samples, floor, threshold, worst), Details(samples, floor)


def _refuse_known(held_out: ImageRows, real: RealSet, other: RealSet | None) -> None:
    """Held-out images must be in no other set, else the floors are no floors."""
    keys = set(content_keys(held_out))
    for name, known, harm in (
        ("train", real, "counts as a copy, and the floor would hide copies"),
        ("reference", other, "never counts as a copy, and the floor would be too low"),
    ):
        if known is not None and (shared := known.keys & keys):
            raise ValueError(
                f"held_out shares {len(shared)} images with {name}: use other images, such an image {harm}"
            )


def _default_k(distinct: int) -> int:
    if distinct < PAPER_K:
        warnings.warn(
            f"only {distinct} distinct training images: MQ and Carlini's share use k = {distinct} instead of the "
            f"papers' {PAPER_K}, and compare with no published number",
            stacklevel=3,
        )
    return min(PAPER_K, distinct)


def _scores(
    queries: ImageRows, real: RealSet, other: RealSet | None, k: int, threshold: float, canaries: Tensor | None
) -> Scores:
    """canaries: first occurrences int64 [n, repeats], as `count_copies` takes them."""
    squared, nearest_k = real.nearest(queries, k)
    index = nearest_k[:, 0].clone()
    reports: dict[Variant, CopyReport] = {}
    if other is not None:
        to_train, to_reference = (squared[:, 0], index), other.nearest_moved(queries, "pixels")
        variants: tuple[Variant, ...] = ("pixels", "shift", "flip") if real.shape[-1] > 1 else ("pixels", "shift")
        for variant in variants:
            reports[variant] = count_copies(
                real.nearest_moved(queries, variant, to_train),
                other.nearest_moved(queries, variant, to_reference),
                threshold,
                canaries,
            )
    return Scores(squared, index, reports)


def _summary(samples: Scores, floor: Scores | None, threshold: float, worst: int) -> schema.Replication:
    floors = {} if floor is None else memorized_quantity(floor.neighbour_ratio)
    copy_rates = [
        _copy_rate_entry(variant, threshold, report, None if floor is None else floor.reports[variant])
        for variant, report in samples.reports.items()
    ]
    _, telling = find_copies(copy_rates)
    variant = telling.variant if telling is not None else "pixels"
    return schema.Replication(
        copy_rates=copy_rates,
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
        worst=_worst_copies(samples, variant, worst),
        worst_variant=variant,
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


def _worst_copies(samples: Scores, variant: Variant, count: int) -> list[schema.WorstCopy]:
    """The sample closest to each training image, closest first: by calibrated ratio, or neighbour ratio without."""
    report = samples.reports.get(variant)
    ratio, index, distance = (
        (report.ratio, report.index, report.distance)
        if report is not None
        else (samples.neighbour_ratio, samples.index, samples.squared[:, 0])
    )
    order = ratio.argsort(stable=True)
    _, first = np.unique(index[order].numpy(), return_index=True)
    return [
        schema.WorstCopy(
            sample=int(sample),
            train=int(index[sample]),
            ratio=float(ratio[sample]) if report is not None else None,
            distance=float(distance[sample]),
        )
        for sample in order[np.sort(first)[:count]]
    ]
