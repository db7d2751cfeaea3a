"""What a round costs the server, in memory and in seconds, for many shards and a large model.

    python -m benchmarks.server_memory                       # 2, 4, 8 shards; FedAvg, and FedMedian, which needs all
    python -m benchmarks.server_memory --preset ddpm-cifar   # another model

Clients train nothing: each reply is made when it is pulled, as one that arrives. Memory: the most that rounds take
beyond what the server held before, in sizes of a reply (raw and averaged weights). Every row is a process of its own.
Seconds: a round less the making of replies, checkpoint (with fsync) included.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian

from clients.app import app as client_app
from ret_fl.config import RunConfig
from ret_fl.data.sources import deal, load_splits
from ret_fl.diffusion.models import build_unet
from ret_fl.ledger import ShardLedger
from ret_fl.mitigation.losslog import BINS
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import ARRAYS, TrainOrder, TrainReport, find
from ret_fl.recorder import RunRecorder
from ret_fl.rundir import RunDir
from ret_fl.strategy import RedistributeEnsemble
from simulations.inline import InlineGrid

ROUNDS = 2
BASES = {"FedAvg": FedAvg, "FedMedian": FedMedian}


class LazyGrid(InlineGrid):
    """A grid whose nodes answer an order when it is pulled, with the weights it came with, slightly changed."""

    making = 0.0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.orders: dict[str, Message] = {}
        if messages[0].metadata.message_type != MessageType.TRAIN:
            return super().push_messages(messages)
        for i, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"order-{i}"
            self.orders[message.metadata.message_id] = message
        return list(self.orders)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [i for i in message_ids if i in self.orders]
        if not asked:
            return super().pull_messages(message_ids)
        return (self._answer(self.orders.pop(i)) for i in asked)

    def _answer(self, message: Message) -> Message:
        began = time.perf_counter()
        weights = find(message.content, ARRAYS, ArrayRecord) or ArrayRecord()
        order, _ = TrainOrder.unpack(RecordDict({**message.content, ARRAYS: ArrayRecord()}))
        content = untrained(order).pack(None)
        # one array after the other: what it takes to make a reply is no memory of the server's
        content[ARRAYS] = ArrayRecord({k: Array(v.numpy() * np.float32(1.01)) for k, v in weights.items()})
        self.making += time.perf_counter() - began
        return Message(content, reply_to=message)


def untrained(order: TrainOrder) -> TrainReport:
    """A sound report of nothing learned."""
    n, none = len(order.ids), np.empty(0, np.int64)
    counts, levels = np.zeros(n, np.int64), np.zeros(BINS, np.int64)
    return TrainReport(
        shard=order.shard, round=order.round, num_examples=n, images=order.config.visits(n), seconds=1.0, loss=1.0,
        skip_rate=0.0, spread=1.0, start="global", moments="fresh", ids=order.ids, visits=counts, skips=counts,
        draws=counts, log_ratio_sum=np.zeros(n), strength=np.zeros(n, np.float32), memorized=none,
        memorized_score=np.empty(0, np.float32), high_loss=none, high_loss_score=np.empty(0, np.float32),
        bank_values=order.bank_values, bank_visits=order.bank_visits, bin_mean=np.zeros(BINS), bin_count=levels,
        level_draws=levels, level_skips=levels,
    )  # fmt: skip


class Peak:
    """The largest resident size of this process while it is entered, in bytes."""

    def __enter__(self) -> Peak:
        self.process, self.most, self.over = psutil.Process(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def measure(preset: str, shards: int, base: str, folder: Path) -> str:
    """One row of the table."""
    config = RunConfig.from_flat({
        "data.limit": 200, "data.image-size": 64, "shards": shards, "model.preset": preset, "num-server-rounds": ROUNDS,
        "evaluate-every": 0, "out": str(folder / "run"), "redistribution.policy": "none",
    })  # fmt: skip
    data = load_splits(config.data)
    state = build_unet(config.model, data.train.image_shape, data.train.num_classes, 0).state_dict()
    start = pack_state({f"{part}.{k}": v.numpy() for part in ("raw", "ema") for k, v in state.items()})
    size = sum(value.nbytes for value in unpack_state(start).values())
    ledger = ShardLedger.start(deal(config, data), shards)
    strategy = RedistributeEnsemble(
        ledger, config, fingerprint=data.train.fingerprint, run_key="benchmark", base=BASES[base](fraction_evaluate=0.0)
    )
    grid = LazyGrid(client_app, shards, config.to_flat())
    strategy.roster.greet(grid)
    recorder = RunRecorder(RunDir.begin(config), config, strategy, data)
    ends: list[tuple[float, float]] = []

    def record(round: int, arrays: ArrayRecord) -> None:
        recorder(round, arrays)
        ends.append((time.perf_counter(), grid.making))

    before = psutil.Process().memory_info().rss
    with Peak() as peak:
        strategy.start(grid, start, ROUNDS, evaluate_fn=record)
    (began, made), (ended, made_later) = ends[-2:]
    seconds = ended - began - (made_later - made)
    return f"{base:<10} {shards:>6} {size / 1e6:>9.0f} {(peak.most - before) / size:>20.1f} {seconds:>18.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", help="model.preset")
    parser.add_argument("--row", nargs=2, metavar=("SHARDS", "BASE"), help="measure one row, in this process")
    options = parser.parse_args()
    if options.row:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            print(measure(options.preset, int(options.row[0]), options.row[1], Path(folder)))
        return
    print(f"{'base':<10} {'shards':>6} {'reply, MB':>9} {'memory, in replies':>20} {'seconds a round':>18}")
    for base in BASES:
        for shards in (2, 4, 8):
            row = ["--preset", options.preset, "--row", str(shards), base]
            subprocess.run([sys.executable, "-m", "benchmarks.server_memory", *row], check=True)


if __name__ == "__main__":
    main()
