"""The wire: orders to clients and their reports, as Flower records. No other file knows a record key."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM, KEY_NORM_BIT
from numpy.typing import NDArray

from ret_fl.config import RunConfig
from ret_fl.events import one_line
from ret_fl.packing import PackingError, State, pack_state, unpack_state

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

ARRAYS, METRICS, ORDER, SAMPLES, REPORT = "arrays", "metrics", "order", "samples", "report"
NUM_EXAMPLES = "num-examples"
CLIPPING = "clipping"

RUN_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
"""A run's key is the name of a folder on every client: the server makes 32 hexadecimal digits."""


STARTS, MOMENTS = ("global", "proxy", "sent"), ("carried", "fresh")
"""What a report may say that training began from, and of Adam's moments."""


_RAISED = "Exception ClientAppException occurred. Message: "
"""What Flower puts before the text of an exception that a ClientApp raised."""


MOST_SAID, MOST_NAME = 2000, 100
"""Characters that are kept of what a node says went wrong, and of its device and fingerprint."""


class ProtocolError(ValueError):
    """A message that is not what this version of ret-fl sends; said in one line, whatever the message holds."""

    def __init__(self, why: str) -> None:
        super().__init__(one_line(why, MOST_SAID))


def _unpack(record: ArrayRecord) -> dict[str, NDArray]:
    """Columns by name. Raises `ProtocolError` for an array whose bytes are not what its key says."""
    try:
        return unpack_state(record)
    except PackingError as error:
        raise ProtocolError(str(error)) from None


def payload_bytes(record: RecordDict) -> int:
    """Bytes of all arrays in a message: what it costs to send."""
    return sum(len(a.data) for arrays in record.values() if isinstance(arrays, ArrayRecord) for a in arrays.values())


def reason_of(error: Error) -> str:
    """What a reply without content says, in one line: the words of the client's exception where Flower wrapped them.

    Around them are Flower's own exception and, in a simulation, Ray's traceback, which the log has, too.
    """
    said = error.reason or f"error {error.code} without a reason"
    _, raised, words = said.rpartition(_RAISED)
    return one_line(words.removesuffix("'>").strip() if raised else said, MOST_SAID)


def find(record: RecordDict, key: str, kind: type[Record]) -> Record | None:
    """The record of this name and kind in a message, or None.

    Flower's own views (`array_records`, ...) and their RecordDict refer to each other: once looked at, a message with
    its weights stays in memory until Python looks for such circles.
    """
    found = record.get(key)
    return found if isinstance(found, kind) else None


def _get(record: RecordDict, key: str) -> ArrayRecord:
    found = find(record, key, ArrayRecord)
    if found is None:
        raise ProtocolError(f"the message lacks its {key!r} record (it has {sorted(record)})")
    return found


@dataclass(frozen=True)
class TrainOrder:
    """What a client needs to train one shard for one round; it needs nothing from earlier rounds.

    run_key: names the run, and the folder of its files on a client: `RUN_KEY`.
    ids: int64 [n], samples of the shard; probability: float32 [n] in [0, 1], of visiting each in a pass;
    strength: float32 [n] in [0, 1], next-visit augmentation; log_ratio, usual: float32 [n], NaN unknown;
    bank_values: float32 [T or bins] and bank_visits: int64, the shard's loss bank.
    proxy_round: the round whose local proxy (weights, moments) the client should go on from, 0 for none.
    start: 'global' trains from the weights sent along; 'proxy' goes on with the client's own; 'sent' goes on with the
    shard's own, which are those sent along.
    upload: whether the reply carries weights.
    frozen: fingerprint of pretrained weights that do not travel and must be the same on every node; '' for none.
    clipping_norm: L2 norm that the client clips the change of its weights to; 0 does not clip.
    expires (seconds since 1970) and signature: the server's word to a sample service that this order may read its ids;
    description: what it has to know of the dataset (ret_fl/samples/records.py, as JSON); hashes: uint8 [n, 16], of each
    sample, so that the service need not be trusted. Without a signing key these are empty.
    """

    config: RunConfig
    run_key: str
    fingerprint: str
    shard: int
    round: int
    proxy_round: int
    start: Literal["global", "proxy", "sent"]
    upload: bool
    ids: Ids
    probability: Floats
    strength: Floats
    log_ratio: Floats
    usual: Floats
    bank_values: Floats
    bank_visits: Ids
    frozen: str = ""
    clipping_norm: float = 0.0
    expires: int = 0
    signature: bytes = b""
    description: str = ""
    hashes: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 16), np.uint8))

    _SAMPLES = ("ids", "probability", "strength", "log_ratio", "usual", "bank_values", "bank_visits", "hashes")
    _SCALARS = (
        *("run_key", "fingerprint", "shard", "round", "proxy_round", "start", "upload"),
        *("frozen", "clipping_norm", "expires", "signature", "description"),
    )

    def pack(self, weights: ArrayRecord) -> RecordDict:
        """The order with the weights to start from; global ones are one object, shared by all orders of a round."""
        scalars = {key: getattr(self, key) for key in self._SCALARS}
        return RecordDict(
            {
                ARRAYS: weights,
                ORDER: ConfigRecord({**scalars, "config": json.dumps(self.config.to_flat())}),
                SAMPLES: pack_state({key: getattr(self, key) for key in self._SAMPLES}),
            }
        )

    @classmethod
    def unpack(cls, record: RecordDict) -> tuple[TrainOrder, State]:
        """The order and the weights sent along. Raises `ProtocolError` for a malformed message."""
        told = find(record, ORDER, ConfigRecord)
        if told is None:
            raise ProtocolError(f"the message lacks its {ORDER!r} record (it has {sorted(record)})")
        scalars = dict(told)
        samples = _unpack(_get(record, SAMPLES))
        missing = [k for k in (*cls._SCALARS, "config") if k not in scalars] + [
            k for k in cls._SAMPLES if k not in samples
        ]
        if missing:
            raise ProtocolError(f"the order lacks {', '.join(missing)}: do server and client run the same ret-fl?")
        key = scalars["run_key"]
        if not (isinstance(key, str) and RUN_KEY.fullmatch(key)):
            raise ProtocolError(f"the order's run_key {key!r:.80} is not the key of a run")
        config = RunConfig.from_flat(json.loads(str(scalars.pop("config"))))
        fields = {k: scalars[k] for k in cls._SCALARS} | {k: samples[k] for k in cls._SAMPLES}
        order = cls(config=config, **fields)  # type: ignore[arg-type]
        per_sample = (order.ids, order.probability, order.strength, order.log_ratio, order.usual)
        if not len(order.ids) or any(a.shape != order.ids.shape for a in per_sample):
            raise ProtocolError(f"order for shard {order.shard}: empty, or columns of unequal length")
        if order.hashes.shape != (len(order.ids) if order.signature else 0, 16) or order.hashes.dtype != np.uint8:
            raise ProtocolError(f"order for shard {order.shard}: signed, but not with a hash of each sample")
        try:
            return order, unpack_state(_get(record, ARRAYS))
        except PackingError as error:
            raise ProtocolError(str(error)) from None


@dataclass(frozen=True)
class TrainReport:
    """What a client tells of one round on one shard.

    ids: int64 [m], all of the order's samples, or with `report = tails` only the two tails;
    visits, skips, draws: int64 [m]; log_ratio_sum: float64 [m]; strength: float32 [m].
    memorized: int64 [a], samples AGC skipped, most often first, with memorized_score float32 [a] (share of visits
    skipped); high_loss: int64 [b], badly fitted samples, worst first, with high_loss_score float32 [b] (mean
    log-ratio). bank_values, bank_visits: the shard's loss bank after the round. bin_mean: float64 [50] and
    bin_count: int64 [50], mean log-loss by noise level (low noise only); spread: of a single log-ratio. level_draws,
    level_skips: int64 [50], draws and AGC's skips by noise level, all of them.
    images went through forward and backward in `seconds`. moments: whether Adam's were carried over.
    start: what training really began from, 'proxy', 'global' or 'sent'. clipped: whether the client's change was longer
    than the order's clipping_norm. Under differential privacy a report tells no more than counts: see `silenced`.
    """

    shard: int
    round: int
    num_examples: int
    images: int
    seconds: float
    loss: float
    skip_rate: float
    spread: float
    start: str
    moments: str
    ids: Ids
    visits: Ids
    skips: Ids
    draws: Ids
    log_ratio_sum: NDArray[np.float64]
    strength: Floats
    memorized: Ids
    memorized_score: Floats
    high_loss: Ids
    high_loss_score: Floats
    bank_values: Floats
    bank_visits: Ids
    bin_mean: NDArray[np.float64]
    bin_count: Ids
    level_draws: Ids
    level_skips: Ids
    clipped: bool = False

    _PER_SAMPLE = ("ids", "visits", "skips", "draws", "log_ratio_sum", "strength")
    _TAILS = ("memorized", "memorized_score", "high_loss", "high_loss_score")
    _LEVELS = ("bin_mean", "bin_count", "level_draws", "level_skips")
    _ARRAYS = (*_PER_SAMPLE, *_TAILS, "bank_values", "bank_visits", *_LEVELS)
    _INTEGERS = (
        *("ids", "visits", "skips", "draws", "memorized", "high_loss"),
        *("bank_visits", "bin_count", "level_draws", "level_skips"),
    )
    _METRICS = ("images", "seconds", "loss", "skip_rate", "spread")
    _SCALARS = ("shard", "round", "start", "moments")

    def pack(self, weights: State | None) -> RecordDict:
        """The report, with the proxy's weights where the order asked for them."""
        metrics = {key.replace("_", "-"): float(getattr(self, key)) for key in self._METRICS}
        record = RecordDict(
            {
                METRICS: MetricRecord({NUM_EXAMPLES: self.num_examples, **metrics}),
                ORDER: ConfigRecord({key: getattr(self, key) for key in self._SCALARS}),
                REPORT: pack_state({key: getattr(self, key) for key in self._ARRAYS}),
            }
        )
        if weights is not None:
            record[ARRAYS] = pack_state(weights)
        return record

    def silenced(self, order: TrainOrder) -> TrainReport:
        """Without anything that depends on the samples: no losses (NaN), no samples, the order's bank."""
        changed: dict[str, Any] = {k: getattr(self, k)[:0] for k in (*self._PER_SAMPLE, *self._TAILS)}
        changed |= {k: np.zeros_like(getattr(self, k)) for k in self._LEVELS}
        changed |= {"bank_values": order.bank_values, "bank_visits": order.bank_visits}
        return replace(self, loss=float("nan"), skip_rate=0.0, spread=0.0, **changed)

    def is_silent(self, order: TrainOrder) -> bool:
        """Whether it tells nothing of the samples of its order."""
        wanted = self.silenced(order)
        same = all(np.array_equal(getattr(self, k), getattr(wanted, k)) for k in self._ARRAYS)
        return same and math.isnan(self.loss) and not (self.skip_rate or self.spread)

    @classmethod
    def unpack(cls, record: RecordDict) -> tuple[TrainReport, ArrayRecord | None]:
        """The report and the weights, if any. Raises `ProtocolError` for a malformed or impossible one."""
        scalars, metrics = find(record, ORDER, ConfigRecord), find(record, METRICS, MetricRecord)
        if scalars is None or metrics is None:
            raise ProtocolError(f"not a training report: it has {sorted(record)}")
        arrays = _unpack(_get(record, REPORT))
        names = {key: key.replace("_", "-") for key in cls._METRICS}
        missing = [k for k in cls._SCALARS if k not in scalars] + [k for k in cls._ARRAYS if k not in arrays]
        missing += [name for name in (*names.values(), NUM_EXAMPLES) if name not in metrics]
        if missing:
            raise ProtocolError(f"the report lacks {', '.join(missing)}: do server and client run the same ret-fl?")
        lists = [name for name in (*names.values(), NUM_EXAMPLES) if isinstance(metrics[name], list)]
        if lists:
            raise ProtocolError(f"the report's {', '.join(lists)} must be single numbers")
        values = {key: float(cast(float, metrics[name])) for key, name in names.items()}
        silent = not arrays["ids"].size  # and says so by a loss of NaN; rounds.check_reply knows whether it may be
        if not np.isfinite([v for k, v in values.items() if not (silent and k == "loss")]).all():
            raise ProtocolError(f"the report's metrics are not finite: {values}")
        weight = cast(float, metrics[NUM_EXAMPLES])
        if not 0 < weight < float("inf") or weight % 1:
            raise ProtocolError(f"the report counts {weight} examples")
        cls._check_values(scalars, values)
        odd = [k for k in cls._ARRAYS if arrays[k].ndim != 1 or arrays[k].dtype.kind != "if"[k not in cls._INTEGERS]]
        if odd:
            raise ProtocolError(f"the report's {', '.join(odd)} are not columns of whole numbers, or of floats")
        if any(len(arrays[key]) != len(arrays["ids"]) for key in cls._PER_SAMPLE):
            raise ProtocolError("the report's columns have unequal length")
        for ids, score in (("memorized", "memorized_score"), ("high_loss", "high_loss_score")):
            if len(arrays[ids]) != len(arrays[score]):
                raise ProtocolError(f"the report's {ids} and {score} have unequal length")
        report = cls(
            num_examples=int(weight),
            images=int(values.pop("images")),
            clipped=bool(metrics.get(KEY_NORM_BIT, 0)),
            **{k: scalars[k] for k in cls._SCALARS},  # type: ignore[arg-type]
            **values,  # type: ignore[arg-type]
            **{k: arrays[k] for k in cls._ARRAYS},  # type: ignore[arg-type]
        )
        return report, find(record, ARRAYS, ArrayRecord)

    @staticmethod
    def _check_values(scalars: ConfigRecord, values: dict[str, float]) -> None:
        """Raise `ProtocolError` for a value that no training comes to."""
        odd = [f"{key} is {scalars[key]!r:.40}" for key in ("shard", "round") if type(scalars[key]) is not int]
        for key, known in (("start", STARTS), ("moments", MOMENTS)):
            odd += [f"{key} is {scalars[key]!r:.40}"] if scalars[key] not in known else []
        sound = {
            "images": values["images"] >= 0 and not values["images"] % 1,
            "seconds": values["seconds"] >= 0,
            "skip_rate": 0 <= values["skip_rate"] <= 1,
            "spread": values["spread"] >= 0,
        }
        odd += [f"{key} is {values[key]:g}" for key, right in sound.items() if not right]
        if odd:
            raise ProtocolError(f"impossible values in the report: {', '.join(odd)}")


def base_content(weights: ArrayRecord, report: TrainReport, *, private: bool = False) -> RecordDict:
    """What the aggregating base strategy may see of a reply: one ArrayRecord and one MetricRecord.

    private: all shards weigh the same, as the noise of differential privacy is made for, and no loss is told.
    """
    if private:
        return RecordDict(
            {ARRAYS: weights, METRICS: MetricRecord({NUM_EXAMPLES: 1, KEY_NORM_BIT: int(report.clipped)})}
        )
    metrics = MetricRecord({NUM_EXAMPLES: report.num_examples, "loss": report.loss, "skip-rate": report.skip_rate})
    return RecordDict({ARRAYS: weights, METRICS: metrics})


def clipping_norm(config: ConfigRecord) -> float:
    """What a strategy's `configure_train` wrote for its clients' clipping mod into `config`; 0 if nothing."""
    return float(cast(float, config.get(KEY_CLIPPING_NORM, 0.0)))


def wanted_clipping(record: RecordDict) -> str | None:
    """The `dp.mode` under which the client is to clip its reply to an order, or None if it is not."""
    told = find(record, ORDER, ConfigRecord)
    if told is None or not told.get("clipping_norm") or not told.get("upload"):
        return None
    return str(json.loads(str(told["config"]))["dp.mode"])


def as_order_to_clip(record: RecordDict) -> RecordDict:
    """An order as Flower's clipping mods know it."""
    told = find(record, ORDER, ConfigRecord)
    assert told is not None, "wanted_clipping found it"
    norm = float(cast(float, told["clipping_norm"]))
    return RecordDict({ARRAYS: _get(record, ARRAYS), CLIPPING: ConfigRecord({KEY_CLIPPING_NORM: norm})})


def as_clipped_reply(record: RecordDict) -> RecordDict:
    """The part of a reply that they clip and add to."""
    return RecordDict({key: record[key] for key in (ARRAYS, METRICS)})


@dataclass(frozen=True)
class Hello:
    """How a client introduces itself before it gets work; images_per_second: its speed, 0 if not asked for."""

    partition: int
    device: str
    fingerprint: str
    samples: int
    images_per_second: float

    @staticmethod
    def request(config: RunConfig) -> RecordDict:
        return RecordDict({ORDER: ConfigRecord({"config": json.dumps(config.to_flat())})})

    @staticmethod
    def requested(record: RecordDict) -> RunConfig:
        """The config a hello was asked under."""
        asked = find(record, ORDER, ConfigRecord)
        if asked is None or "config" not in asked:
            raise ProtocolError(f"not a hello request: it has {sorted(record)}")
        return RunConfig.from_flat(json.loads(str(asked["config"])))

    def pack(self) -> RecordDict:
        return RecordDict({ORDER: ConfigRecord(dict(vars(self)))})

    @classmethod
    def unpack(cls, record: RecordDict) -> Hello:
        """Raises `ProtocolError` for what is none."""
        told = find(record, ORDER, ConfigRecord)
        if told is None or set(told) != set(cls.__dataclass_fields__):
            raise ProtocolError(f"not a hello: it has {sorted(record)}")
        kinds = {"partition": int, "device": str, "fingerprint": str, "samples": int, "images_per_second": float}
        odd = [f"{key} is {told[key]!r:.40}" for key, kind in kinds.items() if type(told[key]) is not kind]
        if not odd and not 0 <= cast(float, told["images_per_second"]) < float("inf"):
            odd = [f"images_per_second is {told['images_per_second']!r}"]
        if odd:
            raise ProtocolError(f"not a hello: {', '.join(odd)}")
        names = {key: one_line(cast(str, told[key]), MOST_NAME) for key in ("device", "fingerprint")}
        return cls(**{**told, **names})  # type: ignore[arg-type]
