"""RedistributeEnsemble: the Flower Strategy. FedAvg-style averaging, a ledger of samples, and a policy that moves them.

One server round:
    configure_train   one order a shard (not a node): sample IDs, loss bank, visit probabilities, global weights
    clients           train their proxies (ret_fl/proxy.py)
    aggregate_train   check every reply, let the base strategy average the sound ones, write what was learned into
                      the ledger, move samples
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from ret_fl.config import RunConfig
from ret_fl.ledger import LedgerError, Moves, ShardLedger
from ret_fl.protocol import (
    Hello,
    ProtocolError,
    TrainOrder,
    TrainReport,
    base_content,
    payload_bytes,
)
from ret_fl.proxy import round_seed
from ret_fl.redistribution import (
    is_due,
    parse_policy,
    propose,
    quarantined,
    random_of_equal_number,
    shard_fits,
)
from ret_fl.rounds import RoundSummary, ShardState, check_reply
from ret_fl.samples.grants import Signer


class FederationError(RuntimeError):
    """The run cannot go on: no clients, too few sound replies, or clients with other data."""


class _ShardGrid:
    """All that a base strategy's configure_train asks of a Grid: node IDs, one for each shard."""

    def __init__(self, shards: int) -> None:
        self.shards = shards

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.shards + 1))


def _copies(content: NDArray[np.uint64] | None, samples: int) -> NDArray[np.float32]:
    """How often each sample's image stands in the training set: float32 [N]; 1 where copies are not looked for."""
    if content is None:
        return np.ones(samples, np.float32)
    _, inverse, counts = np.unique(content, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.float32)


def _refuse_to_wait(base: Strategy, shards: int) -> None:
    """Flower's strategies wait without limit for their minimum of clients; here there are as many as shards."""
    inner: Strategy | None = base
    while inner is not None:
        for name in ("min_available_nodes", "min_train_nodes"):
            if getattr(inner, name, 0) > shards:
                raise ValueError(
                    f"{type(inner).__name__}({name}={getattr(inner, name)}) would wait for ever with {shards} shards: "
                    f"give it {name}={shards} or less"
                )
        inner = getattr(inner, "strategy", None)


@dataclass
class _Open:
    """The round in progress."""

    began: float
    orders: dict[int, TrainOrder] = field(default_factory=dict)
    messages: dict[int, Message] = field(default_factory=dict)
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    bytes_down: int = 0


class RedistributeEnsemble(Strategy):
    """Train K proxies on K shards, average them, redistribute samples.

    Parameters
    ----------
    ledger : ShardLedger
        Which shard owns which sample; the strategy writes it.
    config : RunConfig
        All settings; orders carry them to the clients.
    fingerprint : str
        Of the training data; clients with another one are refused.
    content : uint64 [N], optional
        Content hash of each sample. With `data.duplicates = weight`, exact copies are visited 1/copies as often each,
        whatever shards they are in.
    run_key : str
        Names the clients' local state; a resumed run must give the same.
    base : Strategy, optional
        Any Flower strategy that averages one ArrayRecord a reply: FedAvg (default), FedAdam, FedMedian, Krum, or
        one of these inside a differential-privacy wrapper.
    first_round : int
        Rounds already done, when resuming: Flower's own `start` counts from 1.
    banks : list of ShardState, optional
        State of the shards when resuming.
    signer : Signer, optional
        Signs orders, so that clients without data can have their samples from a sample service.
    """

    def __init__(
        self,
        ledger: ShardLedger,
        config: RunConfig,
        *,
        fingerprint: str,
        run_key: str,
        content: NDArray[np.uint64] | None = None,
        base: Strategy | None = None,
        first_round: int = 0,
        banks: list[ShardState] | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.ledger = ledger
        self.config = config
        self.fingerprint = fingerprint
        self.copies = _copies(content if config.data.duplicates == "weight" else None, len(ledger))
        self.run_key = run_key
        self.signer = signer
        self.base = base or FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        _refuse_to_wait(self.base, ledger.num_shards)
        self.first_round = first_round
        self.policies, self.quarantine = parse_policy(config.redistribution.policy)
        self.shards = banks or self._fresh_shards()
        self.nodes: dict[int, Hello] = {}
        self.refused: set[int] = set()
        self.unwell: dict[int, str] = {}
        self.last: RoundSummary | None = None
        self._open = _Open(0.0)

    def _fresh_shards(self) -> list[ShardState]:
        cells = self.config.agc.bins or self.config.diffusion.timesteps
        return [
            ShardState(np.zeros(cells, np.float32), np.zeros(cells, np.int64)) for _ in range(self.ledger.num_shards)
        ]

    def summary(self) -> None:
        """Log what the run is about to do."""
        c = self.config
        log(INFO, "\t├──> Redistribute Ensemble Training:")
        log(INFO, "\t│\t├── Shards: %s samples", ", ".join(map(str, self.ledger.sizes())))
        log(INFO, "\t│\t├── AGC: %s, mem-ratio %g, t < %d", c.agc.mode, c.agc.mem_ratio, c.agc.t_max)
        log(INFO, "\t│\t├── Redistribution: %s", c.redistribution.policy)
        log(INFO, "\t│\t└── Averaging: %s, every %d rounds", type(self.base).__name__, c.aggregate_every)
        self.base.summary()

    # Nodes

    def greet(self, grid: Grid) -> None:
        """Ask every unknown node who it is; wait until `min-nodes` with the right data are there.

        Raises `FederationError` if one has other data, or if too few come within `wait-seconds`.
        """
        deadline = time.monotonic() + self.config.wait_seconds
        while True:
            for node, hello in self._hellos(grid).items():
                if hello.fingerprint != self.fingerprint:
                    raise FederationError(
                        f"node {node} (partition {hello.partition}) has other data: fingerprint "
                        f"{hello.fingerprint[:16]} of {hello.samples} samples, the server has "
                        f"{self.fingerprint[:16]} of {len(self.ledger)}. Check data.source, data.path, data.seed and "
                        "the files on that node"
                    )
                self.nodes[node] = hello
                log(INFO, "node %d: partition %d on %s, same data", node, hello.partition, hello.device)
            if len(self.nodes) >= self.config.min_nodes:
                return
            if time.monotonic() > deadline:
                said = "".join(f". Node {node} answered: {why}" for node, why in self.unwell.items())
                raise FederationError(
                    f"{len(self.nodes)} of min-nodes={self.config.min_nodes} clients came within "
                    f"wait-seconds={self.config.wait_seconds:g}{said}"
                )
            time.sleep(1)

    def _hellos(self, grid: Grid) -> dict[int, Hello]:
        new = [n for n in grid.get_node_ids() if n not in self.nodes and n not in self.refused]
        requests = [Message(Hello.request(self.config), dst_node_id=n, message_type=MessageType.QUERY) for n in new]
        if not requests:
            return {}
        hellos: dict[int, Hello] = {}
        for reply in grid.send_and_receive(requests, timeout=self.config.wait_seconds):
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise ProtocolError(reply.error.reason)
                hellos[node] = Hello.unpack(reply.content)
            except ProtocolError as error:
                if self.unwell.get(node) != str(error):
                    log(WARNING, "node %d does not answer properly: %s", node, error)
                self.unwell[node] = str(error)
        return hellos

    def _living_nodes(self, grid: Grid) -> list[int]:
        """Nodes that may get work, by partition; late-comers are greeted, those with other data left out."""
        for node, hello in self._hellos(grid).items():
            if hello.fingerprint == self.fingerprint:
                self.nodes[node] = hello
                log(INFO, "node %d joins: partition %d on %s", node, hello.partition, hello.device)
            else:
                self.refused.add(node)
                log(WARNING, "node %d joins with other data (%s) and is left out", node, hello.fingerprint[:16])
        alive = set(grid.get_node_ids())
        return sorted((n for n in self.nodes if n in alive), key=lambda n: (self.nodes[n].partition, n))

    # Flower's hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One order for each shard; where there are fewer nodes than shards, they take turns."""
        round = self.first_round + server_round
        nodes = self._living_nodes(grid)
        if not nodes:
            raise FederationError(f"round {round}: no client is left. {self._how_to_resume()}")
        # the base strategy sees the weights (FedAdam and DP keep them) and a client a shard, but addresses nobody
        list(self.base.configure_train(server_round, arrays, config, cast(Grid, _ShardGrid(self.ledger.num_shards))))
        self._open = _Open(time.monotonic(), arrays=arrays)
        for shard in range(self.ledger.num_shards):
            order = self.order(round, shard)
            content = order.pack(arrays)
            node = nodes[shard % len(nodes)]
            self._open.orders[shard] = order
            self._open.messages[shard] = Message(
                content, dst_node_id=node, message_type=MessageType.TRAIN, ttl=self.config.round_timeout
            )
            self._open.bytes_down += payload_bytes(content)
        return list(self._open.messages.values())

    def order(self, round: int, shard: int) -> TrainOrder:
        """What the client that trains `shard` in `round` needs to know."""
        ids = self.ledger.ids(shard)
        state = self.shards[shard]
        order = TrainOrder(
            config=self.config,
            run_key=self.run_key,
            fingerprint=self.fingerprint,
            shard=shard,
            round=round,
            proxy_round=state.proxy_round,
            # a proxy that missed an average (its reply was lost) is older than the global weights
            start="proxy" if not any(map(self.aggregates, range(state.proxy_round, round))) else "global",
            upload=self.aggregates(round),
            ids=ids,
            probability=self.ledger.probability[ids] / self.copies[ids],
            strength=self.ledger.strength[ids],
            log_ratio=self.ledger.log_loss_ratio()[ids],
            bank_values=state.bank_values,
            bank_visits=state.bank_visits,
        )
        return self.signer.signed(order) if self.signer else order

    def aggregates(self, round: int) -> bool:
        """Whether the proxies are averaged after this round; after the last one they always are."""
        return round % self.config.aggregate_every == 0 or round == self.config.num_server_rounds

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the sound replies, learn from their reports, move samples.

        Raises `FederationError` when fewer than `quorum` of the shards replied soundly: going on would freeze or
        bend the model silently.
        """
        round = self.first_round + server_round
        replies = list(replies)
        sound, failures = self._sound(round, replies)
        needed = math.ceil(self.config.quorum * self.ledger.num_shards)
        if len(sound) < needed:
            reasons = "; ".join(f"shard {shard}: {why}" for shard, why in failures.items())
            raise FederationError(
                f"round {round}: {len(sound)} of {self.ledger.num_shards} shards replied soundly, quorum needs "
                f"{needed}. {reasons}. {self._how_to_resume()}"
            )
        bytes_up = sum(payload_bytes(m.content) for m in replies if m.has_content())
        reports = [report for _, report, _ in sound]
        arrays, metrics = self._average(server_round, sound) if self.aggregates(round) else (None, None)
        for report in reports:
            self.ledger.absorb(report)
            shard = self.shards[report.shard]
            shard.bank_values, shard.bank_visits = report.bank_values, report.bank_visits
            shard.proxy_round = round
        moves = self._redistribute(round, reports)
        fits = shard_fits(reports)
        self.last = RoundSummary(
            round=round,
            aggregated=arrays is not None,
            reports=reports,
            moves=moves,
            quarantined=int((self.ledger.probability < 1).sum()),
            failures=failures,
            bytes_down=self._open.bytes_down,
            bytes_up=bytes_up,
            seconds=time.monotonic() - self._open.began,
            gap=fits[0].log_loss - fits[-1].log_loss,
        )
        return arrays, metrics

    def _sound(
        self, round: int, replies: list[Message]
    ) -> tuple[list[tuple[Message, TrainReport, ArrayRecord | None]], dict[int, str]]:
        """Replies fit to be used, by shard, and why the other shards are missing."""
        sound: dict[int, tuple[Message, TrainReport, ArrayRecord | None]] = {}
        failures: dict[int, str] = {}
        # Flower fills in a message's ID when it sends it, and every reply names it, errors of Flower's own too
        asked = {message.metadata.message_id: shard for shard, message in self._open.messages.items()}
        for reply in replies:
            shard = asked.get(reply.metadata.reply_to_message_id, -1)
            try:
                if reply.has_error():
                    raise ProtocolError(reply.error.reason)
                report, weights = TrainReport.unpack(reply.content)
                if shard not in self._open.orders:
                    raise ProtocolError("it answers no order of this round")
                if shard in sound:
                    raise ProtocolError("a second reply for the same shard")
                check_reply(report, weights, self._open.orders[shard], self.shards[shard], self._open.arrays)
                self.ledger.check_report(report)
                sound[shard] = (reply, report, weights)
            except (ProtocolError, LedgerError) as error:
                failures[shard] = str(error)
                log(WARNING, "round %d: reply for shard %d dropped: %s", round, shard, error)
        for shard in self._open.orders:
            if shard not in sound and shard not in failures:
                failures[shard] = f"no reply within round-timeout={self.config.round_timeout:g} s"
                log(WARNING, "round %d: shard %d: %s", round, shard, failures[shard])
        return [sound[shard] for shard in sorted(sound)], failures

    def _average(
        self, server_round: int, sound: list[tuple[Message, TrainReport, ArrayRecord | None]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        messages = []
        for message, report, weights in sound:
            assert weights is not None  # check_reply saw to it
            message.content = base_content(weights, report)
            messages.append(message)
        arrays, metrics = self.base.aggregate_train(server_round, messages)
        if arrays is None:
            raise FederationError(f"{type(self.base).__name__} returned no weights for {len(messages)} sound replies")
        return arrays, metrics

    def _redistribute(self, round: int, reports: list[TrainReport]) -> Moves:
        rng = np.random.default_rng(round_seed(self.config.seed, round, self.ledger.num_shards, 1))
        moves = Moves.none()
        if is_due(self.config, round):
            moves = propose(self.policies, self.ledger, reports, rng, self.config.redistribution)
            self.ledger.apply(moves)
        if self.quarantine and round % self.config.quarantine.every == 0:
            inside = quarantined(self.ledger, self.config.quarantine)
            if self.config.redistribution.control != "off":
                inside = random_of_equal_number(inside, self.config.seed)
            self.ledger.probability = np.where(inside, self.config.quarantine.probability, 1).astype(np.float32)
        self.ledger.check()
        return moves

    def _how_to_resume(self) -> str:
        return f"The last finished round is kept: go on with `ret-fl run --resume {self.config.out or 'RUN_DIR'}`"

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Clients evaluate nothing: the averaged model is measured on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None
