"""Orders go out, replies come in; a shard whose node fails, falls silent or is far too slow goes to another node.

Flower's own `send_and_receive` waits for every reply until its timeout, dead nodes included, and returns what it has.
Here an order is sent again within the phase, so that a phase is whole whenever one living node is left.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from ret_fl.events import ANSWERED, FAILED, SENT
from ret_fl.protocol import payload_bytes, reason_of
from ret_fl.pulling import Puller, UnusableReplyError, until_not_busy
from ret_fl.roster import Roster

PULL_SECONDS = 0.5
"""How often replies are asked for, and the parts of one that is still on its way."""
LOOK_SECONDS = 5.0
"""How often the dispatcher asks which nodes are alive."""
LEAST_SECONDS = 120.0
"""No node is thought too slow before."""
MORE_TIMES, MORE_BYTES = 4, 64 << 20
"""A sound reply has no more bytes than so many times its order's, and so many more; it has the order's weights and
three times as much about each sample."""
LAST_SECONDS = 30.0
"""With less of its time to live an order is not sent again: a busy SuperLink might get it dead, which it refuses."""
EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""What Flower answers, among other things, for an order whose time to live is over."""
SURELY_THE_APPS = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION,)
"""Errors that the same node would answer with again..."""
OF_THE_WORKER = "WorkerError"
"""...unless the reason names this one: a worker that ended, after which the next order starts another."""


@dataclass
class Asking:
    """An order on its way.

    node: that owes a reply. at: when it was sent (monotonic seconds). owed: images of all orders that the node had
    then, this one among them. done: images of all orders of the phase that it had answered by then.
    """

    node: int
    at: float
    owed: int = 0
    done: int = 0


@dataclass
class Errand:
    """One shard's order in a phase.

    messages: the order as first sent, then as sent again. failures: what went wrong with it. resent: each time it was
    sent again, as metrics.jsonl tells it. asked: what is on its way, by message ID, the last sent last. unfit: nodes
    that would fail it again. stranded: since when there has been no node to send it to (monotonic seconds), or None.
    answered_by: the node whose reply counts.
    """

    shard: int
    messages: list[Message]
    failures: list[str] = field(default_factory=list)
    resent: list[dict[str, object]] = field(default_factory=list)
    asked: dict[str, Asking] = field(default_factory=dict)
    unfit: set[int] = field(default_factory=set)
    stranded: float | None = None
    reply: Message | None = None
    answered_by: int | None = None

    @property
    def first(self) -> Message:
        return self.messages[0]

    @property
    def nodes(self) -> list[int]:
        """Those it went to, the last one last."""
        return [message.metadata.dst_node_id for message in self.messages]

    @property
    def node(self) -> int:
        """The node that answered, else the one asked last."""
        return self.nodes[-1] if self.answered_by is None else self.answered_by

    @property
    def open(self) -> bool:
        """Whether a reply may still come."""
        return self.reply is None and (bool(self.asked) or self.stranded is not None)

    @property
    def left(self) -> float:
        """Seconds of the order's time to live, which ends with its round."""
        made = self.first.metadata
        return made.created_at + made.ttl - time.time()

    @property
    def over(self) -> bool:
        """Whether it is too late to send it again."""
        return self.left < LAST_SECONDS

    def again(self, node: int, why: str) -> Message:
        """The same order, for another node; it lives as long as the first."""
        self.resent.append({"shard": self.shard, "why": why})
        self.messages.append(Message(self.first.content, node, self.first.metadata.message_type, ttl=self.left))
        return self.messages[-1]


@dataclass
class Phase:
    """The errands of a phase.

    judge: why a reply without error is unfit, or None. work: images to train, by shard. done: images of the orders that
    count as answered, by node. behind: nodes that were too late with an order.
    """

    round: int
    errands: dict[int, Errand]
    judge: Callable[[int, Message], str | None]
    work: dict[int, int]
    done: Counter[int] = field(default_factory=Counter)
    behind: set[int] = field(default_factory=set)

    def owed(self, node: int) -> int:
        """Images of all orders that a node has not answered."""
        return sum(self.work[e.shard] for e in self.errands.values() for a in e.asked.values() if a.node == node)


class Dispatcher(Grid):
    """The grid a strategy's rounds run on: as Flower's, but it sees a phase through.

    grid: Flower's. roster: who may stand in. retries: how often an order may be sent again in a phase. patience: an
    order is sent again after this many times the seconds such orders usually take on the node.
    """

    def __init__(self, grid: Grid, roster: Roster, retries: int, patience: float) -> None:
        self.grid, self.roster = grid, roster
        self.retries, self.patience = retries, patience
        self.phase: Phase | None = None
        self._puller = Puller(grid)
        self._late: set[str] = set()  # messages whose replies are no longer needed

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        return self.grid.run

    def create_message(self, *args, **kwargs) -> Message:  # type: ignore[no-untyped-def]
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return until_not_busy(self.grid.get_node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        return until_not_busy(lambda: list(self.grid.push_messages(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to messages without weights. Raises `UnusableReplyError` for one that is not fit to be read."""
        pulled = (self._pull(message_id, float("inf")) for message_id in message_ids)
        return [reply for reply in pulled if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies to the open phase's orders, one a shard at most; other messages go Flower's way."""
        messages = list(messages)
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        if self.phase is None or not messages:
            return self.grid.send_and_receive(messages, timeout=timeout) if messages else []
        phase, self.phase = self.phase, None
        errands = list(phase.errands.values())
        for errand, message in zip(errands, messages, strict=True):
            errand.messages = [message]  # strategies around ours may have made another of it
        self._send(phase, errands)
        looked = time.monotonic()
        while waiting := [e for e in errands if e.open]:
            self._receive(phase, waiting, deadline)
            now = time.monotonic()
            if now >= deadline:
                break
            if now - looked >= LOOK_SECONDS:
                looked = now
                self._look_after(phase)
            if any(e.open for e in waiting):
                time.sleep(PULL_SECONDS)
        for errand in errands:
            self._give_up(errand)
        return [e.reply for e in errands if e.reply is not None]

    def _pull(self, message_id: str, deadline: float, order: RecordDict | None = None) -> Message | None:
        """The reply to a message that carried `order`, if it is there. Raises `UnusableReplyError`."""
        most = MORE_TIMES * payload_bytes(order or RecordDict()) + MORE_BYTES
        return self._puller.take(message_id, most=most, ends=deadline, interval=PULL_SECONDS)

    def _send(self, phase: Phase, errands: list[Errand]) -> None:
        """Send the last message of each, all at once: Flower then looks only once at the weights they share."""
        messages = [errand.messages[-1] for errand in errands]
        ids = list(self.push_messages(messages))
        if len(ids) < len(errands):  # too much for one request, as Flower says in its log
            ids = [next(iter(self.push_messages([message])), "") for message in messages]
        for errand, message_id in zip(errands, ids, strict=True):
            node = errand.nodes[-1]
            if not message_id:
                self._failed(phase, errand, node, "Flower could not send the order", same_node=True)
            else:
                errand.asked[message_id] = Asking(node, time.monotonic(), done=phase.done[node])
                self._note(SENT, phase, errand, node, images=phase.work[errand.shard], attempt=len(errand.messages))
        for asking in [a for e in errands for a in e.asked.values() if not a.owed]:
            asking.owed = phase.owed(asking.node)

    def _give_up(self, errand: Errand) -> None:
        """Wait for no further reply. One that comes all the same is looked after: see `_look_after`."""
        self._puller.give_up(errand.asked)
        self._late.update(errand.asked)

    def _note(self, event: str, phase: Phase, errand: Errand, node: int, **more: object) -> None:
        self.roster.journal.note(event, round=phase.round, shard=errand.shard, node=node, **more)  # type: ignore[arg-type]

    def _note_failure(self, phase: Phase, errand: Errand, node: int, why: str) -> None:
        errand.failures.append(why)
        self._note(FAILED, phase, errand, node, level=WARNING, why=why)

    def _send_again(self, phase: Phase, errand: Errand, node: int, why: str) -> None:
        errand.again(node, why)
        self._send(phase, [errand])

    def _receive(self, phase: Phase, waiting: list[Errand], deadline: float) -> None:
        for errand, asked in [(e, asked) for e in waiting for asked in e.asked]:
            # one at a time, so that no more than one reply's weights are in memory beside their mean
            if errand.reply is not None:
                continue
            try:
                self._take(phase, errand, asked, deadline)
            except UnusableReplyError as error:
                self._failed(phase, errand, errand.asked.pop(asked).node, str(error), same_node=False)

    def _take(self, phase: Phase, errand: Errand, asked: str, deadline: float) -> None:
        """Judge the reply to a message, once it is there: the first sound one counts, else another node is asked.

        What the reply says that it answers is not looked at. Raises `UnusableReplyError`.
        """
        reply = self._pull(asked, deadline, errand.first.content)
        if reply is None:
            return
        asking = errand.asked.pop(asked)
        node = asking.node
        if reply.has_error() and reply.error.code in EXPIRED and errand.over:
            return  # no fault of the node's: there was no reply within the round
        if reply.has_error():
            again = reply.error.code not in SURELY_THE_APPS or OF_THE_WORKER in str(reply.error.reason)
            self._failed(phase, errand, node, reason_of(reply.error), same_node=again)
        elif (why := phase.judge(errand.shard, reply)) is not None:
            self._failed(phase, errand, node, why, same_node=False)
        else:
            errand.reply, errand.answered_by = reply, node
            self._give_up(errand)
            seconds = time.monotonic() - asking.at
            self._note(ANSWERED, phase, errand, node, seconds=seconds)
            phase.done[node] += phase.work[errand.shard]
            self.roster.answered(node, phase.done[node] - asking.done, seconds)

    def _failed(self, phase: Phase, errand: Errand, node: int, why: str, *, same_node: bool) -> None:
        self._note_failure(phase, errand, node, why)
        if not same_node:
            errand.unfit.add(node)
        if errand.asked or self._spent(errand):
            return  # another node is at it already, or there were enough
        if (to := self._next(phase, errand)) is not None:
            self._send_again(phase, errand, to, why)
        elif not self.roster.alive(self):
            log(WARNING, "round %d, shard %d: no node is there: waiting", phase.round, errand.shard)
            errand.stranded = time.monotonic()

    def _spent(self, errand: Errand) -> bool:
        """Whether an order is not sent again whatever happens."""
        return errand.over or len(errand.messages) > self.retries

    def _next(self, phase: Phase, errand: Errand) -> int | None:
        """The node to send an order to: one not tried yet, else one that may do better now, if there is any.

        Last comes one that has it in hand: it may have been restarted and lost it, which it does not say.
        """
        images = phase.work[errand.shard]
        to = self.roster.stand_in(errand.nodes, lambda node: phase.owed(node) + images, self)
        if to is not None:
            return to
        alive, at_it = self.roster.alive(self), {asking.node for asking in errand.asked.values()}
        tried = [n for n in errand.nodes if n not in errand.unfit and n in alive]
        return next(reversed([n for n in tried if n not in at_it] or tried), None)

    def _shelter(self, phase: Phase, errand: Errand, since: float) -> None:
        """Send an order that is stranded to a node that has come, maybe under a new ID, or give it up."""
        wait = self.roster.config.wait_seconds
        if not self._spent(errand) and (to := self._next(phase, errand)) is not None:
            errand.stranded = None
            self._send_again(phase, errand, to, errand.failures[-1])
        elif time.monotonic() - since > wait:
            errand.stranded = None
            self._note_failure(phase, errand, errand.node, f"no node came within wait-seconds={wait:g}")

    def _look_after(self, phase: Phase) -> None:
        """Send on the orders of nodes that are gone or far behind; a straggler's reply still counts if it is first.

        One that came too late for that would lie in the SuperLink's database to the end of the run.
        """
        self._late = {message_id for message_id in self._late if not self._puller.forget(message_id)}
        self.roster.meet(self)
        alive = set(self.roster.alive(self))
        for errand in [e for e in phase.errands.values() if e.open]:
            if errand.stranded is not None:
                self._shelter(phase, errand, errand.stranded)
                continue
            last = list(errand.asked.values())[-1]
            node = last.node
            if node not in alive:
                why = "the node is gone"
            elif self._too_late(last):
                why = "the node is far behind the usual time"
                if node not in phase.behind:
                    phase.behind.add(node)
                    self.roster.fell_behind(node)
            else:
                continue
            if not self._spent(errand) and (to := self._next(phase, errand)) is not None:
                self._note_failure(phase, errand, node, why)
                self._send_again(phase, errand, to, why)

    def _too_late(self, last: Asking) -> bool:
        usual = self.roster.usual_seconds(last.node, last.owed)
        if usual is None:
            return False
        return time.monotonic() - last.at > max(LEAST_SECONDS, self.patience * usual)
