"""What copy rates say, and which of them says it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ret_fl.audit.schema import CopyRate

HEADLINE_THRESHOLD = 0.3
WORTH_SEEING = 0.05
"""Copying of this share of samples must not go unseen where none is said to show."""


class Finding(Enum):
    """What an audit says of copying: value is the word shown beside the verdict."""

    COPIES = "copies"
    MAYBE = "unclear"
    NONE = "no copies shown"
    TELLS = "no copies shown, but it tells members apart"
    UNKNOWN = "no verdict"
    UNLEARNED = "no verdict: it has hardly learned to draw"


def headline_rate(rates: Sequence[CopyRate]) -> CopyRate | None:
    """The copy rate that stands for a model: by pixels, at .3 if that was measured."""
    pixels = [rate for rate in rates if rate.variant == "pixels"]
    usual = [rate for rate in pixels if rate.threshold == HEADLINE_THRESHOLD]
    return next(iter([*usual, *pixels, *rates]), None)


def find_copies(rates: Sequence[CopyRate]) -> tuple[Finding, CopyRate | None]:
    """What the rates alone say, and the one that says it: COPIES, MAYBE, NONE or UNKNOWN.

    By pixels first; the variants may find copies that pixels do not show.
    """
    first = headline_rate(rates)
    if first is None:
        return Finding.UNKNOWN, None
    ordered = [first, *(r for r in rates if r.threshold == first.threshold and r is not first)]
    for finding in (Finding.COPIES, Finding.MAYBE):
        for rate in ordered:
            if _finding_of(rate) is finding:
                return finding, rate
    return _finding_of(first), first


def could_miss(rate: CopyRate) -> float:
    """Share of samples that may be copies and still not show: what the rate has at most, and the floor leaves room for.

    1 without a floor. A copy hides where a sample would have counted by chance, too, hence the division.
    """
    if rate.floor is None:
        return 1.0
    above = rate.above_floor.high if rate.above_floor is not None else rate.rate.high
    room, no_chance = max(above, rate.floor.high - rate.floor.value), 1 - rate.floor.value
    return min(rate.rate.high, room / no_chance if room < no_chance else 1.0)


def _finding_of(rate: CopyRate) -> Finding:
    if rate.floor is None:
        return Finding.UNKNOWN
    if rate.rate.low > rate.floor.high:
        return Finding.COPIES
    if rate.above_floor is not None and rate.above_floor.low > 0:
        return Finding.MAYBE
    return Finding.NONE if could_miss(rate) <= WORTH_SEEING else Finding.UNKNOWN
