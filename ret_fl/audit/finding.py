"""What copy rates say, and which of them says it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ret_fl.audit.schema import CopyRate

HEADLINE_THRESHOLD = 0.3


class Finding(Enum):
    """What the copy rate says: value is the word shown beside the verdict."""

    COPIES = "copies"
    MAYBE = "unclear"
    NONE = "no copies shown"
    UNKNOWN = "no verdict"


def headline_rate(rates: Sequence[CopyRate]) -> CopyRate | None:
    """The copy rate that stands for a model: by pixels, at .3 if that was measured."""
    pixels = [rate for rate in rates if rate.variant == "pixels"]
    usual = [rate for rate in pixels if rate.threshold == HEADLINE_THRESHOLD]
    return next(iter([*usual, *pixels, *rates]), None)


def find_copies(rates: Sequence[CopyRate]) -> tuple[Finding, CopyRate | None]:
    """The finding, and the rate it speaks of: by pixels first; the variants may find copies that pixels do not show."""
    first = headline_rate(rates)
    if first is None:
        return Finding.UNKNOWN, None
    ordered = [first, *(r for r in rates if r.threshold == first.threshold and r is not first)]
    for finding in (Finding.COPIES, Finding.MAYBE):
        for rate in ordered:
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
