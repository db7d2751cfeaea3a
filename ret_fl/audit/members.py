"""Whether a model tells its training images from others: attacks and canaries beyond chance."""

from __future__ import annotations

import math

from ret_fl.audit.schema import Audit, Exposure, Membership
from ret_fl.audit.words import bits, plain_interval

ATTACKS = {"loss": "by loss", "pia": "by PIA"}
CHANCE_BITS = 1 / math.log(2)
"""Exposure of a canary that was never trained on, on average: its rank is uniform, so exposure is exponential."""
BY_CHANCE = 0.025
"""Canaries more exposed than this share of never-trained-on ones would be are called exposed."""


def strongest_attack(audit: Audit) -> Membership | None:
    """The membership attack with the highest AUC."""
    return max(audit.leakage.membership if audit.leakage else [], key=lambda attack: attack.auc.value, default=None)


def are_exposed(exposure: Exposure) -> bool:
    """Whether the mean exposure is more than chance gives: the sum of exponentials is a gamma variable."""
    count = len(exposure.exposures)
    events = sum(exposure.exposures) / CHANCE_BITS
    if events <= 0:
        return False
    terms = (math.exp(i * math.log(events) - events - math.lgamma(i + 1)) for i in range(count))
    return sum(terms) < BY_CHANCE


def members_told(audit: Audit) -> str:
    """What tells members apart beyond chance, '' if nothing does: 'AUC 0.886 (0.866 to 0.906) by PIA'."""
    found = []
    attack = strongest_attack(audit)
    if attack is not None and attack.auc.low > 0.5:
        found.append(f"AUC {plain_interval(attack.auc)} {ATTACKS[attack.attack]}, where 0.5 is guessing,")
    exposure = audit.leakage.exposure if audit.leakage else None
    if exposure is not None and are_exposed(exposure):
        found.append(f"canaries are exposed by {bits(exposure.mean)}, where {CHANCE_BITS:.2f} are chance")
    return " and ".join(found).rstrip(",")
