"""RedistributeEnsemble: the Flower Strategy. FedAvg-style averaging, a ledger of samples, and a policy that moves them.

One server round:
    configure_train   one order a shard (not a node): sample IDs, loss bank, visit probabilities, global weights
    clients           train their proxies (ret_fl/proxy.py)
    aggregate_train   check every reply, let the base strategy average the sound ones, write what was learned into
                      the ledger, move samples
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from numpy.typing import NDArray

from ret_fl.aggregation import ShardGrid, make_base, refuse_to_wait
from ret_fl.averaging import RunningMean, needs_the_mean_only
from ret_fl.config import RunConfig
from ret_fl.dispatch import Dispatcher, Errand, Phase
from ret_fl.events import FAILED, MOVED, ROUND, TRAINED
from ret_fl.ledger import LedgerError, Moves, ShardLedger
from ret_fl.privacy import wrapper_of
from ret_fl.protocol import (
    ProtocolError,
    TrainOrder,
    TrainReport,
    base_content,
    clipping_norm,
    payload_bytes,
    reason_of,
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
from ret_fl.roster import FederationError, Roster
from ret_fl.rounds import HEADLINE, RoundSummary, ShardState, check_reply
from ret_fl.rundir import is_deployed, resume_command
from ret_fl.samples.grants import Signer


def _copies(clusters: NDArray[np.int64] | None, samples: int, drop: bool) -> NDArray[np.float32]:
    """By what each sample's visits are divided: float32 [N], the size of its cluster; 1 where none are looked for.

    drop: the first sample of a cluster stands for it, the others are visited never (infinity).
    """
    if clusters is None:
        return np.ones(samples, np.float32)
    _, first, inverse, counts = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    if drop:
        return np.where(first[inverse] == np.arange(samples), 1, np.inf).astype(np.float32)
    return counts[inverse].astype(np.float32)


Sound = tuple[Message, TrainReport, ArrayRecord | None]


@dataclass
class _Open:
    """The round in progress."""

    number: int = 0
    began: float = 0.0
    orders: dict[int, TrainOrder] = field(default_factory=dict)
    errands: dict[int, Errand] = field(default_factory=dict)
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    sound: dict[int, Sound] = field(default_factory=dict)
    mean: RunningMean = field(default_factory=RunningMean)
    bytes_up: int = 0
    failures: dict[int, str] = field(default_factory=dict)


class RedistributeEnsemble(Strategy):
    """Train K proxies on K shards, average them, redistribute samples.

    With `aggregate-every = 0` nothing is averaged. A proxy's weights travel with its shard's orders and replies, so
    that any node can train it on, and lie in its shard's state after every round: `shards[k].weights`.

    Parameters
    ----------
    ledger : ShardLedger
        Which shard owns which sample; the strategy writes it.
    config : RunConfig
        All settings; orders carry them to the clients.
    fingerprint : str
        Of the training data; clients with another one are refused.
    clusters : int64 [N], optional
        Equal for samples that are copies of one another (`find_clusters`). With `data.duplicates = weight` each is
        visited 1/copies as often, whatever shards they are in; with `drop` only the first of each cluster is.
    run_key : str
        Names the clients' local state; a resumed run must give the same.
    base : Strategy, optional
        Any Flower strategy that averages one ArrayRecord a reply: FedAvg, FedAdam, FedMedian, Krum, ... By default
        what `aggregation.*` and `dp.*` say (ret_fl/aggregation.py). Where nothing is averaged there is none.
    roster : Roster, optional
        The nodes greeted so far.
    first_round : int
        Rounds already done, when resuming: Flower's own `start` counts from 1.
    banks : list of ShardState, optional
        State of the shards when resuming.
    signer : Signer, optional
        Signs orders, so that clients without data can have their samples from a sample service.
    frozen : str
        Fingerprint of pretrained weights that do not travel; clients with others refuse their orders.
    """

    def __init__(
        self,
        ledger: ShardLedger,
        config: RunConfig,
        *,
        fingerprint: str,
        run_key: str,
        clusters: NDArray[np.int64] | None = None,
        base: Strategy | None = None,
        roster: Roster | None = None,
        first_round: int = 0,
        banks: list[ShardState] | None = None,
        signer: Signer | None = None,
        frozen: str = "",
    ) -> None:
        self.ledger = ledger
        self.config = config
        self.fingerprint = fingerprint
        handling = config.data.duplicates
        ledger.copies = _copies(clusters if handling != "keep" else None, len(ledger), handling == "drop")
        self.run_key = run_key
        self.signer, self.frozen = signer, frozen
        if base is not None and type(base) is not FedAvg and not config.averages:
            raise ValueError(f"aggregate-every=0 averages nothing: leave out base={type(base).__name__}")
        self.base = base or make_base(config)
        refuse_to_wait(self.base, ledger.num_shards)
        if config.private and wrapper_of(self.base) is None:
            raise ValueError(f"dp.mode={config.dp.mode}, but the base adds no noise: take make_base(config)")
        self.first_round = first_round
        self.policies, self.quarantine = parse_policy(config.redistribution.policy, config.redistribution.options)
        self.shards = banks or self._fresh_shards()
        self.roster = roster or Roster(config, fingerprint)
        self.journal = self.roster.journal
        self.last: RoundSummary | None = None
        self._open = _Open()

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
        if not c.averages:
            log(INFO, "\t│\t└── Averaging: never, %d proxies stay apart", c.shards)
            return
        log(INFO, "\t│\t└── Averaging: %s, every %d rounds", type(self.base).__name__, c.aggregate_every)
        self.base.summary()

    # Flower's hooks

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Flower's own loop of rounds, on a `Dispatcher`: what one node fails another does."""
        if not isinstance(grid, Dispatcher):
            grid = Dispatcher(grid, self.roster, self.config.retries, self.config.patience)
        return super().start(grid, *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One order for each shard; where there are fewer nodes than shards, they take turns.

        On a `Dispatcher` the order of a node that fails goes to another one; on another grid (a strategy wrapped around
        this one has its own loop) the shard is missing from the round. Raises `FederationError` if fewer than
        `min-nodes` are left after `wait-seconds`.
        """
        round = self.first_round + server_round
        try:
            nodes = self.roster.wait_for_enough(grid)
        except FederationError as error:
            raise FederationError(f"round {round}: {error}. {self._how_to_resume(round)}") from None
        if self.config.averages:
            # the base strategy sees the weights (FedAdam and DP keep them) and a client a shard, but addresses nobody
            shard_grid = cast(Grid, ShardGrid(self.ledger.num_shards))
            list(self.base.configure_train(round, arrays, config, shard_grid))
        shards = range(self.ledger.num_shards)
        norm = clipping_norm(config)
        orders = {shard: replace(self.order(round, shard), clipping_norm=norm) for shard in shards}
        work = {shard: self.config.visits(len(order.ids)) for shard, order in orders.items()}
        messages = {
            shard: Message(
                orders[shard].pack(self.shards[shard].weights or arrays),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
                ttl=self.config.round_timeout,
            )
            for shard, node in self.roster.assign([work[shard] for shard in shards], nodes).items()
        }
        errands = {shard: Errand(shard, [message]) for shard, message in messages.items()}
        self._open = _Open(round, time.monotonic(), orders, errands, arrays)
        if isinstance(grid, Dispatcher):
            grid.phase = Phase(round, errands, self._judge, work)
        return list(messages.values())

    def order(self, round: int, shard: int) -> TrainOrder:
        """What the client that trains `shard` in `round` needs to know."""
        ids = self.ledger.ids(shard)
        state = self.shards[shard]
        # a proxy that missed an average (its reply was lost) is older than the global weights
        missed = any(map(self.aggregates, range(state.proxy_round, round)))
        order = TrainOrder(
            config=self.config,
            run_key=self.run_key,
            fingerprint=self.fingerprint,
            shard=shard,
            round=round,
            proxy_round=state.proxy_round,
            start=("global" if missed else "proxy") if self.config.averages else "sent",
            upload=self.aggregates(round) or not self.config.averages,
            ids=ids,
            probability=self.ledger.ordered()[ids],
            strength=self.ledger.strength[ids],
            log_ratio=self.ledger.log_loss_ratio()[ids],
            usual=self.ledger.usual[ids],
            bank_values=state.bank_values,
            bank_visits=state.bank_visits,
            frozen=self.frozen,
        )
        return self.signer.signed(order) if self.signer else order

    def aggregates(self, round: int) -> bool:
        """Whether the proxies are averaged after this round; after the last one they are, unless they never are."""
        every = self.config.aggregate_every
        return bool(every) and (round % every == 0 or round == self.config.num_server_rounds)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the sound replies, learn from their reports, move samples.

        Where the base needs no more than the mean (ret_fl/averaging.py) it was taken as the replies arrived.

        Raises `FederationError` when fewer than `quorum` of the shards replied soundly: going on would freeze or
        bend the model silently.
        """
        round = self.first_round + server_round
        replies = list(replies)
        sound, failures = self._sound(replies)
        needed = math.ceil(self.config.quorum * self.ledger.num_shards)
        if len(sound) < needed:
            own = ((f"shard {shard}", why) for shard, why in failures.items())
            reasons = "; ".join(why if why.startswith(shard) else f"{shard}: {why}" for shard, why in own)
            raise FederationError(
                f"round {round}: {len(sound)} of {self.ledger.num_shards} shards replied soundly, quorum needs "
                f"{needed}. {reasons}. {self._how_to_resume(round)}"
            )
        errands = self._open.errands
        reports = [report for _, report, _ in sound]
        arrays, metrics = self._average(round, sound) if self.aggregates(round) else (None, None)
        for _, report, weights in sound:
            self.ledger.absorb(report)
            shard = self.shards[report.shard]
            if not self.config.averages:
                shard.weights = weights
            shard.bank_values, shard.bank_visits = report.bank_values.copy(), report.bank_visits.copy()
            shard.proxy_round = round
            node = errands[report.shard].node
            self.roster.trained(report.shard, node, report.images, report.seconds)
            self.journal.note(TRAINED, round=round, shard=report.shard, node=node, images=report.images,
                              samples=report.num_examples, seconds=report.seconds, loss=report.loss,
                              skip_rate=report.skip_rate)  # fmt: skip
        if round == self.config.usual_rounds:
            self.ledger.settle_usual()
        moves = self._redistribute(round, reports)
        for source, target in sorted(set(zip(moves.source.tolist(), moves.target.tolist(), strict=True))):
            ids = moves.ids[(moves.source == source) & (moves.target == target)].tolist()
            self.journal.note(MOVED, round=round, shard=source, to=target, count=len(ids), ids=ids)
        fits = shard_fits(reports)
        self.last = RoundSummary(
            round=round,
            aggregated=arrays is not None,
            reports=reports,
            moves=moves,
            quarantined=int((self.ledger.probability < 1).sum()),
            failures=failures,
            resent=[again for errand in errands.values() for again in errand.resent],
            partitions={report.shard: self._partition(errands[report.shard].node) for report in reports},
            bytes_down=sum(payload_bytes(e.first.content) * len(e.messages) for e in errands.values()),
            bytes_up=self._open.bytes_up,
            seconds=time.monotonic() - self._open.began,
            gap=fits[0].log_loss - fits[-1].log_loss,
        )
        row = self.last.row()
        self.journal.note(ROUND, round=round, lost=len(failures), **{k: row[k] for k in HEADLINE})  # type: ignore[arg-type]
        self._open = _Open()  # the replies' weights need no longer be held
        return arrays, metrics

    def _judge(self, shard: int, reply: Message) -> str | None:
        """Why a reply to a shard's order is not fit to be used; None if it is, and then it is kept."""
        opened = self._open
        try:
            if reply.has_error():
                raise ProtocolError(reason_of(reply.error))
            opened.bytes_up += payload_bytes(reply.content)
            report, weights = TrainReport.unpack(reply.content)
            check_reply(report, weights, opened.orders[shard], self.shards[shard], opened.arrays)
            self.ledger.check_report(report)
        except (ProtocolError, LedgerError) as error:
            opened.failures[shard] = str(error)
            return str(error)
        if not self.config.averages:
            reply.content = RecordDict()  # see protocol.find
        elif weights is not None and needs_the_mean_only(self.base):
            opened.mean.add(weights, report)
            reply.content = RecordDict()  # the reply is held to the end of the round, its weights need not be
            weights = None
        opened.sound[shard] = (reply, report, weights)
        return None

    def _sound(self, replies: list[Message]) -> tuple[list[Sound], dict[int, str]]:
        """Replies fit to be used, by shard, and why the other shards are missing."""
        opened = self._open
        # Flower fills in a message's ID when it sends it, and every reply names it, errors of Flower's own too
        asked = {message.metadata.message_id: shard for shard, e in opened.errands.items() for message in e.messages}
        judged = {id(reply) for reply, _, _ in opened.sound.values()}
        for reply in replies:
            if id(reply) in judged:
                continue  # by a `Dispatcher`, whatever it says that it answers
            shard = asked.get(reply.metadata.reply_to_message_id)
            if shard is None:
                log(WARNING, "round %d: a reply dropped: it answers no order of this round", opened.number)
            elif shard not in opened.sound:
                self._judge(shard, reply)
            else:
                log(WARNING, "round %d: a second reply for shard %d dropped", opened.number, shard)
        failures = {}
        for shard, errand in opened.errands.items():
            if shard not in opened.sound:
                silent = f"no reply within round-timeout={self.config.round_timeout:g} s"
                failures[shard] = opened.failures.get(shard) or "; ".join(dict.fromkeys(errand.failures)) or silent
                self.journal.note(FAILED, round=opened.number, shard=shard, node=errand.node, level=WARNING,
                                  why=failures[shard])  # fmt: skip
        return [opened.sound[shard] for shard in sorted(opened.sound)], failures

    def _partition(self, node: int) -> int:
        hello = self.roster.nodes.get(node)
        return hello.partition if hello else -1

    def _average(self, round: int, sound: list[Sound]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        messages = [message for message, _, _ in sound]
        if self._open.mean.content is not None:
            arrays, metrics = self._open.mean.through(self.base, round, messages[0])
        else:
            for message, report, weights in sound:
                assert weights is not None  # check_reply saw to it
                message.content = base_content(weights, report, private=self.config.private)
            arrays, metrics = self.base.aggregate_train(round, messages)
            for message in messages:
                message.content = RecordDict()
            gc.collect()  # all replies, which Flower has looked at (protocol.find)
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
                inside = random_of_equal_number(inside, self.ledger.visited(), self.config.seed)
            self.ledger.probability = np.where(inside, self.config.quarantine.probability, 1).astype(np.float32)
        self.ledger.check()
        return moves

    def _how_to_resume(self, round: int) -> str:
        kept = "The last finished round is kept: go on" if round > 1 else "No round is finished: begin again"
        return f"{kept} with `{resume_command(self.config.out or 'RUN_DIR', deployed=is_deployed())}`"

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Clients evaluate nothing: the averaged model is measured on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None
