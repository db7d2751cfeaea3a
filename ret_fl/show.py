"""`ret-fl show`: a run's folder, read back for a person."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ret_fl.cli_options import plural
from ret_fl.config import ConfigError, off_default
from ret_fl.history import Phase, read_phases
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
    changed = off_default(config)
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
    """Print where one sample was in every round, and how it fared."""
    ledger = _ledger(RunDir.existing(path))
    if sample >= len(ledger):
        raise ConfigError(f"--sample {sample}: the data has samples 0..{len(ledger) - 1}")
    _, shard, ratio, visits, skipped = _row(ledger, sample)
    run = RunDir.existing(path)
    phases = list(read_phases(run.history))
    stays = list(_stays(phases, sample))
    moves = list(_moves(stays, sample, ledger))
    console = Console(highlight=False)
    console.print(
        f"sample {sample} is in shard {shard}; visited {visits} times, skipped {skipped} of them, moved "
        f"{plural(len(moves), 'time')}; mean log-ratio {ratio} (below 0: fitted better than its shard); visited with "
        f"probability {ledger.probability[sample]:.2f}"
    )
    if not phases:
        console.print("where it was in each round is not known: the run has no history/")
    elif run.read_config().report == "tails":
        console.print("report=tails: visits and skips are counted only in rounds in which it was in a tail")
    for stay in stays:
        console.print(_stay(stay, sample))
    for round, source, target in moves:
        console.print(f"after round {round} it went from shard {source} to shard {target}")


def _stays(phases: list[Phase], sample: int) -> Iterator[list[Phase]]:
    """Rounds in a row in which a sample was in one shard."""
    for _, stay in groupby(phases, key=lambda phase: int(phase.shard[sample])):
        yield list(stay)


def _moves(stays: list[list[Phase]], sample: int, ledger: ShardLedger) -> Iterator[tuple[int, int, int]]:
    """(after which round, from shard, to shard), in order."""
    shards = [int(stay[0].shard[sample]) for stay in stays] + [int(ledger.shard[sample])]
    for stay, (source, target) in zip(stays, pairwise(shards), strict=True):
        if source != target:
            yield stay[-1].round, source, target


def _stay(stay: list[Phase], sample: int) -> str:
    first, last, shard = stay[0].round, stay[-1].round, int(stay[0].shard[sample])
    visits, skips = (sum(int(getattr(phase, name)[sample]) for phase in stay) for name in ("visits", "skips"))
    rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
    text = f"{rounds}: in shard {shard}, visited {visits} times, skipped {skips}"
    lost = [str(phase.round) for phase in stay if shard in phase.lost]
    return text + (f"; the shard was not trained in round {', '.join(lost)}" if lost else "")
