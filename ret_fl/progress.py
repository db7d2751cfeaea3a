"""Progress of a run on the terminal, read from its metrics.jsonl: the same for every engine."""

from __future__ import annotations

import math
import threading
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ret_fl.rundir import RunDir

POLL_SECONDS = 0.5


def describe_row(row: dict[str, Any], total: int) -> str:
    """One round in one line."""
    width = len(str(total))
    shards = " ".join(f"{row['shards'][s]['loss']:.3f}" for s in sorted(row["shards"], key=int)[:8])
    more = " ..." if len(row["shards"]) > 8 else ""
    losses = f"loss {row['loss']:.4f}  shards {shards}{more}"
    text = (
        f"round {row['round']:>{width}}/{total}  {'no losses told' if math.isnan(row['loss']) else losses}  "
        f"skipped {row['skip_rate']:5.1%}  moved {row['moved']}  quarantine {row['quarantined']}  "
        f"{row['images_per_second']:,.0f} img/s"
    )
    if row["failures"]:
        text += f"  FAILED {row['failed_shards']}"
    if "held_out_loss" in row:
        train = f" train {row['train_loss']:.4f}" if "train_loss" in row else ""
        text += f"  model:{train} held-out {row['held_out_loss']:.4f}"
    if "epsilon" in row:
        text += f"  epsilon {row['epsilon']:.4g}"
    return text


class RunProgress:
    """A context that prints every round as it is finished, over a bar with the time left."""

    def __init__(self, run: RunDir, total: int, *, quiet: bool = False) -> None:
        self.run, self.total, self.quiet = run, total, quiet
        self.console = Console(highlight=False, markup=False, emoji=False)  # failures are told in a node's own words
        self.shown = len(run.rows())
        self.said_drawing = False
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            transient=True,
            disable=quiet,
        )
        self.task = self.bar.add_task("starting", total=total, completed=self.shown)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> RunProgress:
        if not self.quiet:
            self.bar.start()
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.quiet:
            self.stop.set()
            self.thread.join()
            self._update()
            self.bar.stop()

    def _watch(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            self._update()

    def _update(self) -> None:
        rows = self.run.rows()
        # a resumed run takes back the rows of rounds it does again
        self.shown = min(self.shown, len(rows))
        for row in rows[self.shown :]:
            self.console.print(describe_row(row, self.total), soft_wrap=True)
        self.shown = len(rows)
        done = rows[-1]["round"] if rows else 0
        if done >= self.total and not self.said_drawing:
            if self.run.read_config().samples:
                self.console.print("trained; now drawing images and measuring, which may take as long again")
            self.said_drawing = True
        what = "training" if done < self.total else "drawing images, measuring"
        self.bar.update(self.task, completed=done, description=what if rows else "starting")
