"""What the engines cost a round, beyond training.

    python -m benchmarks.engines             # inline against a plain loop; simulation against Flower's own floor
    python -m benchmarks.engines --no-flwr   # the inline part only

Inline: rounds of `--engine inline` against calling train_proxy on the same orders in a plain loop. Simulation: a
round of `flwr run` less the clients' own training time, against a round of an app that only returns the same number of
floats (benchmarks/noop), both in Flower's simulation with as many clients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from clients.app import app as client_app
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.devices import resolve_device
from ret_fl.engines import isolated_superlink, run_flwr
from ret_fl.proxy import ProxyTrainer, train_proxy
from ret_fl.roster import Roster
from ret_fl.rundir import RunDir
from ret_fl.settings import new_run
from server.app import app as server_app
from server.app import fresh_strategy
from simulations.inline import run_inline

ROOT = Path(__file__).parent.parent
SHARDS = 4


def settings(rounds: int) -> dict[str, Scalar]:
    return {
        "data.limit": 200,
        "data.canaries": 5,
        "num-server-rounds": rounds,
        "shards": SHARDS,
        "local-epochs": 10,
        "samples": 0,
        "evaluate-every": 0,
    }


def plain_round(config: RunConfig, trainer: ProxyTrainer) -> float:
    """Seconds to train every shard once, with nothing around it."""
    data = load_splits(config.data)
    strategy, weights = fresh_strategy(config, data, Roster(config, data.train.fingerprint), [])
    began = time.perf_counter()
    for shard in range(config.shards):
        train_proxy(trainer, strategy.order(1, shard), weights, data.train, data.kind, None)
    return time.perf_counter() - began


def inline_against_loop(folder: Path, repeats: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ratios = []
    trainer = None
    for i in range(repeats):
        run, config = new_run(settings(3), folder / f"inline-{i}")
        store = load_splits(config.data).train
        trainer = trainer or ProxyTrainer(config, store.image_shape, store.num_classes, resolve_device("cpu"))
        plain_round(config, trainer)
        before = plain_round(config, trainer)
        began = time.perf_counter()
        run_inline(server_app, client_app, config.to_flat(), SHARDS)
        rounds = [row["seconds"] for row in run.rows()[1:]]
        after = plain_round(config, trainer)
        ratios.append(statistics.median(rounds) / ((before + after) / 2))
        print(f"  whole inline run {time.perf_counter() - began:.1f} s, ratio of a round {ratios[-1]:.3f}")
    print(f"inline round / plain loop: {statistics.median(ratios):.3f} (bar: 1.10)")


def noop_rounds(folder: Path, values: int) -> list[float]:
    """Seconds of Flower's own rounds, the first (which starts Ray) left out."""
    out = folder / "noop.json"
    with isolated_superlink(folder / "noop.log") as environment:
        command = ["flwr", "run", str(ROOT / "benchmarks" / "noop"), "--stream"]
        command += ["--run-config", f'out="{out}" values={values}']
        command += ["--federation-config", f"num-supernodes={SHARDS} client-resources-num-cpus=1"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    times = json.loads(out.read_text())
    return [b - a for a, b in itertools.pairwise(times[1:])]


def simulation_against_floor(folder: Path) -> None:
    run, config = new_run(settings(6), folder / "flwr")
    run_flwr(ROOT, run, config, SHARDS, False, False)
    rows = RunDir.existing(run.path).rows()[1:]
    at_once = min(SHARDS, os.cpu_count() or 1)
    beyond = [row["seconds"] - sum(s["seconds"] for s in row["shards"].values()) / at_once for row in rows]
    floor = noop_rounds(folder, rows[0]["bytes_up"] // SHARDS // 4)
    a, b, whole = (statistics.median(x) for x in (beyond, floor, [row["seconds"] for row in rows]))
    print(f"simulation: {whole:.2f} s a round, of it {a:.2f} s beyond training; Flower's no-op app: {b:.2f} s a round")
    print(f"excess over Flower's floor: {(a - b) / whole:.1%} of a round (bar: 10 %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="inline runs (default: 3)")
    parser.add_argument("--no-flwr", action="store_true", help="leave out the simulation part (about a minute)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inline_against_loop(Path(name), args.repeats)
        if not args.no_flwr:
            simulation_against_floor(Path(name))


if __name__ == "__main__":
    main()
