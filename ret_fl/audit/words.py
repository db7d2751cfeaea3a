"""Numbers of an audit as text."""

from __future__ import annotations

import math

from ret_fl.audit.schema import Interval

NONE = "n/a"


def percent(value: float | None) -> str:
    """0.0123 -> '1.23 %', 0.123 -> '12.3 %'."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{two_digits(100 * value)} %"


def two_digits(value: float) -> str:
    """Two decimals below ten, one above."""
    return f"{value:.2f}" if abs(round(value, 2)) < 10 else f"{value:.1f}"


def with_interval(share: Interval | None) -> str:
    """'0.20 % (0.05 to 0.73 %)'."""
    if share is None or not math.isfinite(share.value):
        return NONE
    return f"{percent(share.value)} ({two_digits(100 * share.low)} to {two_digits(100 * share.high)} %)"


def points(difference: Interval | None) -> str:
    """A difference of shares in percentage points."""
    if difference is None or not math.isfinite(difference.value):
        return NONE
    value, low, high = (two_digits(100 * v) for v in (difference.value, difference.low, difference.high))
    return f"{value} points ({low} to {high})"


def number(value: float | None) -> str:
    """Three significant digits, thousands with commas."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def bits(value: float) -> str:
    """'6.1 bits'."""
    return f"{number(value)} bits"


def plain_interval(interval: Interval | None) -> str:
    """An interval of a number that is no share, such as an AUC."""
    if interval is None:
        return NONE
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
