"""`ret-fl show`: a run's folder, read back for a person."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ret_fl.cli_options import plural
from ret_fl.config import ConfigError, RunConfig, off_default
from ret_fl.history import SampleRound, follow
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
    console = Console(highlight=False, markup=False, emoji=False)  # failures are told in a node's own words
    changed = off_default(config)
    console.print(str(run.path), style="bold")
    console.print("settings off their defaults: " + (", ".join(f"{s.key}={s.value}" for s in changed) or "none"))
    if not rows:
        console.print("no round is finished")
        return
    state = _state(run, rows[-1]["round"] >= config.num_server_rounds)
    console.print(f"{rows[-1]['round']} of {config.num_server_rounds} rounds, {state}\n")
    for row in {r["round"]: r for r in (rows[0], rows[len(rows) // 2], rows[-1])}.values():
        console.print(describe_row(row, config.num_server_rounds), soft_wrap=True)
    console.print(_shards(ledger, config.private))
    if config.private:
        console.print(_silence(config))
    else:
        console.print(_tails(ledger))
    if dropped := len(ledger) - int(ledger.visited().sum()):
        console.print(f"{plural(dropped, 'sample')} dropped: a copy of each is visited instead (data.duplicates)")
    if "canary_auc" in rows[-1]:
        console.print(f"canaries found by loss: AUC {rows[-1]['canary_auc']:.2f} (.5 is guessing)")
    console.print(f"where a sample is and how it fared: ret-fl show {path} --sample ID")


def _state(run: RunDir, trained: bool) -> str:
    if not trained:
        return f"not finished: {run.resume_command()} goes on"
    if not run.summary.is_file():
        return f"trained; its results are being written, or {run.resume_command()} writes them"
    return "finished"


def _silence(config: RunConfig) -> str:
    return f"visits, skips and losses of samples: not reported under dp.mode={config.dp.mode}"


def _shards(ledger: ShardLedger, silent: bool) -> Table:
    table = Table("shard", "samples", "visits", "skipped", "in quarantine", title="shards", title_justify="left")
    for shard in range(ledger.num_shards):
        ids = ledger.ids(shard)
        visits, skips = int(ledger.visits[ids].sum()), int(ledger.skips[ids].sum())
        inside = int((ledger.probability[ids] < 1).sum())
        told = ["not reported"] * 2 if silent else [f"{visits:,}", f"{skips / max(visits, 1):.1%}"]
        table.add_row(str(shard), str(len(ids)), *told, str(inside))
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
    run = RunDir.existing(path)
    ledger, config = _ledger(run), run.read_config()
    if sample >= len(ledger):
        raise ConfigError(f"--sample {sample}: the data has samples 0..{len(ledger) - 1}")
    rounds = list(follow(run.history, sample))
    stays = [list(stay) for _, stay in groupby(rounds, key=lambda round: round.shard)]
    moves = list(_moves(stays, int(ledger.shard[sample])))
    _, shard, ratio, visits, skipped = _row(ledger, sample)
    fared = f"visited {visits} times, skipped {skipped} of them, moved {plural(len(moves), 'time')}; "
    usual = ledger.usual[sample]
    early = "" if np.isnan(usual) else f", {usual:+.2f} over the first rounds"
    fared += f"mean log-ratio {ratio}{early} (below 0: fitted better than its shard)"
    if config.private:
        fared = f"moved {plural(len(moves), 'time')}; {_silence(config)}"
    console = Console(highlight=False)
    console.print(f"sample {sample} is in shard {shard}; {fared}; {_how_often(ledger, sample)}")
    if not rounds:
        console.print("where it was in each round is not known: the run has no history/")
    elif config.report == "tails" and not config.private:
        console.print("report=tails: visits and skips are counted only in rounds in which it was in a tail")
    for stay in stays:
        console.print(_stay(stay, config.private))
    for round, source, target in moves:
        console.print(f"after round {round} it went from shard {source} to shard {target}")


def _how_often(ledger: ShardLedger, sample: int) -> str:
    """What orders say of its visits."""
    if not ledger.visited()[sample]:
        return "dropped: a copy of another sample is visited instead (data.duplicates)"
    shared = "" if ledger.copies[sample] == 1 else f", as one of {ledger.copies[sample]:.0f} copies"
    return f"visited with probability {ledger.ordered()[sample]:.3g}{shared}"


def _moves(stays: list[list[SampleRound]], now: int) -> Iterator[tuple[int, int, int]]:
    """(after which round, from shard, to shard), in order."""
    shards = [stay[0].shard for stay in stays] + [now]
    for stay, (source, target) in zip(stays, pairwise(shards), strict=True):
        if source != target:
            yield stay[-1].round, source, target


def _stay(stay: list[SampleRound], silent: bool) -> str:
    """Rounds in a row in which the sample was in one shard."""
    first, last = stay[0].round, stay[-1].round
    visits, skips = sum(round.visits for round in stay), sum(round.skips for round in stay)
    text = f"round {first}" if first == last else f"rounds {first} to {last}"
    text += f": in shard {stay[0].shard}" + ("" if silent else f", visited {visits} times, skipped {skips}")
    lost = [str(round.round) for round in stay if not round.trained]
    return text + (f"; the shard was not trained in round {', '.join(lost)}" if lost else "")
