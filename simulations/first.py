"""The first evidence: central training against RET at equal images seen, on digits with canaries.

    python -m simulations.first --out runs/first --jobs 2        # about an hour on two cores; resumable
    python -m simulations.first --out runs/first --table
    python -m simulations.first --out runs/first --rows central,default --picture docs/copies.png

Every row is a run of the real ServerApp and ClientApps on the inline engine; all are sampled from the same starting
noise and measured in the same features. A row whose result is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ret_fl.config import RunConfig, Scalar

BENCHMARK: dict[str, Scalar] = {
    "data.source": "digits",
    "data.limit": 200,
    "data.canaries": 5,
    "data.canary-repeats": 10,
    "data.duplicates": "keep",
    "num-server-rounds": 98,
    "local-epochs": 5,
    "samples": 1000,
    "evaluate-every": 0,
    "redistribution.policy": "none",
    "threads": 1,
}
"""EVIDENCE benchmark: 200 distinct digits, 5 of them ten times (245 items), 98 x 5 epochs = 120,050 images seen."""

CENTRAL: dict[str, Scalar] = {"shards": 1, "agc.mode": "off"}
QUARANTINE: dict[str, Scalar] = {"redistribution.policy": "quarantine"}

ROWS: dict[str, tuple[str, dict[str, Scalar]]] = {
    "central": ("central training", CENTRAL),
    "central-60": ("central, stopped at 61 %", CENTRAL | {"num-server-rounds": 60}),
    "central-40": ("central, stopped at 41 %", CENTRAL | {"num-server-rounds": 40}),
    "central-20": ("central, stopped at 20 %", CENTRAL | {"num-server-rounds": 20}),
    "batch-x4": ("central, batch x4", CENTRAL | {"batch-size": 128}),
    "iet": ("IET (K=4, FedAvg)", {"agc.mode": "off"}),
    "agc": ("AGC alone (K=1)", {"shards": 1}),
    "iet-random": ("IET + random skips at AGC's rate", {"agc.mode": "random"}),
    "iet-agc": ("IET+AGC, lambda .8, t<500", {}),
    "iet-agc-paper": ("IET+AGC, lambda .5, all t (the paper's)", {"agc.mem-ratio": 2.0, "agc.t-max": 1000}),
    "iet-sample": ("IET + sample-level AGC", {"agc.mode": "sample"}),
    "msr": (
        "IET+AGC+MSR (25 % most skipped, between averagings)",
        {"redistribution.policy": "memorized", "redistribution.fraction": 0.25, "aggregate-every": 2},
    ),
    "quarantine-z2": ("IET+AGC + quarantine, z < -2", QUARANTINE | {"quarantine.z": -2.0}),
    "quarantine": ("IET+AGC + quarantine, z < -1.5 (the default)", QUARANTINE),
    "quarantine-20": ("IET+AGC + quarantine, lowest 20 %", QUARANTINE | {"quarantine.share": 0.2}),
    "default": (
        "**the shipped default** (balance + quarantine, copies weighted)",
        {"redistribution.policy": "balance+quarantine", "data.duplicates": "weight"},
    ),
    "default-k2": (
        "the same with K=2",
        {"redistribution.policy": "balance+quarantine", "data.duplicates": "weight", "shards": 2},
    ),
    "taa": ("IET+AGC + TAA next-visit", {"taa.mode": "next-visit"}),
}


def settings(row: str, seed: int, out: Path) -> dict[str, Scalar]:
    """The flat settings of a row's run."""
    local: dict[str, Scalar] = {
        "seed": seed,
        "out": str(out),
        "state-dir": str(out / "proxies"),
        "name": f"{row}-s{seed}",
    }
    return BENCHMARK | ROWS[row][1] | local


def run_row(row: str, seed: int, out: Path, random_rate: float | None) -> None:
    """Train and measure one row into out/result.json (in this process)."""
    import torch

    from clients.app import app as client_app
    from server.app import app as server_app
    from simulations.inline import run_inline

    torch.set_num_threads(1)
    flat = settings(row, seed, out)
    if random_rate is not None:
        flat["agc.random-rate"] = random_rate
    if (out / "config.json").exists():
        flat["resume"] = str(out)
    config = RunConfig.from_flat(flat)
    run_inline(server_app, client_app, config.to_flat(), config.shards)
    (out / "result.json").write_text(json.dumps({"row": row, "seed": seed, **measure(out)}, indent=2) + "\n")


def measure(out: Path) -> dict[str, Any]:
    """Copying and quality of a finished run's samples."""
    import numpy as np
    import torch

    from ret_fl.audit.classifier import train_classifier
    from ret_fl.audit.fidelity import confident_share, frechet_distance, precision_recall
    from ret_fl.audit.replication import copy_report, memorized_quantity, neighbour_ratio
    from ret_fl.data.sources import load_splits
    from ret_fl.rundir import RunDir

    run = RunDir.existing(out)
    data = load_splits(run.read_config().data)
    samples = torch.from_numpy(np.load(run.samples)).float() / 255
    assert data.reference is not None
    assert data.held_out.labels is not None
    train, reference, held_out = data.train.unit(), data.reference.unit(), data.held_out.unit()
    copies = copy_report(samples, train, reference, canaries=data.canaries)
    floor = copy_report(held_out, train, reference)
    classifier = train_classifier(held_out, data.held_out.labels, data.held_out.num_classes)
    real, generated = classifier.features(held_out), classifier.features(samples)
    precision, recall = precision_recall(real, generated)
    rows = run.rows()
    images = sum(r["images"] for r in rows)
    return {
        "images": images,
        "skip_rate": sum(r["skip_rate"] * r["images"] for r in rows) / images,
        "moved": sum(r["moved"] for r in rows),
        "quarantined": rows[-1]["quarantined"],
        "mq_15": memorized_quantity(neighbour_ratio(samples, train)[0])[0.15],
        "mq_15_floor": memorized_quantity(neighbour_ratio(held_out, train)[0])[0.15],
        "cr": copies.rate,
        "cr_low": copies.low,
        "cr_high": copies.high,
        "cr_canary": copies.canary_rate,
        "cr_floor": floor.rate,
        "fd": frechet_distance(generated, real),
        "confident": confident_share(classifier.probabilities(samples)),
        "precision": precision,
        "recall": recall,
    }


def _launch(row: str, seed: int, out: Path) -> None:
    log = out.with_suffix(".log")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simulations.first", "--out", str(out.parent), "--one", row, "--seed", str(seed)]
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"row {row} seed {seed} failed: see {log}")


def _random_rate(root: Path, row: str, seed: int) -> float | None:
    """The random control skips as often below t-max as AGC did in the run it is the control of."""
    if row != "iet-random":
        return None
    result = json.loads((root / f"iet-agc-s{seed}" / "result.json").read_text())
    # half of all draws have t < t-max = 500
    return min(0.9, 2 * float(result["skip_rate"]))


def run_all(root: Path, rows: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
    """Run what is missing, the control after the run it copies its rate from."""
    cells = [(row, seed) for seed in seeds for row in rows if not (root / f"{row}-s{seed}" / "result.json").exists()]
    waves = [[c for c in cells if c[0] != "iet-random"], [c for c in cells if c[0] == "iet-random"]]
    root.mkdir(parents=True, exist_ok=True)
    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("runs", total=len(cells))
        for wave in waves:
            started = [pool.submit(_launch, row, seed, root / f"{row}-s{seed}") for row, seed in wave]
            for future in started:
                future.result()
                progress.advance(task)


def table(root: Path) -> str:
    """The results as a Markdown table, one line a row, its seeds joined by a slash."""
    found = [json.loads(p.read_text()) for p in sorted(root.glob("*/result.json"))]
    if not found:
        raise SystemExit(f"no results in {root} yet: run `python -m simulations.first --out {root}` first")
    lines = [
        "| method | images | skipped | MQ50_.15 | CR | of it canaries | FD | confident | precision |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, (name, _) in ROWS.items():
        seeds = sorted((r for r in found if r["row"] == row), key=lambda r: r["seed"])
        if not seeds:
            continue

        def cells(key: str, form: str, seeds: list[dict[str, Any]] = seeds) -> str:
            return " / ".join(format(r[key], form) for r in seeds)

        lines.append(
            f"| {name} | {seeds[0]['images']:,} | {cells('skip_rate', '.0%')} | {cells('mq_15', '.3f')} "
            f"| {cells('cr', '.4f')} | {cells('cr_canary', '.4f')} | {cells('fd', '.2f')} "
            f"| {cells('confident', '.2f')} | {cells('precision', '.3f')} |"
        )
    floor = found[0]
    lines += ["", f"Real held-out images score CR {floor['cr_floor']:.4f} and MQ50_.15 {floor['mq_15_floor']:.3f}."]
    return "\n".join(lines) + "\n"


def picture(root: Path, rows: Sequence[str], path: Path) -> None:
    """The samples of each row (seed 0) closest to a training image, side by side."""
    import numpy as np
    import torch

    from ret_fl.audit.replication import copy_report
    from ret_fl.data.sources import load_splits
    from ret_fl.pictures import closest_pairs, save_pairs
    from ret_fl.rundir import RunDir

    panels = []
    for row in rows:
        run = RunDir.existing(root / f"{row}-s0")
        data = load_splits(run.read_config().data)
        assert data.reference is not None
        images = torch.from_numpy(np.load(run.samples)).float() / 255
        train = data.train.unit()
        report = copy_report(images, train, data.reference.unit())
        name = ROWS[row][0].replace("*", "").split(" (")[0]
        title = f"{name}\n{report.rate:.1%} of samples are copies"
        panels.append(closest_pairs(title, images, train[report.index], report.ratio, report.index, count=8))
    save_pairs(panels, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/first"), help="folder of the runs")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, joined by commas (default: all)")
    parser.add_argument("--seeds", default="0,1", help="training seeds (default: 0,1)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="closest samples of two --rows, side by side")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.out.absolute()
    if args.table:
        print(table(root), end="")
    elif args.picture:
        picture(root, args.rows.split(","), args.picture)
    elif args.one:
        run_row(args.one, args.seed, root / f"{args.one}-s{args.seed}", _random_rate(root, args.one, args.seed))
    else:
        run_all(root, args.rows.split(","), [int(s) for s in args.seeds.split(",")], args.jobs)
        print(table(root), end="")


if __name__ == "__main__":
    main()
