"""Does the model copy its training data? One sentence, with its uncertainty."""

from __future__ import annotations

from ret_fl.audit.counterparts import NO_DIFFERENCE, difference, headline, same_data, same_fidelity, same_rate
from ret_fl.audit.fidelity import ENOUGH_SAMPLES
from ret_fl.audit.finding import WORTH_SEEING, Finding, could_miss, find_copies
from ret_fl.audit.members import members_told
from ret_fl.audit.schema import Audit, CopyRate, Interval
from ret_fl.audit.words import number, percent, with_interval

HARDLY_LEARNED = 2.0
"""Samples this many times as far from the training images as real images are: the model has hardly learned."""
NO_PRECISION = 0.1
"""Precision below this share of that of real images: the model has hardly learned."""
LESS_TRAINED = 1.1
"""Quality worse than the baseline's by this factor may explain fewer copies."""


def verdict(audit: Audit, baseline: Audit | None = None) -> str:
    """Whether the model copies, in one sentence with its uncertainty.

    Copies are claimed where the 95 % interval of the copy rate lies above that of real held-out images. That none show
    is said only where copying of 5 % of samples would have been seen (`could_miss`), by a model that has learned to
    draw. Against a baseline, rates differ if their intervals do not overlap; both cover the drawing of samples, not
    the training seed.
    """
    return judge(audit, baseline)[1]


def judge(audit: Audit, baseline: Audit | None = None) -> tuple[Finding, str]:
    """The finding behind `verdict`, and its sentence."""
    name, (finding, rate) = audit.model.name, find_copies(audit.replication.copy_rates)
    unlearned, members = _hardly_learned(audit), members_told(audit)
    if unlearned and finding in (Finding.NONE, Finding.UNKNOWN):
        finding = Finding.UNLEARNED
    elif members and finding is Finding.NONE:
        finding = Finding.TELLS
    measured, none_shown = _measured(audit, rate), f"No copying beyond chance shows in {name}"
    main = {
        Finding.COPIES: f"Samples of {name} copy training images: {measured}",
        Finding.MAYBE: f"Samples of {name} may copy training images, but the evidence is weak: {measured}, and the "
        "intervals overlap",
        Finding.NONE: f"{none_shown}: {measured}",
        Finding.TELLS: f"{none_shown}, but it tells members apart: {measured}",
        Finding.UNKNOWN: f"Whether samples of {name} copy training images cannot be told: {measured}"
        f"{_unseen(audit, rate)}",
        Finding.UNLEARNED: f"{name} has hardly learned to draw: {unlearned}, so a low copy rate says little; "
        f"{measured}",
    }[finding]
    parts = [main]
    if audit.model.samples < ENOUGH_SAMPLES:
        parts.append(
            f"{audit.model.samples:,} samples are few, so take at least {ENOUGH_SAMPLES:,} before relying on it"
        )
    if unlearned and finding is not Finding.UNLEARNED:
        parts.append(f"{unlearned}, so the model has hardly learned")
    if members:
        parts.append(f"training images can be told from others: {members}")
    return finding, "; ".join([*parts, *_against_baseline(audit, baseline)]) + "."


def _measured(audit: Audit, rate: CopyRate | None) -> str:
    count = f"{audit.model.samples:,}"
    if rate is None:
        return (
            f"without reference images, real ones that were never trained on, no copy rate was measured on {count} "
            "samples, so add --reference"
        )
    measured = f"{_rate_text(rate.rate)} of {count} samples count as copies{_variant_text(rate)}"
    if rate.floor is None:
        return f"{measured}, but without held-out images nobody knows how many of these are chance"
    return f"{measured}, against {with_interval(rate.floor)} of real images that were never trained on"


def _unseen(audit: Audit, rate: CopyRate | None) -> str:
    """How much copying could go unseen beside this floor, and what would show it."""
    if rate is None or rate.floor is None:
        return ""
    wide = rate.floor.high - rate.floor.value > WORTH_SEEING
    more = f"hold out more than {audit.data.held_out:,} images" if wide else "draw more samples"
    return f", so copying of {percent(could_miss(rate))} of samples could go unseen, and you should {more}"


def _rate_text(share: Interval) -> str:
    return f"{percent(share.value)} (95 % interval {with_interval(share).partition('(')[2]}"


def _variant_text(rate: CopyRate) -> str:
    return {
        "pixels": "",
        "shift": " once training images may be moved by a pixel",
        "flip": " once training images may be mirrored",
    }[rate.variant]


def _hardly_learned(audit: Audit) -> str:
    """What shows that the model has hardly learned to draw, '' if nothing does."""
    reasons, held_out = [], audit.replication.held_out_distance
    if held_out and (far := audit.replication.distance / held_out) > HARDLY_LEARNED:
        reasons.append(f"samples lie {far:.1f} times as far from the training images as real held-out images do")
    for own in audit.fidelity:
        if own.precision < NO_PRECISION * (own.real_precision or 1):
            real = f" against {percent(own.real_precision)} of real images" if own.real_precision else ""
            reasons.append(f"precision is {percent(own.precision)}{real}")
            break
    return " and ".join(reasons)


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
