"""The number that an audit is known by, and the same number in another audit of the same data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from ret_fl.audit.finding import headline_rate
from ret_fl.audit.schema import Audit, CopyRate, DataInfo, Fidelity, Interval, Membership

NO_DIFFERENCE = "no clear difference"
T = TypeVar("T")


def headline(audit: Audit) -> CopyRate | None:
    """The copy rate that stands for the model, as `headline_rate`."""
    return headline_rate(audit.replication.copy_rates)


def find(items: Iterable[T], **wanted: object) -> T | None:
    """The first item whose attributes are as wanted."""
    return next((item for item in items if all(getattr(item, k) == v for k, v in wanted.items())), None)


def same_data(audit: Audit, other: Audit) -> bool:
    """Whether two audits were made against the same images.

    Of those made before fingerprints were kept, by shape and counts.
    """

    def known(data: DataInfo) -> tuple[object, ...]:
        counts = (data.train, data.distinct, data.reference, data.held_out, data.canaries, data.canary_repeats)
        return data.image_shape, *counts

    prints = audit.data.fingerprints, other.data.fingerprints
    return prints[0] == prints[1] if None not in prints else known(audit.data) == known(other.data)


def comparable(audit: Audit, other: Audit | None) -> Audit | None:
    """The other audit, or None where it was made against other images: its numbers say nothing beside these."""
    return other if other is not None and same_data(audit, other) else None


def other_data_warning(audits: Sequence[Audit]) -> str | None:
    """Which audits were made against other images than the first; None where all are of the same."""
    first, *rest = audits
    others = [audit.model.name for audit in rest if not same_data(first, audit)]
    if not others:
        return None
    return (
        f"audited against other images than {first.model.name}: {', '.join(others)}; nothing is compared between them. "
        "Audit them again with the same --data, --reference and --held-out"
    )


def same_rate(own: CopyRate | None, other: Audit | None) -> CopyRate | None:
    """The other audit's copy rate in the same variant and at the same threshold."""
    if own is None or other is None:
        return None
    return find(other.replication.copy_rates, variant=own.variant, threshold=own.threshold)


def same_fidelity(own: Fidelity, other: Audit | None) -> Fidelity | None:
    """The other audit's quality in the same features, against images of the same kind."""
    return None if other is None else next((f for f in other.fidelity if same_features(own, f)), None)


def same_features(own: Fidelity, other: Fidelity) -> bool:
    """Whether two qualities are in the same features; where no recipe is known, by name."""
    recipes = own.recipe, other.recipe
    named_alike = (own.features, own.against) == (other.features, other.against)
    return named_alike and (None in recipes or recipes[0] == recipes[1])


def same_membership(own: Membership, other: Audit | None) -> Membership | None:
    """The other audit's result of the same attack."""
    leakage = other.leakage if other is not None else None
    return None if leakage is None else find(leakage.membership, attack=own.attack)


def difference(rate: Interval, other: Interval) -> str:
    """'fewer' or 'more' only where the intervals do not overlap."""
    if rate.high < other.low:
        return "fewer"
    return "more" if rate.low > other.high else NO_DIFFERENCE
