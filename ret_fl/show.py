"""`ret-fl show`: a run's folder, read back for a person."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ret_fl.config import ConfigError, describe
from ret_fl.events import MOVED
from ret_fl.files import read_lines
from ret_fl.ledger import ShardLedger
from ret_fl.progress import describe_row
from ret_fl.rundir import RunDir

LISTED = 8


def _ledger(run: RunDir) -> ShardLedger:
    if not run.ledger.is_file():
        raise ConfigError(f"{run.path} has no ledger.npz yet: the run has not finished its first round")
    return ShardLedger.load(run.ledger)


def show_run(path: Path) -> None:
    """Print settings, rounds, shards, and the samples at both ends of the losses."""
    run = RunDir.existing(path)
    config, rows, ledger = run.read_config(), run.rows(), _ledger(run)
    console = Console(highlight=False)
    changed = [s for s, d in zip(describe(config), describe(), strict=True) if s.value != d.value]
    console.print(f"[bold]{run.path}[/]")
    console.print("settings off their defaults: " + (", ".join(f"{s.key}={s.value}" for s in changed) or "none"))
    if not rows:
        console.print("no round is finished")
        return
    state = _state(run, rows[-1]["round"] >= config.num_server_rounds)
    console.print(f"{rows[-1]['round']} of {config.num_server_rounds} rounds, {state}\n")
    for row in {r["round"]: r for r in (rows[0], rows[len(rows) // 2], rows[-1])}.values():
        console.print(describe_row(row, config.num_server_rounds), soft_wrap=True)
    console.print(_shards(ledger))
    console.print(_tails(ledger))
    if "canary_auc" in rows[-1]:
        console.print(f"canaries found by loss: AUC {rows[-1]['canary_auc']:.2f} (.5 is guessing)")
    console.print(f"where a sample is and how it fared: ret-fl show {path} --sample ID")


def _state(run: RunDir, trained: bool) -> str:
    if not trained:
        return f"not finished: ret-fl run --resume {run.path} goes on"
    if not run.summary.is_file():
        return f"trained; its images are being drawn, or ret-fl run --resume {run.path} draws them"
    return "finished"


def _shards(ledger: ShardLedger) -> Table:
    table = Table("shard", "samples", "visits", "skipped", "in quarantine", title="shards", title_justify="left")
    for shard in range(ledger.num_shards):
        ids = ledger.ids(shard)
        visits, skips = int(ledger.visits[ids].sum()), int(ledger.skips[ids].sum())
        inside = int((ledger.probability[ids] < 1).sum())
        table.add_row(str(shard), str(len(ids)), f"{visits:,}", f"{skips / max(visits, 1):.1%}", str(inside))
    return table


def _tails(ledger: ShardLedger) -> Table:
    ratio = ledger.log_loss_ratio()
    known = np.flatnonzero(~np.isnan(ratio))
    order = known[np.argsort(ratio[known])]
    table = Table("sample", "shard", "log-ratio", "visits", "skipped", title="lowest and highest losses",
                  title_justify="left")  # fmt: skip
    for end in (order[:LISTED], order[LISTED:][-LISTED:]):
        table.add_section()
        for i in end:
            table.add_row(*_row(ledger, int(i)))
    return table


def _row(ledger: ShardLedger, i: int) -> list[str]:
    ratio = ledger.log_loss_ratio()[i]
    skipped = ledger.skips[i] / max(int(ledger.visits[i]), 1)
    return [str(i), str(ledger.shard[i]), f"{ratio:+.2f}", f"{ledger.visits[i]:,}", f"{skipped:.1%}"]


def show_sample(path: Path, sample: int) -> None:
    """Print what the ledger knows of one sample."""
    ledger = _ledger(RunDir.existing(path))
    if sample >= len(ledger):
        raise ConfigError(f"--sample {sample}: the data has samples 0..{len(ledger) - 1}")
    _, shard, ratio, visits, skipped = _row(ledger, sample)
    console = Console(highlight=False)
    console.print(
        f"sample {sample} is in shard {shard}; visited {visits} times, skipped {skipped} of them; mean log-ratio "
        f"{ratio} (below 0: fitted better than its shard); visited with probability {ledger.probability[sample]:.2f}"
    )
    for round, source, target in _journey(RunDir.existing(path), sample):
        console.print(f"after round {round} it went from shard {source} to shard {target}")


def _journey(run: RunDir, sample: int) -> list[tuple[int, int, int]]:
    """Where a sample went: (after which round, from shard, to shard), in order; rounds done again count once."""
    moves = {
        e["round"]: (e["round"], e["shard"], e["to"])
        for e in read_lines(run.events)
        if e["event"] == MOVED and sample in e["ids"]
    }
    return [moves[round] for round in sorted(moves)]
