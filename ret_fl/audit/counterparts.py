"""The number that an audit is known by, and the same number in another audit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from ret_fl.audit.schema import Audit, CopyRate, Fidelity, Interval, Membership

HEADLINE_THRESHOLD = 0.3
NO_DIFFERENCE = "no clear difference"
T = TypeVar("T")


def headline(audit: Audit) -> CopyRate | None:
    """The copy rate that stands for the model: by pixels, at .3 if that was measured."""
    pixels = [rate for rate in audit.replication.copy_rates if rate.variant == "pixels"]
    usual = [rate for rate in pixels if rate.threshold == HEADLINE_THRESHOLD]
    return next(iter(usual + pixels + audit.replication.copy_rates), None)


def find(items: Iterable[T], **wanted: object) -> T | None:
    """The first item whose attributes are as wanted."""
    return next((item for item in items if all(getattr(item, k) == v for k, v in wanted.items())), None)


def same_rate(own: CopyRate | None, other: Audit | None) -> CopyRate | None:
    """The other audit's copy rate in the same variant and at the same threshold."""
    if own is None or other is None:
        return None
    return find(other.replication.copy_rates, variant=own.variant, threshold=own.threshold)


def same_fidelity(own: Fidelity, other: Audit | None) -> Fidelity | None:
    """The other audit's quality in the same features, against images of the same kind."""
    return None if other is None else find(other.fidelity, features=own.features, against=own.against)


def same_membership(own: Membership, other: Audit | None) -> Membership | None:
    """The other audit's result of the same attack."""
    leakage = other.leakage if other is not None else None
    return None if leakage is None else find(leakage.membership, attack=own.attack)


def difference(rate: Interval, other: Interval) -> str:
    """'fewer' or 'more' only where the intervals do not overlap."""
    if rate.high < other.low:
        return "fewer"
    return "more" if rate.low > other.high else NO_DIFFERENCE
