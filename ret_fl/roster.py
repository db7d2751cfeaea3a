"""The nodes of a federation: who is there, with which data, how fast, and which shard goes to whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from statistics import median_low

from flwr.app import Message, MessageType
from flwr.common.logger import log
from flwr.serverapp import Grid

from ret_fl.config import RunConfig
from ret_fl.events import BACK, GONE, JOINED, REFUSED, Journal
from ret_fl.protocol import Hello, ProtocolError, reason_of
from ret_fl.pulling import UnusableReplyError

POLL_SECONDS = 1.0
HELLO_SECONDS = 60.0
"""How long, once, a node that has not introduced itself keeps those waiting that have."""
HELLO_LIFE = 3600.0
"""After which a node that was asked who it is and has not answered is asked anew; `wait-seconds` if they are more."""
UNWELL_SECONDS = 10.0
"""After which one that could not say is."""
STAY = 1.5
STAY_SECONDS = 30.0
"""A shard stays with its node, where its moments lie, unless another would be done so many times and seconds sooner."""
SMOOTH = 0.5
"""How much of its old speed, or of its slower answers, a node keeps at each new measurement."""
UNTRIED = 10
"""How many times as fast as the others a node may say it is before it has answered an order."""
MOST_RESTS = 15
"""For how many rounds, at most, a node that was far behind again and again is left out."""


class FederationError(RuntimeError):
    """The run cannot go on: too few clients with its data, or too few sound replies."""


@dataclass
class Roster:
    """Nodes that have introduced themselves with the right data, and how fast each trains.

    journal: where it is told. nodes: what each said of itself. gone: those that Flower no longer hears from. refused:
    what is wrong with the data of nodes that have others. unwell: why a node could not introduce itself. asked: the
    node that owes an introduction, by message ID. first_asked, ask_again: when (monotonic seconds) a node first was,
    and when it may be anew. speed: images a second of training, as the node says. turnaround: seconds an image from
    order to answer, the slower ones lately. behind: how often in a row a node was far behind. rests: for how many more
    rounds such a node is left out. home: the partition of the node that trained a shard last, which has its moments;
    the node itself may come back under another ID.
    """

    config: RunConfig
    fingerprint: str
    journal: Journal = field(default_factory=Journal)
    nodes: dict[int, Hello] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    unwell: dict[int, str] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    first_asked: dict[int, float] = field(default_factory=dict)
    ask_again: dict[int, float] = field(default_factory=dict)
    speed: dict[int, float] = field(default_factory=dict)
    turnaround: dict[int, float] = field(default_factory=dict)
    behind: dict[int, int] = field(default_factory=dict)
    rests: dict[int, int] = field(default_factory=dict)
    home: dict[int, int] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)

    def greet(self, grid: Grid) -> None:
        """Ask every unknown node who it is; wait until `min-nodes` with the right data are there.

        Others that have been asked are then waited for, too, for `HELLO_SECONDS`. Those with other data are left out.
        Raises `FederationError`, which names these, if too few come within `wait-seconds`.
        """
        deadline = time.monotonic() + self.config.wait_seconds
        while True:
            self.meet(grid)
            if len(self.nodes) >= self.config.min_nodes:
                self.living(grid)
                return
            if time.monotonic() > deadline:
                raise FederationError(self._too_few(len(self.nodes)))
            time.sleep(POLL_SECONDS)

    def meet(self, grid: Grid) -> None:
        """Ask nodes that are new who they are, and hear those that have answered by now; nobody is waited for."""
        listed = list(grid.get_node_ids())
        self.refused = {node: why for node, why in self.refused.items() if node in listed}  # it may come back mended
        now = time.monotonic()
        known = {*self.nodes, *self.refused, *self.asked.values()}
        new = [n for n in listed if n not in known and now >= self.ask_again.get(n, now)]
        life = max(HELLO_LIFE, self.config.wait_seconds)
        asking = [Message(Hello.request(self.config), n, MessageType.QUERY, ttl=life) for n in new]
        for node, message_id in zip(new, grid.push_messages(asking) if asking else [], strict=False):
            if message_id:
                self.asked[message_id] = node
                self.first_asked.setdefault(node, now)
        for asked in list(self.asked):
            self._hear(asked, grid)

    def _hear(self, asked: str, grid: Grid) -> None:
        """Take in what the node that was asked with this message says of itself, if it has answered by now."""
        node = self.asked.pop(asked)
        try:
            reply = next(iter(grid.pull_messages([asked])), None)
            if reply is None:
                self.asked[asked] = node
                return
            if reply.has_error():
                raise ProtocolError(reason_of(reply.error))
            hello = Hello.unpack(reply.content)
        except (ProtocolError, UnusableReplyError) as error:
            if self.unwell.get(node) != str(error):
                log(WARNING, "node %d does not answer properly: %s", node, error)
            self.unwell[node] = str(error)
            self.ask_again[node] = time.monotonic() + UNWELL_SECONDS
            return
        self.unwell.pop(node, None)
        if hello.fingerprint == self.fingerprint:
            self._welcome(node, hello)
            return
        self.refused[node] = why = (
            f"it has other data: fingerprint {hello.fingerprint[:16]} of {hello.samples} samples, the server has "
            f"{self.fingerprint[:16]}. Check data.source, data.path, data.seed and the files on that node"
        )
        self.journal.note(REFUSED, node=node, level=WARNING, partition=hello.partition, why=why)

    def _awaited(self, seconds: float) -> bool:
        """Whether a node that was first asked less than so many seconds ago has not answered."""
        now = time.monotonic()
        return any(now - self.first_asked[node] < seconds for node in self.asked.values())

    def _welcome(self, node: int, hello: Hello) -> None:
        self.nodes[node] = hello
        if hello.images_per_second > 0:
            self.speed[node] = hello.images_per_second
        self.journal.note(JOINED, node=node, partition=hello.partition, device=hello.device, samples=hello.samples)

    def _too_few(self, there: int) -> str:
        said = "".join(f". Node {node} answered: {why}" for node, why in self.unwell.items())
        said += "".join(f". Node {node} is refused: {why}" for node, why in self.refused.items())
        return (
            f"{there} of min-nodes={self.config.min_nodes} clients are there after "
            f"wait-seconds={self.config.wait_seconds:g}{said}"
        )

    def living(self, grid: Grid) -> list[int]:
        """Nodes that may get work, by partition; late-comers are greeted, those with other data left out."""
        seconds = min(HELLO_SECONDS, self.config.wait_seconds)
        ends = time.monotonic() + seconds  # one that is always new, as it dies and comes back, is not waited for anew
        self.meet(grid)
        while self._awaited(seconds) and time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
            self.meet(grid)
        return self.alive(grid)

    def alive(self, grid: Grid) -> list[int]:
        """Known nodes that Flower still hears from, by partition."""
        there = set(grid.get_node_ids())
        gone = {n for n in self.nodes if n not in there}
        for node in sorted(gone - self.gone):
            self.journal.note(GONE, node=node, level=WARNING)
        for node in sorted(self.gone - gone):
            self.journal.note(BACK, node=node)
            self._is_well(node)
        self.gone = gone
        return sorted((n for n in self.nodes if n in there), key=lambda n: (self.nodes[n].partition, n))

    def wait_for_enough(self, grid: Grid) -> list[int]:
        """`living`, once there are `min-nodes` of them.

        Raises `FederationError` if there are still too few after `wait-seconds`.
        """
        deadline = time.monotonic() + self.config.wait_seconds
        said = False
        while True:
            nodes = self.living(grid)
            if len(nodes) >= self.config.min_nodes:
                return nodes
            if time.monotonic() > deadline:
                raise FederationError(self._too_few(len(nodes)))
            if not said:
                log(WARNING, "%d of min-nodes=%d clients left: waiting", len(nodes), self.config.min_nodes)
                said = True
            time.sleep(POLL_SECONDS)

    def assign(self, images: Sequence[int], nodes: Sequence[int]) -> dict[int, int]:
        """Which node trains each shard: the largest first, each where it would be done soonest.

        images: to be trained on in each shard. A shard stays with the node it was on unless another is much faster
        to finish, or had none, as one that was away, where that node has others, too; at first shard k belongs to the
        k-th node. Nodes of unknown speed count as fast as the others. A node that was far behind gets nothing for
        a while: see `fell_behind`.
        """
        nodes = self._rested(nodes)
        finish = dict.fromkeys(nodes, 0.0)
        homes = {self.home.get(shard) for shard in range(len(images))}
        spare = set() if None in homes else {n for n in nodes if self.nodes[n].partition not in homes}
        assigned: dict[int, int] = {}
        for shard in sorted(range(len(images)), key=lambda k: (-images[k], k)):
            at_home = [n for n in nodes if self.home.get(shard) in (None, self.nodes[n].partition)]
            done = {n: finish[n] + images[shard] / self.speed_of(n) for n in nodes}
            node = min(nodes, key=lambda n: (done[n], nodes.index(n)))
            home = at_home[shard % len(at_home)] if at_home else node
            alone = node in spare and not finish[node]
            slack = 0.0 if alone and finish[home] else STAY_SECONDS
            if done[home] <= max(STAY * done[node], done[node] + slack):
                node = home
            finish[node] = done[node]
            assigned[shard] = node
        return dict(sorted(assigned.items()))

    def _rested(self, nodes: Sequence[int]) -> Sequence[int]:
        """Those that need not rest this round; all, if all would."""
        resting = {n for n in nodes if self.rests.get(n)}
        for node in resting:
            self.rests[node] -= 1
        return [n for n in nodes if n not in resting] or nodes

    def fell_behind(self, node: int) -> None:
        """Take in that a node was far behind in a round: it gets no shard for 1 round, at the next time for 3, 7, ...

        Whatever it hangs in, its speed does not tell, and each try costs the round what it takes to notice. What it
        answers, or a return after it was gone, ends that.
        """
        self.behind[node] = self.behind.get(node, 0) + 1
        self.rests[node] = min(2 ** self.behind[node] - 1, MOST_RESTS)

    def _is_well(self, node: int) -> None:
        self.behind.pop(node, None)
        self.rests.pop(node, None)

    def speed_of(self, node: int) -> float:
        """Images a second: as the node says, else the lower median of the others, else 1.

        More than the median is believed as far as the node's answers bear it out, before its first one up to `UNTRIED`
        times the median. Below the median its word counts, as a slow answer may be the network's fault: without work
        it could not show better.
        """
        others = [speed for other, speed in self.speed.items() if other != node]
        said = self.speed.get(node)
        if not others:
            return said or 1.0
        usual = median_low(others)
        answers = self.turnaround.get(node)
        most = max(usual, 1 / answers) if answers else UNTRIED * usual
        return min(said or usual, most)

    def trained(self, shard: int, node: int, images: int, seconds: float) -> None:
        """Take in that a node has trained a shard: `images` in `seconds`."""
        self.home[shard] = self.nodes[node].partition
        if images > 0 and seconds > 0:
            fresh = images / seconds
            self.speed[node] = SMOOTH * self.speed.get(node, fresh) + (1 - SMOOTH) * fresh

    def answered(self, node: int, images: int, seconds: float) -> None:
        """Take in how long after it was sent an order was answered, and the images that the node answered meanwhile.

        Unlike the speed of training it counts all there is to wait for: start-up, the network, a machine shared with
        other nodes. The slowest answer decides, by the image; with each faster one half of the difference is forgotten.
        """
        fresh = seconds / images
        old = self.turnaround.get(node, fresh)
        self.turnaround[node] = max(fresh, SMOOTH * old + (1 - SMOOTH) * fresh)
        self._is_well(node)

    def usual_seconds(self, node: int, images: int) -> float | None:
        """How long after it was sent an order should be answered where the node has so many images to train.

        From a node that never answered one as long as from the slowest other, or by the speed it measured, if that is
        longer; None where neither is known.
        """
        if node in self.turnaround:
            return self.turnaround[node] * images
        guesses = list(self.turnaround.values()) + ([1 / self.speed[node]] if node in self.speed else [])
        return max(guesses) * images if guesses else None

    def stand_in(self, tried: Collection[int], images: Callable[[int], int], grid: Grid) -> int | None:
        """The living node not tried yet that is done soonest, one not far behind lately if there is any, or None.

        images: that a node would then have to train.
        """
        there = [n for n in self.alive(grid) if n not in tried]
        return min(there, key=lambda n: (n in self.behind, images(n) / self.speed_of(n)), default=None)

    def sizes(self, shards: int, nodes: Sequence[int]) -> str:
        """Relative shard sizes, as `partition.sizes` has them, with which all nodes are done at the same time."""
        owner = [nodes[shard % len(nodes)] for shard in range(shards)]
        return ",".join(f"{self.speed_of(node) / owner.count(node):.6g}" for node in owner)
