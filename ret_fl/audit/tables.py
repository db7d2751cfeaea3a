"""Tables of an audit: its key numbers beside floor and baseline, and audits side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from ret_fl.audit.counterparts import (
    comparable,
    difference,
    find,
    headline,
    same_data,
    same_fidelity,
    same_membership,
    same_rate,
)
from ret_fl.audit.finding import find_copies
from ret_fl.audit.members import ATTACKS, strongest_attack
from ret_fl.audit.plane import plane_features
from ret_fl.audit.schema import Audit, Fidelity
from ret_fl.audit.words import NONE, bits, number, percent, plain_interval, points, two_digits, with_interval

HEADLINE_TAUS = (0.15, 0.5)
VARIANTS = {"pixels": "by pixels", "shift": "moved by a pixel", "flip": "mirrored"}
QUALITIES: tuple[tuple[str, Callable[[float | None], str], str], ...] = (
    ("Fréchet distance", number, "frechet"),
    ("Fréchet distance to the training images, as published", number, "train_frechet"),
    ("Inception Score", number, "inception_score"),
    ("KID", number, "kid"),
    ("Precision", percent, "precision"),
    ("Recall", percent, "recall"),
    ("Samples the classifier is sure of", percent, "confident"),
)
COMPARED = ("model", "copy rate", "floor", "against baseline", "MQ .15", "MQ .5", "Fréchet", "precision", "recall",
            "membership AUC")  # fmt: skip
OTHER_DATA = " (other data)"
"""After the name of a model audited against other images than the first: its numbers do not compare."""
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A line of the table of key numbers: of the model, of real images in its place, of the baseline."""

    group: str
    label: str
    value: str
    floor: str
    baseline: str


def key_numbers(audit: Audit, baseline: Audit | None) -> list[Row]:
    """Every headline number beside its floor and the baseline's."""
    return [
        *_copy_rows(audit, baseline),
        *_quality_rows(audit, baseline),
        *_leakage_rows(audit, baseline),
        *_added_rows(audit, baseline),
    ]


def _copy_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []

    def add(label: str, value: str, floor: str = NONE, base: str = NONE) -> None:
        rows.append(Row("Copies", label, value, floor, base))

    own, base = audit.replication, baseline.replication if baseline is not None else None
    for rate in own.copy_rates:
        label = f"Copy rate, {VARIANTS[rate.variant]}, threshold {rate.threshold:g}"
        add(label, with_interval(rate.rate), with_interval(rate.floor),
            _show(same_rate(rate, baseline), lambda other: with_interval(other.rate)))  # fmt: skip
    if (first := headline(audit)) is not None:
        same = same_rate(first, baseline)
        if first.above_floor is not None:
            add("Copy rate above the floor", points(first.above_floor), "0",
                _show(same, lambda other: points(other.above_floor)))  # fmt: skip
        telling = find_copies(own.copy_rates)[1] or first
        add(f"Distinct training images copied, {VARIANTS[telling.variant]}", f"{telling.distinct:,}",
            base=_show(same_rate(telling, baseline), lambda o: f"{o.distinct:,}"))  # fmt: skip
        if first.canary is not None:
            add("Samples that copy a canary", percent(first.canary), base=_show(same, lambda o: percent(o.canary)))
        if first.ordinary is not None:
            other_images = _show(same, lambda other: percent(other.ordinary))
            add("Samples that copy another image", percent(first.ordinary), base=other_images)
    for quantity in [m for m in own.memorized if m.tau in HEADLINE_TAUS] or own.memorized[:1]:
        twin = find(base.memorized, tau=quantity.tau) if base else None
        add(f"MQ, tau {quantity.tau:g}", percent(quantity.generated), percent(quantity.floor),
            _show(twin, lambda other: percent(other.generated)))  # fmt: skip
    for share in own.carlini:
        like = find(base.carlini, alpha=share.alpha) if base else None
        add(f"Carlini's ratio ≤ 1, alpha {share.alpha:g}", percent(share.generated), percent(share.floor),
            _show(like, lambda other: percent(other.generated)))  # fmt: skip
    add("Squared distance to nearest training image, median", number(own.distance), number(own.held_out_distance),
        _show(base, lambda other: number(other.distance)))  # fmt: skip
    return rows


def _quality_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []
    for own in audit.fidelity:
        same, group = same_fidelity(own, baseline), f"Quality, in features of {own.features}, against {own.against}"
        for label, text, key in QUALITIES:
            if (value := getattr(own, key)) is not None:
                real, other = getattr(own, f"real_{key}", None), getattr(same, key, None)
                rows.append(Row(group, label, text(value), text(real), text(other)))
    for score in audit.clip:
        twin = find(baseline.clip, features=score.features) if baseline else None
        rows.append(Row(f"Text, in features of {score.features}", "CLIP score", number(score.mean), number(score.real),
                        _show(twin, lambda other: number(other.mean))))  # fmt: skip
    return rows


def _leakage_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []
    for own in audit.leakage.membership if audit.leakage else []:
        same, how = same_membership(own, baseline), ATTACKS[own.attack]
        rows += [
            Row("Leakage", f"Membership AUC {how}", plain_interval(own.auc), "0.5 is guessing",
                _show(same, lambda other: plain_interval(other.auc))),
            Row("Leakage", f"Members found {how} at 1 % false alarms", with_interval(own.tpr_at_1_percent),
                "1 % is guessing", _show(same, lambda other: with_interval(other.tpr_at_1_percent))),
            Row("Leakage", f"Members found {how} at 0.1 % false alarms", with_interval(own.tpr_at_01_percent),
                "0.1 % is guessing", _show(same, lambda other: with_interval(other.tpr_at_01_percent))),
        ]  # fmt: skip
    if audit.leakage and (exposure := audit.leakage.exposure) is not None:
        twin = baseline.leakage.exposure if baseline and baseline.leakage else None
        rows += [
            Row("Leakage", "Exposure of canaries, mean", bits(exposure.mean), "about 1.44 bits",
                _show(twin, lambda other: bits(other.mean))),
            Row("Leakage", "Exposure of the most exposed canary", bits(max(exposure.exposures)), NONE,
                _show(twin, lambda other: bits(max(other.exposures)))),
        ]  # fmt: skip
    return rows


def _added_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []
    for own in audit.added:
        like = find(baseline.added, auditor=own.auditor, settings=own.settings) if baseline else None
        group = f"By the auditor {own.auditor}, {own.source}. {own.about}"
        rows += [
            Row(group, name, number(value), NONE, number(like.values.get(name)) if like else NONE)
            for name, value in own.values.items()
        ]
    return rows


def comparison_rows(audits: Sequence[Audit], baseline: Audit | None) -> list[tuple[str, ...]]:
    """The cells of a comparison, in the order of `COMPARED`; the baseline comes first.

    A model audited against other images than the first is marked.
    """
    rest = [audit for audit in audits if audit != baseline]
    everything = [baseline, *rest] if baseline is not None else rest
    features = plane_features(everything) or next((f for a in everything for f in a.fidelity), None)
    return [
        (
            audit.model.name + ("" if same_data(audit, everything[0]) else OTHER_DATA),
            *_compared(audit, baseline, features),
        )
        for audit in everything
    ]


def _compared(audit: Audit, baseline: Audit | None, features: Fidelity | None) -> tuple[str, ...]:
    rate, fidelity = headline(audit), None if features is None else same_fidelity(features, audit)
    quantities = [find(audit.replication.memorized, tau=tau) for tau in HEADLINE_TAUS]
    return (
        _show(rate, lambda r: with_interval(r.rate)),
        _show(rate, lambda r: percent(r.floor.value if r.floor else None)),
        _difference_cell(audit, baseline),
        *(_show(quantity, lambda q: percent(q.generated)) for quantity in quantities),
        _show(fidelity, lambda f: number(f.frechet)),
        _show(fidelity, lambda f: percent(f.precision)),
        _show(fidelity, lambda f: percent(f.recall)),
        _show(strongest_attack(audit), lambda a: f"{a.auc.value:.3f} {ATTACKS[a.attack]}"),
    )


def _difference_cell(audit: Audit, baseline: Audit | None) -> str:
    if baseline is None:
        return NONE
    if audit == baseline:
        return "the baseline"
    rate = headline(audit)
    other = same_rate(rate, comparable(audit, baseline))
    if rate is None or other is None:
        return NONE
    gap = rate.rate.value - other.rate.value
    return f"{'+' if gap > 0 else ''}{two_digits(100 * gap)} points, {difference(rate.rate, other.rate)}"


def comparison_table(audits: Sequence[Audit], baseline: Audit | None) -> Table:
    """Audits side by side, for the terminal.

    'against baseline' says fewer or more copies only where the 95 % intervals do not overlap.
    """
    table = Table(title="audits, 95 % intervals in brackets", title_justify="left")
    for i, name in enumerate(COMPARED):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in comparison_rows(audits, baseline):
        table.add_row(*map(Text, row))
    return table


def _show(item: T | None, text: Callable[[T], str]) -> str:
    return NONE if item is None else text(item)
