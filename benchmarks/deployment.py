"""What a phase costs on a deployed federation beyond what Flower itself costs, and the memory of the ServerApp.

    python -m benchmarks.deployment                 # the U-Net for CIFAR-10, 143 MB; three SuperNodes, TLS
    python -m benchmarks.deployment --preset base   # a smaller one

SuperLink and SuperNodes are those of `ret-fl deploy local` and stay up; apps take turns on them:
  flower   benchmarks/noop: clients send back as many bytes as ret-fl's (raw and averaged weights), and do nothing
  + U-Net  the same, whose clients load torch and diffusers' U-Net first, since Flower starts a process for every order
  ret-fl   with its defaults, a shard being one small batch
A phase lasts from one sending of orders to the next, the first of a run left out; training is the slowest client's, as
it tells. Memory is the most that the process of the ServerApp takes, in sizes of a reply.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.server_memory import Peak
from ret_fl.config import Scalar
from ret_fl.deploy.local import SUPERLINK, LocalFederation, local_federation
from ret_fl.engines import submit
from ret_fl.events import SENT
from ret_fl.files import read_lines
from ret_fl.settings import new_run

ROOT = Path(__file__).parent.parent
NODES = 3
BAR = 1.0
FLOWER, UNET, OURS = "flower", "+ U-Net", "ret-fl"


@dataclass
class Measured:
    """Of one kind of app: seconds of its phases, of training in each, and the most its ServerApp took, in bytes."""

    phases: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def server_app(running: LocalFederation) -> int:
    """Resident bytes of the process a ServerApp is in: the largest of those that the SuperLink started."""
    most = 0
    for process in psutil.Process(running.processes[SUPERLINK].pid).children(recursive=True):
        try:
            if "serverapp" in process.name():
                most = max(most, process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return most


def bare(running: LocalFederation, folder: Path, rounds: int, values: int, imports: Sequence[str]) -> list[float]:
    """Seconds of the phases of Flower's own app, the first left out."""
    out = folder / "noop.json"
    config = f'out="{out}" values={values} rounds={rounds} imports="{" ".join(imports)}"'
    command = ["flwr", "run", str(ROOT / "benchmarks" / "noop"), "--stream", "--run-config", config]
    subprocess.run(command, env=dict(running.environment), check=True, capture_output=True)
    return [b - a for a, b in itertools.pairwise(json.loads(out.read_text())[1:])]


def ours(running: LocalFederation, out: Path, rounds: int, preset: str) -> tuple[list[float], list[float], int]:
    """Seconds of the phases of ret-fl and of training in each, the first left out; bytes of a reply."""
    settings: dict[str, Scalar] = {
        "data.limit": 4 * NODES, "batch-size": 4, "local-epochs": 1, "shards": NODES, "min-nodes": NODES, "samples": 0,
        "num-server-rounds": rounds + 1, "evaluate-every": 0, "model.preset": preset,
    }  # fmt: skip
    run, config = new_run(settings, out)
    submit(ROOT, run, config, dict(running.environment))
    sent: dict[int, float] = {}
    for event in read_lines(run.events):
        if event["event"] == SENT:
            sent.setdefault(event["round"], event["time"])
    phases = [sent[round + 1] - sent[round] for round in range(2, rounds + 1)]
    rows = run.rows()
    training = [max(shard["seconds"] for shard in row["shards"].values()) for row in rows[1:-1]]
    return phases, training, rows[0]["bytes_up"] // NODES


def measure(folder: Path, preset: str, rounds: int, repeats: int) -> tuple[dict[str, Measured], int]:
    """Each kind of app by turns, and the bytes of a reply."""
    found = {kind: Measured() for kind in (FLOWER, UNET, OURS)}
    size = 0
    with local_federation(folder / "federation", NODES, folder / "flower.log", tls=True) as running:
        for i in range(repeats):
            for kind in (OURS, FLOWER, UNET):
                with Peak(lambda: server_app(running)) as peak:
                    if kind == OURS:
                        phases, training, size = ours(running, folder / f"run-{i}", rounds, preset)
                        found[kind].training += training
                    else:
                        modules = ["torch", "diffusers.models.unets.unet_2d"] if kind == UNET else []
                        phases = bare(running, folder, rounds, size // 4, modules)
                found[kind].phases += phases
                found[kind].memory.append(peak.most)
                print(f"  {time.strftime('%H:%M:%S')} {kind:<8}", *(f"{s:.1f}" for s in phases), "s", flush=True)
    return found, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ddpm-cifar", help="model.preset (default: ddpm-cifar)")
    parser.add_argument("--rounds", type=int, default=4, help="of each run, two at least (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each app, by turns (default: 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found, size = measure(Path(name), args.preset, max(args.rounds, 2), args.repeats)
    print(f"{NODES} SuperNodes, {size / 1e6:.0f} MB a reply: {args.preset}, raw and averaged weights")
    print(f"{'app':<9} {'seconds a phase':>16} {'of it training':>15} {'memory, in replies':>19}")
    for kind, told in found.items():
        trained = f"{statistics.median(told.training):.1f}" if told.training else "-"
        row = f"{kind:<9} {statistics.median(told.phases):>16.1f} {trained:>15}"
        print(f"{row} {statistics.median(told.memory) / size:>19.1f}")
    own = statistics.median(found[OURS].phases) - statistics.median(found[OURS].training)
    for kind in (FLOWER, UNET):
        print(f"{OURS} less training less {kind}: {own - statistics.median(found[kind].phases):+.1f} s (bar: {BAR} s)")


if __name__ == "__main__":
    main()
