"""A round as the server sees it: what it carries from shard to shard, what it checks of a reply, what it records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from ret_fl.ledger import Moves
from ret_fl.mitigation.losslog import BINS
from ret_fl.packing import PackingError, State, decode, parts, unpack_state
from ret_fl.protocol import ProtocolError, TrainOrder, TrainReport

HEADLINE = ("seconds", "images", "images_per_second", "loss", "skip_rate", "moved", "quarantined")
"""What of a round's row its event tells, too."""
TOLD = 10
"""Sample IDs of each tail that metrics.jsonl names a shard and round."""


@dataclass
class ShardState:
    """What the server carries of a shard from round to round.

    bank_values, bank_visits: its loss bank. proxy_round: the last round its proxy was trained in. weights: its proxy,
    where proxies are never averaged; None before it was trained, when it is the common start.
    """

    bank_values: NDArray[np.float32]
    bank_visits: NDArray[np.int64]
    proxy_round: int = 0
    weights: ArrayRecord | None = None


def proxy_weights(shards: Sequence[ShardState], start: State) -> Iterator[State]:
    """The weights of each shard's proxy where proxies are never averaged; of one not trained yet the common `start`."""
    for shard in shards:
        yield start if shard.weights is None else unpack_state(shard.weights)


@dataclass(frozen=True)
class RoundSummary:
    """What happened in a round.

    failures: why each missing shard is missing. resent: orders that went to another node, and why. partitions: the
    partition of the node that trained each shard.
    """

    round: int
    aggregated: bool
    reports: list[TrainReport]
    moves: Moves
    quarantined: int
    failures: dict[int, str]
    resent: list[dict[str, object]]
    partitions: dict[int, int]
    bytes_down: int
    bytes_up: int
    seconds: float
    gap: float

    def row(self) -> dict[str, object]:
        """The round's row of metrics.jsonl."""
        images = sum(r.images for r in self.reports)
        weight = np.array([r.num_examples for r in self.reports], float)
        weight = weight / max(weight.sum(), 1)
        return {
            "round": self.round,
            "loss": float(weight @ [r.loss for r in self.reports]),
            "skip_rate": float(weight @ [r.skip_rate for r in self.reports]),
            "moved": len(self.moves),
            "quarantined": self.quarantined,
            "failures": len(self.failures),
            "failed_shards": {str(shard): reason for shard, reason in self.failures.items()},
            "resent": self.resent,
            "aggregated": self.aggregated,
            "level_draws": sum((r.level_draws for r in self.reports), np.zeros(BINS, np.int64)).tolist(),
            "level_skips": sum((r.level_skips for r in self.reports), np.zeros(BINS, np.int64)).tolist(),
            "fresh_moments": sum(r.moments == "fresh" for r in self.reports),
            "gap": self.gap,
            "images": images,
            "images_per_second": images / max(self.seconds, 1e-9),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "shards": {
                str(r.shard): {
                    "loss": r.loss,
                    "skip_rate": r.skip_rate,
                    "samples": r.num_examples,
                    "seconds": r.seconds,
                    "partition": self.partitions[r.shard],
                    "start": r.start,
                    "memorized": r.memorized[:TOLD].tolist(),
                    "high_loss": r.high_loss[:TOLD].tolist(),
                }
                for r in self.reports
            },
        }


def check_reply(
    report: TrainReport, weights: ArrayRecord | None, order: TrainOrder, state: ShardState, expected: ArrayRecord
) -> None:
    """Raise `ProtocolError` if a reply does not answer `order`, or cannot be averaged or absorbed.

    order: the one that the message the reply belongs to asked. state: the shard's before this round. expected: the
    global weights, whose names and shapes sound weights have.
    """
    if report.shard != order.shard:
        raise ProtocolError(f"it is about shard {report.shard}")
    if report.round != order.round:
        raise ProtocolError(f"it answers round {report.round}")
    if report.num_examples != len(order.ids):
        raise ProtocolError(f"it counts {report.num_examples} examples, the order had {len(order.ids)}")
    least, most = _images(order)
    if not least <= report.images <= most:
        asked = f"{least}" if least == most else f"{least} to {most}"
        raise ProtocolError(f"it says that it trained on {report.images} images, the order asked for {asked}")
    if order.config.private and not report.is_silent(order):
        raise ProtocolError(f"it tells of its samples, which dp.mode={order.config.dp.mode} forbids")
    if not order.config.private and np.isnan(report.loss):
        raise ProtocolError("its loss is not finite")
    for name in ("bank_values", "bank_visits"):
        told = getattr(report, name)
        if told.shape != getattr(state, name).shape or not np.isfinite(told).all():
            raise ProtocolError(f"its {name} has a wrong shape or is not finite")
    levels = (report.bin_mean, report.bin_count, report.level_draws, report.level_skips)
    if any(x.shape != (BINS,) or not np.isfinite(x).all() for x in levels):
        raise ProtocolError("its noise levels (bin_*, level_*) have a wrong shape or are not finite")
    if any((x < 0).any() for x in (report.bin_count, report.bank_visits, report.level_skips)):
        raise ProtocolError("it counts fewer than no draws (bin_count, bank_visits, level_skips)")
    if (report.level_skips > report.level_draws).any():
        raise ProtocolError("it skips more than it draws (level_skips, level_draws)")
    if order.upload:
        _check_weights(weights, expected)


def _images(order: TrainOrder) -> tuple[int, int]:
    """How many images a client trains on for an order, at least and at most."""
    visits = order.config.visits(len(order.ids))
    # a draw waits for a second look (all), or has had one already (band)
    bounds = {"two-pass-all": (0, visits), "two-pass-band": (visits, 2 * visits)}
    return bounds.get(order.config.taa.mode, (visits, visits))


def _check_weights(weights: ArrayRecord | None, expected: ArrayRecord) -> None:
    if weights is None:
        raise ProtocolError("it has no weights")
    if set(weights) != set(expected):
        told, due = ({name for key in record for name in key.split(",")} for record in (weights, expected))
        raise ProtocolError(f"its weights have other names or shapes: {sorted(told ^ due)[:3]}")
    for key, packed in weights.items():
        names = key.split(",")
        # as decoded, not what its header says: the base strategy will decode it again
        try:
            (array,) = decode(ArrayRecord({key: packed})).values()
        except PackingError as error:
            raise ProtocolError(str(error)) from None
        shape = tuple(expected[key].shape)
        if array.dtype != np.float32 or array.shape != shape:
            where = f"{names[0]} to {names[-1]}"
            raise ProtocolError(f"the array of {where} is {array.dtype} {array.shape}, expected float32 {shape}")
        if not np.isfinite(array).all():
            name = next(name for name, value in parts(key, array) if not np.isfinite(value).all())
            raise ProtocolError(f"{name} is not finite")
