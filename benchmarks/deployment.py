"""What a phase costs on a deployed federation beyond what Flower itself costs, and the memory of the ServerApp.

    python -m benchmarks.deployment                 # the U-Net for CIFAR-10, 143 MB; three SuperNodes, TLS
    python -m benchmarks.deployment --preset base   # a smaller one
    python -m benchmarks.deployment --no-worker     # every client process loads torch and builds the model

SuperLink and SuperNodes are those of `ret-fl deploy local` and stay up; apps take turns on them:
  flower   benchmarks/noop: clients send back as many bytes as ret-fl's (raw and averaged weights), and do nothing
  + U-Net  the same, whose clients load torch and diffusers' U-Net first, since Flower starts a process for every order
  ret-fl   with its defaults, a shard being one small batch of a folder of images; its clients' time of training is
           taken off
A phase lasts from one sending of orders to the next; the first of a run is left out. Beside its seconds stand those of
a CPU core that the ServerApp, one client, its SuperNode's worker (with what it trains) and Flower's own processes
(SuperLink, SuperNodes, SuperExecs) took, which hang less on what else the machine does. Memory is the most that the
process of the ServerApp takes, in sizes of a reply.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from ret_fl.config import Scalar
from ret_fl.deploy.local import LocalFederation, local_federation, workers
from ret_fl.engines import submit
from ret_fl.events import SENT
from ret_fl.files import read_lines
from ret_fl.settings import new_run

ROOT = Path(__file__).parent.parent
NODES = 3
BAR = 1.0
FLOWER, UNET, OURS = "flower", "+ U-Net", "ret-fl"


class Watch:
    """The processes of a federation while it is entered: what its ServerApp and each client took."""

    def __init__(self, running: LocalFederation) -> None:
        self.running = running

    def __enter__(self) -> Watch:
        self.memory, self.server, self.clients = 0, [(0.0, 0.0)], dict[int, float]()
        self.carriers = [(0.0, 0.0)]
        self.workers: list[tuple[float, dict[int, float]]] = []
        self.ended = {process.pid for process in self._processes() if "serverapp" in process.name()}
        self.looked, self.found = 0.0, set[psutil.Process]()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            server = carriers = 0.0
            for process in self._processes():
                try:
                    name, cpu = process.name(), sum(process.cpu_times()[:2])
                    if "clientapp" in name:
                        self.clients[process.pid] = cpu
                    elif process.pid in self.ended:  # an earlier run's, which Flower has not asked after yet
                        continue
                    elif "serverapp" in name:
                        server = max(server, cpu)
                        self.memory = max(self.memory, process.memory_info().rss)
                    else:
                        carriers += cpu
                except psutil.NoSuchProcess:
                    continue
            self.workers.append((time.time(), self._worker_cpu()))
            self.server.append((time.time(), server))
            self.carriers.append((time.time(), carriers))

    def _worker_cpu(self) -> dict[int, float]:
        """Seconds of a core by worker. They are looked for once a second, which takes time itself."""
        if not self.looked or time.monotonic() - self.looked > 1:
            self.found = workers(Path(self.running.federation.folder))
            self.looked = time.monotonic()
        taken = {}
        for process in self.found:
            with suppress(psutil.NoSuchProcess):
                taken[process.pid] = sum(process.cpu_times()[:2])
        return taken

    def worker_took(self, begin: float, end: float) -> float:
        """Seconds of a core that all workers took between two moments."""
        moments = [min(self.workers, key=lambda told: abs(told[0] - moment))[1] for moment in (begin, end)]
        return sum(cpu - moments[0].get(pid, 0.0) for pid, cpu in moments[1].items())

    def _processes(self) -> list[psutil.Process]:
        started = [psutil.Process(process.pid) for process in self.running.processes.values()]
        return started + [child for process in started for child in process.children(recursive=True)]

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def until(moment: float, taken: Sequence[tuple[float, float]]) -> float:
    """Seconds of a core taken until then."""
    return max(cpu for when, cpu in taken if when <= moment)


@dataclass
class Measured:
    """Of one kind of app: seconds of its phases, a core's seconds of server, a client, a worker and Flower's own
    processes, bytes. Training is left out, but of what a worker took.
    """

    phases: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)
    carriers: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, watch: Watch, ends: Sequence[float], training: float, orders: int) -> None:
        """A run whose phases ended at `ends` (s since 1970), the first of them left out."""
        self.phases += [b - a - training for a, b in itertools.pairwise(ends)]
        for told, taken in ((self.server, watch.server), (self.carriers, watch.carriers)):
            told += [until(b, taken) - until(a, taken) for a, b in itertools.pairwise(ends)]
        in_workers = [watch.worker_took(a, b) / NODES for a, b in itertools.pairwise(ends)]
        self.worker += in_workers
        here = 0.0 if any(in_workers) else training
        self.client += [cpu - here for cpu in list(watch.clients.values())[-orders:]]
        self.memory.append(watch.memory)


def bare(running: LocalFederation, folder: Path, rounds: int, values: int, imports: Sequence[str]) -> list[float]:
    """When the rounds of Flower's own app ended."""
    out = folder / "noop.json"
    config = f'out="{out}" values={values} rounds={rounds} imports="{" ".join(imports)}"'
    command = ["flwr", "run", str(ROOT / "benchmarks" / "noop"), "--stream", "--run-config", config]
    subprocess.run(command, env=dict(running.environment), check=True, capture_output=True)
    return [float(moment) for moment in json.loads(out.read_text())[1:]]


def make_images(folder: Path) -> None:
    """A folder of images, as a deployment has one: the built-in digits would have every client load scikit-learn."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(16 * NODES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def ours(running: LocalFederation, out: Path, rounds: int, preset: str) -> tuple[list[float], float, int]:
    """When orders were sent, from the second round on; seconds of training in a round; bytes of a reply."""
    make_images(out.parent / "images")
    settings: dict[str, Scalar] = {
        "data.source": "image-folder", "data.path": str(out.parent / "images"), "data.limit": 4 * NODES,
        "data.image-size": 16, "batch-size": 4, "local-epochs": 1, "shards": NODES, "min-nodes": NODES,
        "num-server-rounds": rounds, "evaluate-every": 0, "samples": 0, "model.preset": preset,
    }  # fmt: skip
    run, config = new_run(settings, out)
    submit(ROOT, run, config, dict(running.environment))
    sent: dict[int, float] = {}
    for event in read_lines(run.events):
        if event["event"] == SENT:
            sent.setdefault(event["round"], event["time"])
    rows = run.rows()
    training = statistics.median(shard["seconds"] for row in rows[1:] for shard in row["shards"].values())
    return [sent[round] for round in range(2, rounds + 1)], training, rows[0]["bytes_up"] // NODES


def measure(folder: Path, preset: str, rounds: int, repeats: int, *, worker: bool) -> tuple[dict[str, Measured], int]:
    """Each kind of app by turns, and the bytes of a reply."""
    found = {kind: Measured() for kind in (FLOWER, UNET, OURS)}
    size = 0
    log = folder / "flower.log"
    with local_federation(folder / "federation", NODES, log, tls=True, worker=worker) as running:
        for i in range(repeats):
            for kind in (OURS, FLOWER, UNET):
                training = 0.0
                with Watch(running) as watch:
                    if kind == OURS:
                        ends, training, size = ours(running, folder / f"run-{i}", rounds, preset)
                    else:
                        modules = ["torch", "diffusers.models.unets.unet_2d"] if kind == UNET else []
                        ends = bare(running, folder, rounds, size // 4, modules)
                found[kind].add(watch, ends, training, NODES * (rounds - 1))
                print(f"  {kind:<8} {' '.join(f'{s:.1f}' for s in found[kind].phases)} s", flush=True)
    return found, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ddpm-cifar", help="model.preset (default: ddpm-cifar)")
    parser.add_argument("--rounds", type=int, default=5, help="of each run, three at least (default: 5)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each app, by turns (default: 2)")
    parser.add_argument("--no-worker", action="store_true", help="SuperNodes without the worker that a kit gives them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found, size = measure(Path(name), args.preset, max(args.rounds, 3), args.repeats, worker=not args.no_worker)
    print(f"{NODES} SuperNodes, {size / 1e6:.0f} MB a reply: {args.preset}, raw and averaged weights")
    print(
        f"{'app':<9} {'seconds a phase':>16} {'CPU: server':>12} {'a client':>9} {'a worker':>9} {'Flower':>7} "
        f"{'memory, replies':>16}"
    )
    middle = {
        kind: [statistics.median(x) for x in (m.phases, m.server, m.client, m.worker, m.carriers, m.memory)]
        for kind, m in found.items()
    }
    for kind, (phase, server, client, worker, carriers, memory) in middle.items():
        cpu = f"{server:>12.1f} {client:>9.1f} {worker:>9.1f} {carriers:>7.1f}"
        print(f"{kind:<9} {phase:>16.1f} {cpu} {memory / size:>16.1f}")
    for other in (UNET, FLOWER):
        print(f"ret-fl beyond {other!r}: {middle[OURS][0] - middle[other][0]:+.1f} s a phase (bar: {BAR:g} s)")


if __name__ == "__main__":
    main()
