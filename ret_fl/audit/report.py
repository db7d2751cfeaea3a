"""report.html: an audit for a person, one file that needs nothing else; and the comparison for a terminal."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from ret_fl.audit import plots
from ret_fl.audit.fidelity import ENOUGH_SAMPLES
from ret_fl.audit.methods import METHODS, Method
from ret_fl.audit.plots import headline, plane_figure
from ret_fl.audit.schema import Audit, CopyRate, Fidelity, Interval, Membership
from ret_fl.audit.stylesheet import STYLE
from ret_fl.audit.template import PAGE
from ret_fl.files import write_atomically
from ret_fl.pictures import Pairs, image_grid

__all__ = ["Pictures", "comparison_table", "plane_figure", "verdict", "write_report"]

SHOWN_SAMPLES = 64
SHOWN_SUSPECTS = 24
TILE_SIDE = 160
"""Images above this side are shown smaller, to keep the page light."""
GRID_TILE_SIDE = 96
HARDLY_LEARNED = 2.0
"""Samples this many times as far from the training images as real images are: the model has hardly learned."""
LESS_TRAINED = 1.1
"""Quality worse than the baseline's by this factor may explain fewer copies."""
HEADLINE_TAUS = (0.15, 0.5)
NONE = "n/a"


@dataclass(frozen=True)
class Pictures:
    """What the report shows beside the numbers; every field is optional.

    samples: float [N, C, H, W] in [0, 1]. worst: samples beside their nearest training image, closest first; where
    they are as many as `audit.replication.worst` they are the same ones in the same order. suspects: training images
    [n, C, H, W] in the order of `audit.leakage.duplicates.suspects`. rows: of metrics.jsonl, [] without a run.
    losses: of samples, float [n] by group: memorized, high-loss, others. skip_by_timestep: timesteps and the share of
    draws skipped at each, both [n].
    """

    samples: Tensor | None = None
    worst: Pairs | None = None
    suspects: Tensor | None = None
    rows: Sequence[dict[str, Any]] = ()
    losses: dict[str, np.ndarray] = field(default_factory=dict)
    skip_by_timestep: tuple[np.ndarray, np.ndarray] | None = None


# Numbers as text


def percent(value: float | None) -> str:
    """0.0123 -> '1.23 %', 0.123 -> '12.3 %'."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{_two_digits(100 * value)} %"


def _two_digits(value: float) -> str:
    return f"{value:.2f}" if abs(round(value, 2)) < 10 else f"{value:.1f}"


def with_interval(share: Interval | None) -> str:
    """'0.20 % (0.05 to 0.73 %)'."""
    if share is None or not math.isfinite(share.value):
        return NONE
    return f"{percent(share.value)} ({_two_digits(100 * share.low)} to {_two_digits(100 * share.high)} %)"


def number(value: float | None) -> str:
    """Three significant digits, thousands with commas."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def plain_interval(interval: Interval | None) -> str:
    """An interval of a number that is no share, such as an AUC."""
    if interval is None:
        return NONE
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


# The verdict


class Finding(Enum):
    """What the copy rate says: value is the word shown beside the verdict."""

    COPIES = "copies"
    MAYBE = "unclear"
    NONE = "no copies shown"
    UNKNOWN = "no verdict"


def verdict(audit: Audit, baseline: Audit | None = None) -> str:
    """Whether the model copies, in one sentence with its uncertainty.

    Copies are claimed where the 95 % interval of the copy rate lies above that of real held-out images. The sentence
    says so where that cannot be told: no reference or held-out set, fewer than 1000 samples, samples more than twice
    as far from the training images as real images are. Against a baseline, rates differ if their intervals do not
    overlap; both cover the drawing of samples, not the training seed.
    """
    return judge(audit, baseline)[1]


def judge(audit: Audit, baseline: Audit | None = None) -> tuple[Finding, str]:
    """The finding behind `verdict`, and its sentence."""
    name, count = audit.model.name, f"{audit.model.samples:,}"
    finding, rate = _finding(audit)
    if rate is None:
        main = (
            f"Whether samples of {name} copy training images cannot be told: without reference images, real ones that "
            f"were never trained on, no copy rate was measured on its {count} samples"
        )
    elif rate.floor is None:
        main = (
            f"Of {count} samples of {name}, {_rate_text(rate.rate)} count as copies{_variant_text(rate)}, but without "
            "held-out images nobody knows how many of these are chance"
        )
    else:
        measured = f"{_rate_text(rate.rate)} of {count} samples count as copies{_variant_text(rate)}"
        floor = f"{with_interval(rate.floor)} of real images that were never trained on"
        main = {
            Finding.COPIES: f"Samples of {name} copy training images: {measured}, against {floor}",
            Finding.MAYBE: f"Samples of {name} may copy training images, but the evidence is weak: {measured}, against "
            f"{floor}, and the intervals overlap",
            Finding.NONE: f"No copying beyond chance shows in {name}: {measured}, against {floor}",
        }[finding]
    parts = [main, *_caveats(audit, finding), *_against_baseline(audit, baseline)]
    return finding, "; ".join(parts) + "."


def _finding(audit: Audit) -> tuple[Finding, CopyRate | None]:
    """By pixels first; the variants may find copies that pixels do not show."""
    first = headline(audit)
    if first is None:
        return Finding.UNKNOWN, None
    rates = [first, *(r for r in audit.replication.copy_rates if r.threshold == first.threshold and r is not first)]
    for finding in (Finding.COPIES, Finding.MAYBE):
        for rate in rates:
            if _finding_of(rate) is finding:
                return finding, rate
    return _finding_of(first), first


def _finding_of(rate: CopyRate) -> Finding:
    if rate.floor is None:
        return Finding.UNKNOWN
    if rate.rate.low > rate.floor.high:
        return Finding.COPIES
    if rate.above_floor is not None and rate.above_floor.low > 0:
        return Finding.MAYBE
    return Finding.NONE


def _rate_text(share: Interval) -> str:
    return f"{percent(share.value)} (95 % interval {with_interval(share).partition('(')[2]}"


def _variant_text(rate: CopyRate) -> str:
    return {
        "pixels": "",
        "shift": " once training images may be moved by a pixel",
        "flip": " once training images may be mirrored",
    }[rate.variant]


def _caveats(audit: Audit, finding: Finding) -> list[str]:
    parts = []
    if audit.model.samples < ENOUGH_SAMPLES:
        parts.append(
            f"{audit.model.samples:,} samples are few, so take at least {ENOUGH_SAMPLES:,} before relying on it"
        )
    if (far := _times_as_far(audit)) is not None and far > HARDLY_LEARNED:
        gap = f"samples lie {far:.1f} times as far from the training images as real held-out images do"
        low = "so the model has hardly learned"
        parts.append(f"{gap}, {low}" + ("" if finding is Finding.COPIES else " and a low copy rate says little"))
    return parts


def _times_as_far(audit: Audit) -> float | None:
    held_out = audit.replication.held_out_distance
    return audit.replication.distance / held_out if held_out else None


def _against_baseline(audit: Audit, baseline: Audit | None) -> list[str]:
    rate = headline(audit)
    if baseline is None or rate is None or baseline == audit:
        return []
    other = _same_rate(rate, baseline)
    name = baseline.model.name
    if other is None:
        return [f"its baseline {name} has no copy rate to compare with"]
    by = "" if rate is _finding(audit)[1] else f" by pixels ({percent(rate.rate.value)})"
    difference = _difference(rate.rate, other.rate)
    if difference == NO_DIFFERENCE:
        return [f"there is {NO_DIFFERENCE}{by} to the baseline {name}, {with_interval(other.rate)}"]
    text = f"that is {difference} copies{by} than the baseline {name}, {with_interval(other.rate)}"
    return [text + (_less_trained(audit, baseline) if difference == "fewer" else "")]


NO_DIFFERENCE = "no clear difference"


def _difference(rate: Interval, other: Interval) -> str:
    """'fewer' or 'more' only where the intervals do not overlap."""
    if rate.high < other.low:
        return "fewer"
    return "more" if rate.low > other.high else NO_DIFFERENCE


def _less_trained(audit: Audit, baseline: Audit) -> str:
    """What speaks for fewer copies coming from less training: a worse Fréchet distance or precision."""
    for own in audit.fidelity:
        other = _same_fidelity(own, baseline)
        if other is None:
            continue
        worse = []
        if own.frechet > LESS_TRAINED * other.frechet:
            worse.append(f"Fréchet distance is worse ({number(own.frechet)} against {number(other.frechet)})")
        if LESS_TRAINED * own.precision < other.precision:
            worse.append(f"precision is lower ({percent(own.precision)} against {percent(other.precision)})")
        if worse:
            return f", but its {' and its '.join(worse)}, so it may in part be less trained"
    return ""


# Rows of tables


T = TypeVar("T")


def _find(items: Iterable[T], **wanted: object) -> T | None:
    return next((item for item in items if all(getattr(item, k) == v for k, v in wanted.items())), None)


def _same_rate(own: CopyRate | None, other: Audit | None) -> CopyRate | None:
    if own is None or other is None:
        return None
    return _find(other.replication.copy_rates, variant=own.variant, threshold=own.threshold)


def _same_fidelity(own: Fidelity, other: Audit | None) -> Fidelity | None:
    return None if other is None else _find(other.fidelity, features=own.features, against=own.against)


def _same_membership(own: Membership, other: Audit | None) -> Membership | None:
    leakage = other.leakage if other is not None else None
    return None if leakage is None else _find(leakage.membership, attack=own.attack)


def _show(item: T | None, text: Callable[[T], str]) -> str:
    return NONE if item is None else text(item)


@dataclass(frozen=True)
class Row:
    """A line of the table of key numbers: of the model, of real images in its place, of the baseline."""

    group: str
    label: str
    value: str
    floor: str
    baseline: str


VARIANTS = {"pixels": "by pixels", "shift": "moved by a pixel", "flip": "mirrored"}
ATTACKS = {"loss": "by loss", "pia": "by PIA"}


def key_numbers(audit: Audit, baseline: Audit | None) -> list[Row]:
    """Every headline number beside its floor and the baseline's."""
    return [*_copy_rows(audit, baseline), *_quality_rows(audit, baseline), *_leakage_rows(audit, baseline)]


def _copy_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []

    def add(label: str, value: str, floor: str = NONE, base: str = NONE) -> None:
        rows.append(Row("Copies", label, value, floor, base))

    own, base = audit.replication, baseline.replication if baseline is not None else None
    for rate in own.copy_rates:
        label = f"Copy rate, {VARIANTS[rate.variant]}, threshold {rate.threshold:g}"
        add(label, with_interval(rate.rate), with_interval(rate.floor),
            _show(_same_rate(rate, baseline), lambda other: with_interval(other.rate)))  # fmt: skip
    if (first := headline(audit)) is not None:
        same = _same_rate(first, baseline)
        if first.above_floor is not None:
            add("Copy rate above the floor", points(first.above_floor), "0",
                _show(same, lambda other: points(other.above_floor)))  # fmt: skip
        add("Distinct training images copied", f"{first.distinct:,}", base=_show(same, lambda o: f"{o.distinct:,}"))
        if first.canary is not None:
            add("Samples that copy a canary", percent(first.canary), base=_show(same, lambda o: percent(o.canary)))
        if first.ordinary is not None:
            other_images = _show(same, lambda other: percent(other.ordinary))
            add("Samples that copy another image", percent(first.ordinary), base=other_images)
    for quantity in [m for m in own.memorized if m.tau in HEADLINE_TAUS] or own.memorized[:1]:
        twin = _find(base.memorized, tau=quantity.tau) if base else None
        add(f"MQ, tau {quantity.tau:g}", percent(quantity.generated), percent(quantity.floor),
            _show(twin, lambda other: percent(other.generated)))  # fmt: skip
    for share in own.carlini:
        like = _find(base.carlini, alpha=share.alpha) if base else None
        add(f"Carlini's ratio ≤ 1, alpha {share.alpha:g}", percent(share.generated), percent(share.floor),
            _show(like, lambda other: percent(other.generated)))  # fmt: skip
    add("Squared distance to nearest training image, median", number(own.distance), number(own.held_out_distance),
        _show(base, lambda other: number(other.distance)))  # fmt: skip
    return rows


QUALITIES: tuple[tuple[str, Callable[[float | None], str], str], ...] = (
    ("Fréchet distance", number, "frechet"),
    ("KID", number, "kid"),
    ("Precision", percent, "precision"),
    ("Recall", percent, "recall"),
    ("Samples the classifier is sure of", percent, "confident"),
)


def _quality_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []
    for own in audit.fidelity:
        same, group = _same_fidelity(own, baseline), f"Quality, in features of {own.features}, against {own.against}"
        for label, text, key in QUALITIES:
            if (value := getattr(own, key)) is not None:
                real, other = getattr(own, f"real_{key}", None), getattr(same, key, None)
                rows.append(Row(group, label, text(value), text(real), text(other)))
    return rows


def _leakage_rows(audit: Audit, baseline: Audit | None) -> list[Row]:
    rows = []
    for own in audit.leakage.membership if audit.leakage else []:
        same, how = _same_membership(own, baseline), ATTACKS[own.attack]
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


def points(difference: Interval | None) -> str:
    """A difference of shares in percentage points."""
    if difference is None or not math.isfinite(difference.value):
        return NONE
    value, low, high = (_two_digits(100 * v) for v in (difference.value, difference.low, difference.high))
    return f"{value} points ({low} to {high})"


def bits(value: float) -> str:
    return f"{number(value)} bits"


COMPARED = ("model", "copy rate", "floor", "against baseline", "MQ .15", "MQ .5", "Fréchet", "precision", "recall",
            "membership AUC")  # fmt: skip


def comparison_rows(audits: Sequence[Audit], baseline: Audit | None) -> list[tuple[str, ...]]:
    """The cells of a comparison, in the order of `COMPARED`; the baseline comes first."""
    rest = [audit for audit in audits if audit != baseline]
    everything = [baseline, *rest] if baseline is not None else rest
    features = plots.plane_features(everything) or next((f.features for a in everything for f in a.fidelity), None)
    return [_compared(audit, baseline, features) for audit in everything]


def _compared(audit: Audit, baseline: Audit | None, features: str | None) -> tuple[str, ...]:
    rate, fidelity = headline(audit), _find(audit.fidelity, features=features)
    quantities = [_find(audit.replication.memorized, tau=tau) for tau in HEADLINE_TAUS]
    membership = audit.leakage.membership if audit.leakage else []
    attack = _find(membership, attack="loss") or next(iter(membership), None)
    return (
        audit.model.name,
        _show(rate, lambda r: with_interval(r.rate)),
        _show(rate, lambda r: percent(r.floor.value if r.floor else None)),
        _difference_cell(audit, baseline),
        *(_show(quantity, lambda q: percent(q.generated)) for quantity in quantities),
        _show(fidelity, lambda f: number(f.frechet)),
        _show(fidelity, lambda f: percent(f.precision)),
        _show(fidelity, lambda f: percent(f.recall)),
        _show(attack, lambda a: f"{a.auc.value:.3f}"),
    )


def _difference_cell(audit: Audit, baseline: Audit | None) -> str:
    if baseline is None:
        return NONE
    if audit == baseline:
        return "the baseline"
    rate = headline(audit)
    other = _same_rate(rate, baseline)
    if rate is None or other is None:
        return NONE
    gap = rate.rate.value - other.rate.value
    return f"{'+' if gap > 0 else ''}{_two_digits(100 * gap)} points, {_difference(rate.rate, other.rate)}"


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


# The page


@dataclass(frozen=True)
class Chart:
    svg: Markup
    title: str
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """An image as a data: URI, and what stands in its place for those who cannot see it."""

    src: str
    alt: str


@dataclass(frozen=True)
class Pair:
    generated: Tile
    original: Tile
    copied: bool | None
    facts: list[str]


@dataclass(frozen=True)
class Suspect:
    image: Tile | None
    facts: list[str]


def write_report(
    path: Path,
    audit: Audit,
    pictures: Pictures,
    *,
    baseline: Audit | None = None,
    others: Sequence[Audit] = (),
    early_stop: Sequence[Audit] = (),
) -> None:
    """Write `report.html`: one file with all images inlined, that asks nothing of the network.

    Args:
        path: file to write; its folder is made.
        audit: what the report is about.
        pictures: images and rows to show beside its numbers.
        baseline: what its numbers stand beside.
        others: audits for the comparison.
        early_stop: audits of one training at growing lengths, for the copy-quality plane.
    """
    finding, sentence = judge(audit, baseline)
    compared = comparison_rows([audit, *others], baseline)
    page = _environment().from_string(PAGE)
    html = page.render(
        style=Markup(STYLE),
        audit=audit,
        baseline=baseline,
        finding=finding,
        sentence=sentence,
        cards=_cards(audit, baseline),
        key_numbers=_by_group(key_numbers(audit, baseline)),
        rates=_rates_chart(audit, baseline, others),
        quantity=_quantity_chart(audit, baseline),
        pairs=_pairs(audit, pictures),
        worst_only=[] if pictures.worst is not None else audit.replication.worst[:16],
        sheet=_sheet(pictures.samples),
        shown_samples=0 if pictures.samples is None else min(SHOWN_SAMPLES, len(pictures.samples)),
        loss_chart=_loss_chart(pictures),
        skip_chart=_skip_chart(pictures),
        movement=_movement_charts(pictures.rows),
        curves=_curve_charts(pictures.rows),
        suspects=_suspects(audit, pictures.suspects),
        compared_names=COMPARED,
        compared=compared if len(compared) > 1 else [],
        planes=_plane_charts(audit, baseline, others, early_stop),
        threshold=getattr(headline(audit), "threshold", None),
        settings=_settings(audit),
        methods=_methods(audit, pictures),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html)


def _environment() -> Environment:
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": percent, "share": with_interval, "number": number, "interval": plain_interval}
    return env


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    detail: str
    others: list[tuple[str, str]]


def _cards(audit: Audit, baseline: Audit | None) -> list[Card]:
    """The four numbers to see first."""
    cards = []
    if (rate := headline(audit)) is not None:
        low, high = (_two_digits(100 * v) for v in (rate.rate.low, rate.rate.high))
        floor = [("real held-out images", with_interval(rate.floor))] if rate.floor else []
        beside = _beside(_same_rate(rate, baseline), lambda other: with_interval(other.rate))
        cards.append(Card("Copy rate", percent(rate.rate.value), f"{low} to {high} %", floor + beside))
    for own in audit.fidelity[:1]:
        same = _same_fidelity(own, baseline)
        real = [("training images", number(own.real_frechet))] if own.real_frechet is not None else []
        beside = _beside(same, lambda other: number(other.frechet))
        cards.append(Card("Fréchet distance", number(own.frechet), "less is better", real + beside))
        perfect = _both(own.real_precision, own.real_recall)
        real = [("training images", perfect)] if perfect != NONE else []
        beside = _beside(same, lambda other: _both(other.precision, other.recall))
        cards.append(Card("Precision / recall", _both(own.precision, own.recall), "more is better", real + beside))
    for attack in audit.leakage.membership[:1] if audit.leakage else []:
        beside = _beside(_same_membership(attack, baseline), lambda other: plain_interval(other.auc))
        label, interval = f"Membership AUC {ATTACKS[attack.attack]}", f"{attack.auc.low:.3f} to {attack.auc.high:.3f}"
        cards.append(Card(label, f"{attack.auc.value:.3f}", interval, [("guessing", "0.500"), *beside]))
    return cards


def _beside(item: T | None, text: Callable[[T], str]) -> list[tuple[str, str]]:
    return [] if item is None else [("baseline", text(item))]


def _both(first: float | None, second: float | None) -> str:
    """Two shares as '68.0 / 92.4 %'."""
    if NONE in (percent(first), percent(second)):
        return NONE
    return f"{percent(first).removesuffix(' %')} / {percent(second)}"


def _by_group(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(group, list(members)) for group, members in groupby(rows, key=lambda row: row.group)]


def _chart(figure: Figure, name: str, title: str, alt: str, note: str = "") -> Chart:
    return Chart(Markup(plots.svg(figure, name)), title, alt, note)


def _rates_chart(audit: Audit, baseline: Audit | None, others: Sequence[Audit]) -> Chart | None:
    """Copy rates and floors as intervals on one axis, the model's own first."""
    first = headline(audit)
    if first is None:
        return None
    rows = [(f"this model, {VARIANTS[r.variant]}", r.rate, plots.RED) for r in audit.replication.copy_rates]
    rows += [("real held-out images (floor)", first.floor, plots.GREEN)] if first.floor else []
    compared = [] if baseline is None else [(baseline, plots.BLUE)]
    compared += [(other, plots.PLUM) for other in others if other != baseline]
    for other, colour in compared:
        rate = headline(other) if other != audit else None
        rows += [(plots.short(other.model.name), rate.rate, colour)] if rate else []
    alt = "; ".join(f"{label}: {with_interval(share)}" for label, share, _ in rows)
    note = "Bars are 95 % intervals. Where they overlap, the rates may be the same."
    return _chart(plots.interval_figure(rows), "rates", "Copy rates with their uncertainty", alt, note)


def _quantity_chart(audit: Audit, baseline: Audit | None) -> Chart | None:
    memorized = audit.replication.memorized
    if not memorized:
        return None
    alt = "; ".join(f"tau {m.tau:g}: {percent(m.generated)}, floor {percent(m.floor)}" for m in memorized)
    note = "Only what rises above the dashed line is more than real images that were never trained on would score."
    with_points = baseline if baseline is not None and baseline != audit and baseline.replication.memorized else None
    return _chart(plots.quantity_figure(audit, with_points), "mq", "Memorized quantity by threshold", alt, note)


def _loss_chart(pictures: Pictures) -> Chart | None:
    groups = {name: np.asarray(values, float) for name, values in pictures.losses.items()}
    known = {name: values[np.isfinite(values)] for name, values in groups.items() if np.isfinite(values).any()}
    if not known:
        return None
    alt = "; ".join(
        f"{name}: {len(v):,} samples, median loss {number(float(np.median(v)))}" for name, v in known.items()
    )
    note = "Bars of each group add up to 100 %. Memorized samples lose little because the model knows them by heart."
    return _chart(plots.loss_figure(known), "losses", "Losses of training samples", alt, note)


def _skip_chart(pictures: Pictures) -> Chart | None:
    if pictures.skip_by_timestep is None:
        return None
    timesteps, share = (np.asarray(values, float) for values in pictures.skip_by_timestep)
    known = np.isfinite(share)
    if not known.any():
        return None
    most = int(np.nanargmax(share))
    alt = f"Most skipped at timestep {timesteps[most]:.0f}: {percent(float(share[most]))} of draws"
    note = "Draws whose loss is far below the usual at their timestep are skipped, as they teach only what is known."
    figure = plots.skip_figure(timesteps[known], share[known])
    return _chart(figure, "skips", "Skip rate over timesteps", alt, note)


def _movement_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Empty where nothing moved and no shard changed its size: there is nothing to see."""
    charts = []
    moved, quarantined = sum(row["moved"] for row in rows), [row["quarantined"] for row in rows]
    if moved or any(quarantined):
        alt = f"{moved:,} samples moved in all; {quarantined[-1]:,} in quarantine after the last round"
        charts.append(_chart(plots.move_curves(rows), "moves", "Samples moved and quarantined", alt))
    if len({(shard, part["samples"]) for row in rows for shard, part in row["shards"].items()}) > _shards(rows):
        last = ", ".join(f"shard {shard}: {part['samples']:,}" for shard, part in rows[-1]["shards"].items())
        charts.append(
            _chart(plots.size_curves(rows), "sizes", "Samples of each shard", f"After the last round: {last}")
        )
    return charts


def _shards(rows: Sequence[dict[str, Any]]) -> int:
    return len({shard for row in rows for shard in row["shards"]})


def _curve_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    fall = f"From {number(first['loss'])} in round {first['round']} to {number(last['loss'])} in round {last['round']}"
    charts = [_chart(plots.loss_curves(rows), "loss", "Loss over rounds", fall)]
    if any(row["skip_rate"] for row in rows):
        alt = f"{percent(last['skip_rate'])} of draws skipped in the last round"
        charts.append(_chart(plots.skip_curves(rows), "skipping", "Skip rate over rounds", alt))
    return charts


def _plane_charts(
    audit: Audit, baseline: Audit | None, others: Sequence[Audit], early_stop: Sequence[Audit]
) -> list[Chart]:
    """Empty unless there are at least two points: one alone tells nothing."""
    audits = [audit, *others]
    everything = [*audits, *([baseline] if baseline else []), *early_stop]
    points = plots.plane_points(everything, plots.plane_features(everything))
    if len({point.label for point in points}) < 2:
        return []
    charts = []
    for quality, title in (("frechet", "Copy rate and Fréchet distance"), ("precision", "Copy rate and precision")):
        alt = "; ".join(
            f"{p.label}: copy rate {percent(p.rate.value)}, {quality} {number(getattr(p.fidelity, quality))}"
            for p in points
        )
        charts.append(_chart(plots.plane_panel(quality, audits, baseline, early_stop), quality, title, alt))
    return charts


# Images


def _tile(image: Tensor, alt: str) -> Tile:
    """A float [C, H, W] image in [0, 1] at its own size; the page enlarges small ones with sharp pixels."""
    return Tile(_data_uri(_image(image, TILE_SIDE)), alt)


def _image(image: Tensor, side: int) -> Image.Image:
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.thumbnail((side, side))
    return picture


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _sheet(samples: Tensor | None) -> Tile | None:
    if samples is None or not len(samples):
        return None
    shown = samples[:SHOWN_SAMPLES].detach().float().cpu()
    factor = max(1, math.ceil(shown.shape[-1] / GRID_TILE_SIDE))
    small = F.avg_pool2d(shown, factor) if factor > 1 else shown
    return Tile(_data_uri(image_grid(small)), f"The first {len(shown)} samples")


def _pairs(audit: Audit, pictures: Pictures) -> list[Pair]:
    worst = pictures.worst
    if worst is None:
        return []
    named = audit.replication.worst if len(audit.replication.worst) == len(worst.ratio) else None
    rate = headline(audit)
    pairs = []
    for i, (generated, original, r) in enumerate(
        zip(worst.generated, worst.originals, worst.ratio.tolist(), strict=True)
    ):
        distance = float((generated.double() - original.double()).square().sum())
        facts = [f"ratio {number(r)}"] if math.isfinite(r) else []
        facts.append(f"distance {number(distance)}")
        if named is not None:
            facts.append(f"sample {named[i].sample}, training image {named[i].train}")
        copied = r < rate.threshold if rate is not None and math.isfinite(r) else None
        left, right = _tile(generated, f"Generated image {i + 1}"), _tile(original, "Its nearest training image")
        pairs.append(Pair(left, right, copied, facts))
    return pairs


def _suspects(audit: Audit, images: Tensor | None) -> list[Suspect]:
    duplicates = audit.leakage.duplicates if audit.leakage else None
    shown = []
    for i, suspect in enumerate(duplicates.suspects[:SHOWN_SUSPECTS] if duplicates else []):
        known = images is not None and i < len(images)
        image = _tile(images[i], f"Training image {suspect.train}") if known and images is not None else None
        copies = "in the data once" if suspect.copies == 1 else f"in the data {suspect.copies:,} times"
        shown.append(
            Suspect(
                image, [f"image {suspect.train}", f"log-ratio {suspect.log_ratio:+.2f}, z {suspect.z:+.1f}", copies]
            )
        )
    return shown


# Settings and methods


def _settings(audit: Audit) -> list[tuple[str, list[tuple[str, str]]]]:
    model, data, training = audit.model, audit.data, audit.training
    kind = {"run": "a run of ret-fl", "pipeline": "a diffusers pipeline", "images": "images without a model"}
    channels, height, width = data.image_shape
    parts: list[tuple[str, dict[str, Any]]] = [
        ("Audited", {
            "model": model.name, "path": model.path, "kind": kind[model.kind], "samples": model.samples,
            "seed of the noise": model.seed, "sampling steps": model.steps, "parameters": model.parameters,
        }),
        ("Data", {
            "source": data.source, "images": f"{width} x {height}, {channels} channel{'s' * (channels != 1)}",
            "training images": data.train, "without exact duplicates": data.distinct,
            "reference images": data.reference, "held-out images": data.held_out,
            "canaries": f"{data.canaries} x {data.canary_repeats}" if data.canaries else 0,
        }),
        ("Settings of the run off their defaults", dict(training.settings) if training else {}),
        ("Made with", {"audited at": audit.created, **audit.versions, "audit.json": f"version {audit.schema_version}"}),
    ]  # fmt: skip
    shown = [(title, [(k, _setting(v)) for k, v in values.items() if v is not None]) for title, values in parts]
    return [(title, values) for title, values in shown if values]


def _setting(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _methods(audit: Audit, pictures: Pictures) -> list[Method]:
    """How the numbers that are there were computed."""
    leakage, own = audit.leakage, audit.replication
    present = {
        "copy-rate": bool(own.copy_rates),
        "memorized": bool(own.memorized),
        "carlini": bool(own.carlini),
        "similarity": bool(audit.similarity),
        "fidelity": bool(audit.fidelity),
        "membership": leakage is not None and bool(leakage.membership),
        "exposure": leakage is not None and leakage.exposure is not None,
        "duplicates": leakage is not None and leakage.duplicates is not None,
        "skips": bool(pictures.rows) or pictures.skip_by_timestep is not None,
        "losses": bool(pictures.losses),
    }
    return [method for method in METHODS if present.get(method.key, True)]
