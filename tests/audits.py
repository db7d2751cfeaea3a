"""Audits made up for the tests of what is said of them."""

from __future__ import annotations

from typing import Any

from ret_fl.audit.schema import (
    Audit,
    CarliniShare,
    CopyRate,
    DataInfo,
    Duplicates,
    Exposure,
    Fidelity,
    Interval,
    Leakage,
    Membership,
    MemorizedQuantity,
    ModelInfo,
    Replication,
    Similarity,
    SuspectedDuplicate,
    Training,
    WorstCopy,
)

COPIES = Interval(value=0.252, low=0.226, high=0.280)
FEW = Interval(value=0.002, low=0.0005, high=0.0073)
FLOOR = Interval(value=0.0064, low=0.0034, high=0.0122)


def make_rate(rate: Interval, **changes: Any) -> CopyRate:
    values: dict[str, Any] = {
        "variant": "pixels", "threshold": 0.3, "rate": rate, "floor": FLOOR,
        "above_floor": Interval(value=rate.value - 0.0064, low=rate.low - 0.0122, high=rate.high - 0.0034),
        "distinct": 33, "canary": 0.214, "ordinary": 0.038, "canary_hits": [100, 60, 30, 20, 4],
    }  # fmt: skip
    return CopyRate(**values | changes)


def make_fidelity(**changes: Any) -> Fidelity:
    values: dict[str, Any] = {
        "features": "classifier", "against": "held-out", "images": 254, "frechet": 10.7, "kid": 0.0123,
        "precision": 0.755, "recall": 0.8346, "confident": 0.858, "real_frechet": 7.06, "real_precision": 0.91,
        "real_recall": 0.948,
    }  # fmt: skip
    return Fidelity(**values | changes)


def make_audit(name: str = "central", rate: Interval = COPIES, *, samples: int = 1000, **changes: Any) -> Audit:
    """A full audit; `changes` replace whole parts."""
    auc = Interval(value=0.612, low=0.571, high=0.653)
    caught = Interval(value=0.035, low=0.015, high=0.08)
    values: dict[str, Any] = {
        "created": "2026-01-02T03:04:05Z",
        "versions": {"ret-fl": "0.1.0", "torch": "2.13.0"},
        "model": ModelInfo(name=name, path="runs/a", kind="run", samples=samples, seed=0, steps=50, parameters=1234567),
        "data": DataInfo(
            source="digits", image_shape=(1, 8, 8), train=245, distinct=200, reference=200, held_out=254, canaries=5,
            canary_repeats=10,
        ),
        "replication": make_replication([make_rate(rate)]),
        "similarity": [
            Similarity(
                features="dinov2", mean=0.62, percentile_50=0.6, percentile_95=0.913, above_half=0.8,
                floor_percentile_95=0.88, background_percentile_95=0.9,
            )
        ],
        "fidelity": [make_fidelity()],
        "leakage": Leakage(
            membership=[
                Membership(attack="loss", members=245, non_members=254, auc=auc, tpr_at_1_percent=caught,
                           tpr_at_01_percent=caught)
            ],
            exposure=Exposure(exposures=[4.2, 8.0], mean=6.1, most=10.2),
            duplicates=Duplicates(
                suspects=[SuspectedDuplicate(train=3, log_ratio=-1.21, z=-4.2, copies=9)], precision=1.0, recall=0.5
            ),
        ),
        "training": Training(
            settings={"shards": 4, "agc.mode": "off"}, rounds=3, images=120050, moved=6, skip_rate=0.161, failures=0,
            final_train_loss=0.0571, final_held_out_loss=0.0823,
        ),
        "warnings": ["only 254 held-out images"],
    }  # fmt: skip
    return Audit(**values | changes)


def on_other_data(audit: Audit, **changes: Any) -> Audit:
    """The same numbers, measured against other images."""
    return audit.model_copy(update={"data": audit.data.model_copy(update=changes or {"reference": 199})})


def make_replication(rates: list[CopyRate], **changes: Any) -> Replication:
    values: dict[str, Any] = {
        "copy_rates": rates,
        "k": 50,
        "memorized": [MemorizedQuantity(tau=tau, generated=tau, floor=tau / 2) for tau in (0.15, 0.3, 0.5)],
        "carlini": [CarliniShare(alpha=0.5, generated=0.6, floor=0.3)],
        "distance": 1.05,
        "held_out_distance": 1.77,
        "worst": [WorstCopy(sample=854, train=179, ratio=0.021, distance=0.04)],
    }
    return Replication(**values | changes)
