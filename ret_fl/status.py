"""`ret-fl status`: how a run is doing, from what its server writes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ret_fl.events import (
    ANSWERED,
    BACK,
    BEGUN,
    FAILED,
    GONE,
    JOINED,
    REFUSED,
    ROUND,
    SENT,
    TRAINED,
    Event,
    from_log,
    was_deployed,
)
from ret_fl.files import read_lines
from ret_fl.rundir import RunDir, resume_command

ENDED, COMPLETED = "finished", "finished:completed"
"""How Flower begins to say that a run is over, and says that it ended well."""

STOPPED_SECONDS = 30.0
"""How long nothing may happen in a run that no process of this machine is writing, before it is taken for stopped."""


@dataclass
class ShardStatus:
    """What the last events say of a shard. seen: seconds since the Epoch; loss, skip_rate: of its last round."""

    shard: int
    state: str = "waiting"
    node: int | None = None
    samples: int | None = None
    loss: float | None = None
    skip_rate: float | None = None
    seen: float = 0.0


@dataclass
class NodeStatus:
    """What the last events say of a node. speed: images a second of training. seen: when it last said something."""

    node: int
    partition: int | None = None
    device: str = ""
    gone: bool = False
    refused: bool = False
    orders: set[int] = field(default_factory=set)
    speed: float | None = None
    seen: float = 0.0

    @property
    def there(self) -> bool:
        return not (self.gone or self.refused)

    @property
    def state(self) -> str:
        if self.refused:
            return "refused: other data"
        if self.gone:
            return "gone"
        shards = ", ".join(map(str, sorted(self.orders)))
        return f"has shard {shards}" if shards else "idle"


@dataclass
class RunStatus:
    """A run as its events.jsonl and metrics.jsonl tell it."""

    name: str
    rounds: int
    done: int
    finished: bool
    last: Event | None
    shards: dict[int, ShardStatus]
    nodes: dict[int, NodeStatus]
    seen: float
    seconds_a_round: float | None
    failures: list[Event]
    stopped: bool
    resume_command: str
    min_nodes: int

    @property
    def idle(self) -> bool:
        """Whether no node has an order."""
        return not any(node.orders for node in self.nodes.values())

    @property
    def seconds_left(self) -> float | None:
        if self.stopped or self.seconds_a_round is None:
            return None
        return self.seconds_a_round * (self.rounds - self.done)


def read_status(run: RunDir) -> RunStatus:
    """The state of a run now. Raises `ConfigError` if its config cannot be read."""
    config, rows, events = run.read_config(), run.rows(), read_lines(run.events, skip_torn=True)
    seen, finished = events[-1]["time"] if events else 0.0, run.summary.is_file()
    return _status(
        events,
        name=str(run.path),
        done=rows[-1]["round"] if rows else 0,
        rounds=config.num_server_rounds,
        shards=config.shards,
        last=rows[-1] if rows else None,
        finished=finished,
        stopped=bool(seen) and not finished and time.time() - seen > STOPPED_SECONDS and not run.in_use(),
        resume_command=resume_command(run.path, deployed=was_deployed(events)),
        min_nodes=config.min_nodes,
    )


def status_of_log(text: str, state: str) -> RunStatus | None:
    """The same from the log of a deployed run's server; None if that tells of none. state: what Flower says of it."""
    events = from_log(text)
    begun = next((event for event in reversed(events) if event["event"] == BEGUN), None)
    if begun is None:
        return None
    last = next((event for event in reversed(events) if event["event"] == ROUND), None)
    return _status(
        events,
        name=begun["out"],
        done=last["round"] if last else begun["done"],
        rounds=begun["rounds"],
        shards=begun["shards"],
        last=last,
        finished=state == COMPLETED,
        stopped=state.startswith(ENDED) and state != COMPLETED,
        resume_command=resume_command(begun["out"], deployed=begun["deployed"]),
        min_nodes=begun["min_nodes"],
    )


def _status(events: Sequence[Event], *, shards: int, last: Event | None, **told: Any) -> RunStatus:
    """last: what is known of the last finished round; told: the rest of what events do not tell."""
    # a resumed run is another one to Flower, with nodes of its own
    events = [e for e in events if e["run"] == events[-1]["run"]]
    by_shard = {shard: ShardStatus(shard) for shard in range(shards)}
    nodes: dict[int, NodeStatus] = {}
    for event in events:
        if "node" in event:
            _tell_node(nodes.setdefault(event["node"], NodeStatus(event["node"])), event)
        if event.get("shard") in by_shard:
            _tell_shard(by_shard[event["shard"]], event)
    seconds = [e["seconds"] for e in events if e["event"] == ROUND][-5:]
    return RunStatus(
        last=last,
        shards=by_shard,
        nodes=nodes,
        seen=events[-1]["time"] if events else 0.0,
        seconds_a_round=sum(seconds) / len(seconds) if seconds else None,
        failures=[e for e in events if e["event"] in (FAILED, REFUSED, GONE)],
        **told,
    )


def _tell_node(node: NodeStatus, event: Event) -> None:
    what, shard = event["event"], event.get("shard", -1)
    if what == JOINED:
        node.partition, node.device = event["partition"], event["device"]
        node.refused = False  # what was wrong is mended
    elif what == SENT:
        node.orders.add(shard)
    elif what in (ANSWERED, FAILED, TRAINED):
        node.orders.discard(shard)
    if what == TRAINED and event["seconds"] > 0:
        node.speed = event["images"] / event["seconds"]
    node.refused = node.refused or what == REFUSED
    node.gone = what == GONE or (node.gone and what in (SENT, FAILED))
    if what in (JOINED, BACK, ANSWERED, TRAINED):
        node.seen = event["time"]


def _tell_shard(shard: ShardStatus, event: Event) -> None:
    states = {
        SENT: f"round {event.get('round')}: ordered" + (" again" if event.get("attempt", 1) > 1 else ""),
        ANSWERED: f"round {event.get('round')}: answered",
        TRAINED: f"round {event.get('round')}: trained",
        FAILED: f"round {event.get('round')}: {event.get('why')}",
    }
    if event["event"] not in states:
        return
    shard.state, shard.node, shard.seen = states[event["event"]], event["node"], event["time"]
    if event["event"] == TRAINED:
        shard.samples, shard.loss, shard.skip_rate = event["samples"], event["loss"], event["skip_rate"]


def render(status: RunStatus) -> Group:
    """The status as tables that fit 80 columns, ages as of now. Shards name a node by its partition, which is short.

    What nodes say is shown as it is: no markup of Rich's, no control codes of a terminal.
    """
    now = time.time()
    shards = table("shards", ("shard", "on partition", "samples", "loss", "skipped"), ("state", "since"))
    for s in status.shards.values():
        node = status.nodes.get(s.node) if s.node is not None else None
        shards.add_row(
            str(s.shard), _text(node.partition if node else None), _text(s.samples), _text(s.loss, ".4f"),
            _text(s.skip_rate, ".1%"), said(s.state), _age(now, s.seen),
        )  # fmt: skip
    nodes = table("nodes", ("partition", "images/s"), ("device", "state", "last answer", "node"))
    for n in sorted(status.nodes.values(), key=lambda n: (n.partition is None, n.partition)):
        style = None if n.there else "red"
        nodes.add_row(
            _text(n.partition), _rate(n.speed), said(n.device), n.state, _age(now, n.seen), str(n.node), style=style
        )
    failures = [f"  {_age(now, e['time'])} ago: {_failure(e)}" for e in status.failures[-5:]]
    trouble = [f"{len(status.failures)} failures, the last:", *failures] if failures else []
    return Group(Text(_headline(status, now)), "", shards, nodes, *map(said, trouble))


def table(title: str, numbers: Sequence[str], words: Sequence[str]) -> Table:
    """A table whose first columns are numbers; node IDs, of up to 20 digits, are not cut."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in words:
        table.add_column(name, no_wrap=name != "state")
    return table


def _failure(event: Event) -> str:
    where = " ".join(f"{key} {event[key]}" for key in ("round", "shard", "node") if key in event)
    return f"{where}: {event.get('why', event['event'])}"


def _headline(status: RunStatus, now: float) -> str:
    if status.finished:
        state = "finished"
    elif status.stopped:
        ago = _age(now, status.seen)
        state = f"stopped {ago} ago, or written on another machine; `{status.resume_command}` goes on"
    elif status.done >= status.rounds:
        state = "trained, results are being written"
    elif not status.seen:
        state = "not begun"
    elif (there := sum(node.there for node in status.nodes.values())) < status.min_nodes and status.idle:
        state = f"waits for nodes: {there} of min-nodes={status.min_nodes} are there"
    else:
        left = status.seconds_left
        state = f"last sign of life {_age(now, status.seen)} ago" + (f", about {span(left)} left" if left else "")
    text = f"{status.name}: {status.done} of {status.rounds} rounds, {state}"
    if status.last:
        row = status.last
        loss = f"loss {row['loss']:.4f}" if math.isfinite(row["loss"]) else "no losses told"
        text += (
            f"\nlast round: {loss}, skipped {row['skip_rate']:.1%}, moved {row['moved']}, in quarantine "
            f"{row['quarantined']}, {_rate(row['images_per_second'])} images/s"
        )
    return text


def said(value: object) -> Text:
    """What another machine said, taken for nothing but text."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in str(value)))


def _text(value: object, form: str = "") -> str:
    return "-" if value is None or value != value else format(value, form)  # NaN: it was not told


def _rate(value: float | None) -> str:
    return _text(value, ",.0f" if value is not None and value >= 10 else ".1f")


def _age(now: float, then: float) -> str:
    return span(now - then) if then else "-"


def span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
