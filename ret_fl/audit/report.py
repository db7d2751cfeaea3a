"""report.html: an audit for a person, one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from ret_fl.audit import charts, tiles
from ret_fl.audit.counterparts import comparable, headline, same_data, same_fidelity, same_membership, same_rate
from ret_fl.audit.members import ATTACKS, CHANCE_BITS, strongest_attack
from ret_fl.audit.methods import METHODS, Method
from ret_fl.audit.schema import Audit
from ret_fl.audit.stylesheet import STYLE
from ret_fl.audit.tables import COMPARED, Row, comparison_rows, key_numbers
from ret_fl.audit.template import PAGE
from ret_fl.audit.verdict import judge
from ret_fl.audit.words import NONE, number, percent, plain_interval, two_digits, with_interval
from ret_fl.files import write_atomically
from ret_fl.pictures import Pairs

T = TypeVar("T")


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

    Audits against other images stand in the comparison alone, marked: see `comparable`.
    """
    finding, sentence = judge(audit, baseline)
    compared = comparison_rows([audit, *others], baseline)
    baseline = comparable(audit, baseline)
    others, early_stop = ([a for a in group if same_data(audit, a)] for group in (others, early_stop))
    page = _environment().from_string(PAGE)
    html = page.render(
        style=Markup(STYLE),
        audit=audit,
        baseline=baseline,
        finding=finding,
        sentence=sentence,
        cards=_cards(audit, baseline),
        key_numbers=_by_group(key_numbers(audit, baseline)),
        rates=charts.rates_chart(audit, baseline, others),
        quantity=charts.quantity_chart(audit, baseline),
        pairs=tiles.worst_pairs(audit, pictures.worst),
        worst_only=[] if pictures.worst is not None else audit.replication.worst[:16],
        sheet=tiles.sample_sheet(pictures.samples),
        shown_samples=0 if pictures.samples is None else min(tiles.SHOWN_SAMPLES, len(pictures.samples)),
        loss_chart=charts.loss_chart(pictures.losses),
        skip_chart=charts.skip_chart(pictures.skip_by_timestep),
        movement=charts.movement_charts(pictures.rows),
        curves=charts.curve_charts(pictures.rows),
        suspects=tiles.suspect_tiles(audit, pictures.suspects),
        compared_names=COMPARED,
        compared=compared if len(compared) > 1 else [],
        planes=charts.plane_charts(audit, baseline, others, early_stop),
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
    """The numbers to see first."""
    cards = []
    if (rate := headline(audit)) is not None:
        low, high = (two_digits(100 * v) for v in (rate.rate.low, rate.rate.high))
        floor = [("real held-out images", with_interval(rate.floor))] if rate.floor else []
        beside = _beside(same_rate(rate, baseline), lambda other: with_interval(other.rate))
        cards.append(Card("Copy rate", percent(rate.rate.value), f"{low} to {high} %", floor + beside))
    for own in audit.fidelity[:1]:
        same = same_fidelity(own, baseline)
        copying = ", and rewards copying" if own.against == "train" else ""
        real = [("training images", number(own.real_frechet))] if own.real_frechet is not None else []
        beside = _beside(same, lambda other: number(other.frechet))
        cards.append(Card("Fréchet distance", number(own.frechet), f"less is better{copying}", real + beside))
        perfect = _both(own.real_precision, own.real_recall)
        real = [("training images", perfect)] if perfect != NONE else []
        beside = _beside(same, lambda other: _both(other.precision, other.recall))
        cards.append(
            Card("Precision / recall", _both(own.precision, own.recall), f"more is better{copying}", real + beside)
        )
    if (attack := strongest_attack(audit)) is not None:
        beside = _beside(same_membership(attack, baseline), lambda other: plain_interval(other.auc))
        label, interval = f"Membership AUC {ATTACKS[attack.attack]}", f"{attack.auc.low:.3f} to {attack.auc.high:.3f}"
        cards.append(Card(label, f"{attack.auc.value:.3f}", interval, [("guessing", "0.500"), *beside]))
    if audit.leakage and (exposure := audit.leakage.exposure) is not None:
        twin = baseline.leakage.exposure if baseline and baseline.leakage else None
        most = f"of {number(exposure.most)} bits at most"
        chance, beside = ("never trained on", f"{CHANCE_BITS:.2f}"), _beside(twin, lambda other: number(other.mean))
        cards.append(Card("Canary exposure", number(exposure.mean), most, [chance, *beside]))
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


def _settings(audit: Audit) -> list[tuple[str, list[tuple[str, str]]]]:
    model, data, training = audit.model, audit.data, audit.training
    kind = {"run": "a run of ret-fl", "pipeline": "a diffusers pipeline", "images": "images without a model"}
    channels, height, width = data.image_shape
    parts: list[tuple[str, dict[str, Any]]] = [
        ("Audited", {
            "model": model.name, "path": model.path, "kind": kind[model.kind], "samples": model.samples,
            "seed of the noise": model.seed, "sampling steps": model.steps, "parameters": model.parameters,
            "drawn from proxies kept apart": model.ensemble,
            "prompts": len(model.prompts) or None, "guidance": model.guidance,
            "brought to side": model.image_size or None,
            "brought to colours": None if model.channels == "auto" else model.channels,
            "device": audit.measuring.device if audit.measuring else None,
            "images in membership inference, at most": audit.measuring.members if audit.measuring else None,
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
        "inception": any(f.inception_score is not None for f in audit.fidelity),
        "clip": bool(audit.clip),
        "membership": leakage is not None and bool(leakage.membership),
        "exposure": leakage is not None and leakage.exposure is not None,
        "duplicates": leakage is not None and leakage.duplicates is not None,
        "skips": bool(pictures.rows) or pictures.skip_by_timestep is not None,
        "losses": bool(pictures.losses),
    }
    return [method for method in METHODS if present.get(method.key, True)]
