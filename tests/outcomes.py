"""What tests of resuming and of checkpoints share: runs that are killed, and what a run came to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Client, run_server
from federations import assert_equal_states
from flwr.app import Context, Message, MessageType

from clients.app import app as client_app
from ret_fl.checkpoint import Checkpoint, load_latest
from ret_fl.config import RunConfig, Scalar
from ret_fl.ledger import ShardLedger
from ret_fl.packing import unpack_state
from ret_fl.protocol import TrainOrder
from ret_fl.rundir import RunDir

Tiny = Callable[..., RunConfig]

# everything that has a memory: banks and skips, quarantine, moves, strengths, moments
SETTINGS: Mapping[str, Scalar] = {
    "num-server-rounds": 4,
    "local-epochs": 2,
    "agc.t-max": 1000,
    "taa.mode": "next-visit",
    "redistribution.policy": "high-loss+quarantine",
    "redistribution.fraction": 0.2,
    "quarantine.share": 0.2,
    "quarantine.min-draws": 1,
}
PHASED: Mapping[str, Scalar] = SETTINGS | {"aggregate-every": 2}
APART: Mapping[str, Scalar] = SETTINGS | {"aggregate-every": 0}


RET_FL = "from ret_fl.cli import app; app()"


class Killed(BaseException):
    """Ends a run like a kill: nothing between it and the top catches it."""


def killing(round: int, shard: int) -> Client:
    """Real clients; the process 'dies' when one is asked to train `shard` in `round`."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order = TrainOrder.unpack(message.content)[0]
            if (order.round, order.shard) == (round, shard):
                raise Killed
        return client_app(message, context)

    return client


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    timeless = {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
    shards = {k: {n: v for n, v in s.items() if n != "seconds"} for k, s in row["shards"].items()}
    return timeless | {"shards": shards}


@dataclass
class Outcome:
    """What a run came to, without its clock and its name."""

    last: Checkpoint
    rows: list[dict[str, Any]]
    ledger: ShardLedger
    final: bytes

    @classmethod
    def of(cls, run: RunDir) -> Outcome:
        weights = b"".join(file.read_bytes() for file in sorted(run.final.glob("**/unet/*.safetensors")))
        return cls(
            load_latest(run.checkpoints), [without_times(r) for r in run.rows()], ShardLedger.load(run.ledger), weights
        )


def assert_same_outcome(left: Outcome, right: Outcome) -> None:
    assert left.rows == right.rows
    assert left.last.round == right.last.round
    assert [k for k, v in left.last.weights.items() if not np.array_equal(v, right.last.weights[k])] == []
    for ours, theirs in ((left.ledger, right.ledger), (left.last.ledger, right.last.ledger)):
        for f in fields(ShardLedger):
            np.testing.assert_array_equal(getattr(ours, f.name), getattr(theirs, f.name), err_msg=f.name)
    for one, other in zip(left.last.shards, right.last.shards, strict=True):
        np.testing.assert_array_equal(one.bank_values, other.bank_values)
        np.testing.assert_array_equal(one.bank_visits, other.bank_visits)
        assert one.proxy_round == other.proxy_round
        assert (one.weights is None) == (other.weights is None)
        if one.weights is not None and other.weights is not None:
            assert_equal_states(unpack_state(one.weights), unpack_state(other.weights))
    assert left.final == right.final


_known: dict[str, Outcome] = {}


def uninterrupted(config: RunConfig) -> Outcome:
    """The outcome of a config run in one go; each is run once."""
    key = json.dumps(config.to_flat() | {"state-dir": ""})
    if key not in _known:
        with tempfile.TemporaryDirectory() as folder:
            _known[key] = Outcome.of(run_server(config, Path(folder) / "run"))
    return _known[key]


def killed_at(config: RunConfig, out: Path, round: int, shard: int) -> None:
    with pytest.raises(Killed):
        run_server(config, out, killing(round, shard))
