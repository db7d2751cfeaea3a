"""What the server does with reported sample IDs: pure functions from what is known to moves.

Exchanges round the ring: `memorized` is the paper's MSR, a swap of the most-skipped samples; `high-loss` passes on the
worst-fitted ones, `random` any, which mixes shards best and is the default. `balance`: high-loss samples go from the
shard whose proxy fits worst to the one that fits best, while shards are unbalanced. `quarantine` moves nothing:
memorized samples are visited less often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ret_fl.config import ConfigError, QuarantineConfig, RedistributionConfig, RunConfig
from ret_fl.ledger import Ids, LedgerError, Moves, ShardLedger
from ret_fl.loading import load, names
from ret_fl.plugins import POLICIES
from ret_fl.protocol import TrainReport

Policy = Callable[[ShardLedger, Sequence[TrainReport], np.random.Generator, RedistributionConfig], Moves]
"""As `ret_fl.plugins.RedistributionPolicy`: a policy reads and proposes, the caller applies."""


@dataclass(frozen=True)
class Fit:
    """How well one proxy fits its shard: mean log-loss at equal noise levels, and its standard error."""

    shard: int
    log_loss: float
    error: float


def shard_fits(reports: Sequence[TrainReport]) -> list[Fit]:
    """Fit of each reporting shard, worst (highest loss) first.

    Log-losses are compared noise bin by noise bin against the pooled mean of the bin, so a shard that happened
    to draw other timesteps is not taken for a better or worse one.
    """
    if not reports:
        return []
    mean = np.stack([r.bin_mean for r in reports])
    count = np.stack([r.bin_count for r in reports]).astype(float)
    pooled = (mean * count).sum(axis=0) / np.maximum(count.sum(axis=0), 1)
    total = np.maximum(count.sum(axis=1), 1)
    above = ((mean - pooled) * count).sum(axis=1) / total
    fits = [Fit(r.shard, float(a), r.spread / float(n) ** 0.5) for r, a, n in zip(reports, above, total, strict=True)]
    return sorted(fits, key=lambda f: -f.log_loss)


def _top(ids: Ids, score: NDArray, count: int, rng: np.random.Generator) -> Ids:
    """The `count` ids of highest score; ties are broken at random (by rng), NaN counts as lowest."""
    tie = rng.permutation(len(ids))
    order = np.lexsort((tie, -np.nan_to_num(score, nan=-np.inf)))
    return ids[order[:count]]


def balance(
    ledger: ShardLedger, reports: Sequence[TrainReport], rng: np.random.Generator, config: RedistributionConfig
) -> Moves:
    """High-loss samples of one shard go to another, while shards are unbalanced in loss or in size.

    In loss: the worst-fitted shard gives to the best-fitted one while they differ by more than `gap`; a difference
    below three standard errors is noise. In size: where losses do not tell, the largest gives to the smallest while
    it is more than `size_ratio` times as large. `fraction` of the giving shard moves at a time; no shard falls below
    half the mean size, so a shard of intrinsically hard samples is not emptied.
    """
    fits = shard_fits(reports)
    if len(fits) < 2:
        return Moves.none()
    worst, best = fits[0], fits[-1]
    noise = 3 * float(np.hypot(worst.error, best.error))
    size = ledger.sizes()
    largest, smallest = int(size.argmax()), int(size.argmin())
    if worst.log_loss - best.log_loss > max(config.gap, noise):
        giver, receiver, most = worst.shard, best.shard, int(size[worst.shard])
    elif size[largest] > config.size_ratio * size[smallest]:
        giver, receiver, most = largest, smallest, int(size[largest] - size[smallest]) // 2
    else:
        return Moves.none()
    ids = ledger.ids(giver)
    spare = len(ids) - max(1, len(ledger) // (2 * ledger.num_shards))
    count = min(max(1, round(config.fraction * len(ids))), spare, most)
    if count < 1:
        return Moves.none()
    return Moves.between(_top(ids, ledger.log_loss_ratio()[ids], count, rng), giver, receiver)


def _receivers(config: RedistributionConfig, shards: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """To which shard each shard gives: the next one, or a random arrangement in which none keeps its own."""
    ring = (np.arange(shards) + 1) % shards
    if config.topology == "ring":
        return ring
    order = rng.permutation(shards)
    receivers = np.empty(shards, np.int64)
    receivers[order] = order[ring]
    return receivers


def _exchange(
    ledger: ShardLedger, rng: np.random.Generator, config: RedistributionConfig, score: NDArray, eligible: NDArray
) -> Moves:
    """Every shard gives as many of its highest-scored eligible samples as every other, so sizes stay as they are."""
    if ledger.num_shards < 2:
        return Moves.none()
    candidates = [ids[eligible[ids]] for ids in map(ledger.ids, range(ledger.num_shards))]
    wanted = max(1, round(config.fraction * int(ledger.sizes().min())))
    count = min(wanted, *(len(c) for c in candidates))
    receivers = _receivers(config, ledger.num_shards, rng)
    return Moves.join(
        [
            Moves.between(_top(ids, score[ids], count, rng), shard, int(receivers[shard]))
            for shard, ids in enumerate(candidates)
        ]
    )


def memorized(
    ledger: ShardLedger, reports: Sequence[TrainReport], rng: np.random.Generator, config: RedistributionConfig
) -> Moves:
    """MSR: each shard passes on its most often skipped samples (by skip rate since they came, at least one skip)."""
    return _exchange(ledger, rng, config, ledger.skip_rate(), ledger.recent_skips > 0)


def high_loss(
    ledger: ShardLedger, reports: Sequence[TrainReport], rng: np.random.Generator, config: RedistributionConfig
) -> Moves:
    """Each shard passes on its worst-fitted samples (highest mean log-ratio)."""
    return _exchange(ledger, rng, config, ledger.log_loss_ratio(), ledger.draws > 0)


def random(
    ledger: ShardLedger, reports: Sequence[TrainReport], rng: np.random.Generator, config: RedistributionConfig
) -> Moves:
    """Each shard passes on samples chosen by chance: the shipped mixing, and the control of the two others."""
    return _exchange(ledger, rng, config, rng.random(len(ledger)), ledger.visited())


QUARANTINE = "quarantine"
RINGS = ("memorized", "high-loss", "random")


def parse_policy(text: str, options: str = "") -> tuple[list[Policy], bool]:
    """'balance+quarantine' -> ([balance], True), plug-ins made with `options`.

    Raises `ConfigError` for two ring moves, and as `ret_fl.loading.load`.
    """
    policies = [plugin.call for plugin in load(POLICIES, text, options)]
    every = names(POLICIES, text)
    rings = [name for name in every if name in RINGS]
    if len(rings) > 1:
        raise ConfigError(
            f"redistribution.policy: {' and '.join(rings)} both exchange samples round the ring: take one"
        )
    return policies, QUARANTINE in every


def is_due(config: RunConfig, round: int) -> bool:
    """Whether samples may move after this round.

    Where proxies are averaged every n-th round only, samples move in between, while proxies still differ (the
    paper's swap between aggregations); where every round averages, or none does, after any.
    `redistribution.period` skips opportunities. After the last round nothing moves: nobody would train on it.
    """
    every = config.aggregate_every
    between = round < config.num_server_rounds and (every <= 1 or round % every != 0)
    opportunity = round if every <= 1 else round - round // every
    return between and opportunity % config.redistribution.period == 0


def propose(
    policies: Sequence[Policy],
    ledger: ShardLedger,
    reports: Sequence[TrainReport],
    rng: np.random.Generator,
    config: RedistributionConfig,
) -> Moves:
    """Moves of several policies in turn; a sample claimed by an earlier one stays claimed.

    Together they could take the last visited sample of a small shard; such a shard then gives nothing. Under
    `redistribution.control` chance takes the place of the policies' choice. Raises `LedgerError` for moves that the
    ledger cannot take.
    """
    parts: list[Moves] = []
    for policy in policies:
        taken = Moves.join(parts).ids
        proposed = _sound(policy, ledger, policy(ledger, reports, rng, config))
        if config.control != "off":
            proposed = _by_chance(proposed, ledger, rng, between_any=config.control == "all")
        parts.append(proposed.without(taken))
    moves = Moves.join(parts)
    while True:
        after = ledger.shard.copy()
        after[moves.ids] = moves.target
        emptied = ~np.isin(moves.source, after[ledger.visited()])
        if not emptied.any():
            return moves
        moves = moves.without(moves.ids[emptied])


def _sound(policy: Policy, ledger: ShardLedger, proposed: object) -> Moves:
    """What a policy gave back, if it is moves that the ledger can take. Raises `LedgerError` with the policy's name."""
    name = getattr(policy, "__qualname__", type(policy).__qualname__)
    if not isinstance(proposed, Moves):
        raise LedgerError(f"redistribution.policy: {name} must give Moves, not {type(proposed).__name__}")
    try:
        ledger.check_moves(proposed)
    except LedgerError as error:
        raise LedgerError(f"redistribution.policy: {name}: {error}") from None
    return proposed


def _by_chance(moves: Moves, ledger: ShardLedger, rng: np.random.Generator, *, between_any: bool) -> Moves:
    """As many moves of random samples: along the proposed ways, or from anywhere to any other shard.

    Dropped duplicates do not count: chance chooses among samples that are visited, all of them where there are fewer.
    """
    visited = ledger.visited()
    if between_any and ledger.num_shards > 1:
        every = np.flatnonzero(visited)
        ids = rng.choice(every, min(len(moves), len(every)), replace=False).astype(np.int64)
        source = ledger.shard[ids]
        step = rng.integers(1, ledger.num_shards, len(ids))
        return Moves(ids, source, ((source + step) % ledger.num_shards).astype(np.int32))
    parts = []
    for shard in np.unique(moves.source):
        ids = ledger.ids(int(shard))
        ids = ids[visited[ids]]
        own = np.flatnonzero(moves.source == shard)[: len(ids)]
        parts.append(Moves(rng.choice(ids, len(own), replace=False), moves.source[own], moves.target[own]))
    return Moves.join(parts)


def random_of_equal_number(inside: NDArray[np.bool_], visited: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """The control of quarantine: as many of the `visited` samples as `inside` has, always the same ones first."""
    chosen, order = np.zeros_like(inside), np.random.default_rng(seed).permutation(len(inside))
    chosen[order[visited[order]][: inside.sum()]] = True
    return chosen


def quarantined(ledger: ShardLedger, config: QuarantineConfig) -> NDArray[np.bool_]:
    """Which samples are memorized enough to be visited less: bool [N].

    r is a sample's mean log-ratio or, beside its usual one, how far that has fallen. With `share` > 0 the lowest r,
    so many of the samples known; else those whose robust z-score, (r - median) / (1.4826 MAD), is below `z`. A
    duplicated fifth of the data moves the median of all by a third of a standard deviation and widens the MAD as much,
    so `z` means a little less then (-1.5 takes 7 % of a bell curve); beside the usual, median and MAD are those of the
    samples outside (sigma clipping).
    """
    own = config.beside == "usual"
    ratio = ledger.log_loss_ratio() - (ledger.usual if own else 0)
    known = (ledger.draws >= config.min_draws) & ~np.isnan(ratio)
    inside = np.zeros(len(ledger), bool)
    if not known.any():
        return inside
    if config.share > 0:
        values = np.sort(ratio[known])
        return known & (ratio < values[round(config.share * (len(values) - 1))])
    while True:
        rest = ratio[known & ~inside]
        median = np.median(rest)
        mad = 1.4826 * np.median(np.abs(rest - median))
        found = inside | (known & (ratio < median + config.z * mad)) if mad > 0 else inside
        if not own or (found == inside).all():
            return found
        inside = found
