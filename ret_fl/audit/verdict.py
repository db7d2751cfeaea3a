"""Does the model copy its training data? One sentence, with its uncertainty."""

from __future__ import annotations

from ret_fl.audit.counterparts import NO_DIFFERENCE, difference, headline, same_data, same_fidelity, same_rate
from ret_fl.audit.fidelity import ENOUGH_SAMPLES
from ret_fl.audit.finding import Finding, find_copies
from ret_fl.audit.schema import Audit, CopyRate, Interval
from ret_fl.audit.words import number, percent, with_interval

HARDLY_LEARNED = 2.0
"""Samples this many times as far from the training images as real images are: the model has hardly learned."""
LESS_TRAINED = 1.1
"""Quality worse than the baseline's by this factor may explain fewer copies."""


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
    finding, rate = find_copies(audit.replication.copy_rates)
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
    name = baseline.model.name
    if not same_data(audit, baseline):
        return [f"its baseline {name} was audited against other images, so the two are not compared"]
    other = same_rate(rate, baseline)
    if other is None:
        return [f"its baseline {name} has no copy rate to compare with"]
    by = "" if rate is find_copies(audit.replication.copy_rates)[1] else f" by pixels ({percent(rate.rate.value)})"
    change = difference(rate.rate, other.rate)
    if change == NO_DIFFERENCE:
        return [f"there is {NO_DIFFERENCE}{by} to the baseline {name}, {with_interval(other.rate)}"]
    text = f"that is {change} copies{by} than the baseline {name}, {with_interval(other.rate)}"
    return [text + (_less_trained(audit, baseline) if change == "fewer" else "")]


def _less_trained(audit: Audit, baseline: Audit) -> str:
    """What speaks for fewer copies coming from less training: a worse Fréchet distance or precision."""
    for own in audit.fidelity:
        other = same_fidelity(own, baseline)
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
