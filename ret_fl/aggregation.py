"""From `aggregation.*` and `dp.*` to the Flower Strategy that makes one model of the proxies, and its state.

A robust strategy (median, Krum) is given raw and EMA weights. A server optimizer takes its step on the raw weights
alone (ret_fl/serveroptimizer.py), after the noise of differential privacy where there is any.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import WARNING, LogRecord, getLogger
from typing import Any, get_type_hints

import numpy as np
from flwr.common.logger import log
from flwr.serverapp.strategy import (
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray

from ret_fl.config import ConfigError, RunConfig
from ret_fl.loading import about, imported, parse_options, plain
from ret_fl.packing import repacked
from ret_fl.plugins import AGGREGATION, Point
from ret_fl.privacy import with_noise
from ret_fl.serveroptimizer import ServerOptimizer

BaseState = dict[str, NDArray]
"""What a strategy keeps from round to round, by name."""

STRATEGIES: Mapping[str, type[FedAvg]] = {
    name: pkgutil.resolve_name(path) for name, path in AGGREGATION.built_in.items()
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "fedavgm": {"server_momentum": 0.9},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1},
}
"""Where Flower's own default makes a plain mean of a strategy, or trusts every client."""
NOBODY_WAITS = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
UNUSED = ("eta_l",)
"""Parameters that Flower's classes take and do not read: the clients' rate is optimizer.lr."""
_POSITIVE: tuple[Callable[[float], bool], str] = (lambda x: x > 0, "above 0")
_BELOW_ONE: tuple[Callable[[float], bool], str] = (lambda x: 0 <= x < 1, "in [0, 1)")
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "eta": _POSITIVE,
    "tau": _POSITIVE,
    "server_learning_rate": _POSITIVE,
    "server_momentum": _BELOW_ONE,
    "beta_1": _BELOW_ONE,
    "beta_2": _BELOW_ONE,
    "beta": (lambda x: 0 < x < 0.5, "above 0 and below 0.5"),
    "num_malicious_nodes": (lambda x: x >= 1, "1 or more"),
}


def make_base(config: RunConfig) -> Strategy:
    """The strategy a run's proxies go through. Raises `ConfigError` naming the setting to change."""
    given = parse_options(AGGREGATION.options, config.aggregation.options)
    name, options = config.aggregation.strategy, {plain(key): value for key, value in given.items()}
    with _not_told_that_clients_evaluate_nothing():
        return _built_in(name, options, config) if name in STRATEGIES else _own(name, options)


@contextmanager
def _not_told_that_clients_evaluate_nothing() -> Iterator[None]:
    """Flower warns of fraction_evaluate=0 whenever a strategy is made; here it is meant."""

    def others(record: LogRecord) -> bool:
        return not record.getMessage().startswith("fraction_evaluate is set to 0.0")

    logger = getLogger("flwr")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _built_in(name: str, options: Mapping[str, Any], config: RunConfig) -> Strategy:
    made, options = STRATEGIES[name], _completed(name, options, config)
    try:
        strategy = made(**NOBODY_WAITS, **options)  # type: ignore[arg-type]
        _require_enough_replies(name, strategy, config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"aggregation.options for aggregation.strategy={name}: {error}") from None
    if isinstance(strategy, FedOpt | FedAvgM):
        return ServerOptimizer(with_noise(FedAvg(**NOBODY_WAITS), config), strategy)  # type: ignore[arg-type]
    return with_noise(strategy, config)


def _taken(name: str) -> dict[str, Any]:
    """Options of a strategy of Flower's, beyond those of FedAvg, with our defaults."""
    shared = inspect.signature(FedAvg).parameters
    parameters = inspect.signature(STRATEGIES[name]).parameters
    own = {k: p.default for k, p in parameters.items() if k not in (*shared, *UNUSED)}
    return own | dict(DEFAULTS.get(name, {}))


def _completed(name: str, options: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The options with our defaults. Raises `ConfigError` for one that the class has not, or that is out of range."""
    taken = _taken(name)
    if odd := [option for option in options if option not in taken]:
        takes = f"takes {', '.join(taken) or 'none'}"
        raise ConfigError(f"aggregation.options: {', '.join(odd)} unknown: aggregation.strategy={name} {takes}")
    for option, value in options.items():
        whole = isinstance(taken[option], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"aggregation.options: {option} = {value!r} must be a {'whole ' if whole else ''}number")
        fits, words = RANGES.get(option, (lambda x: True, ""))
        if not (abs(value) <= sys.float_info.max and fits(value)):  # NaN fits nothing
            raise ConfigError(
                f"aggregation.options: {option} = {value!r} must be finite and {words}".removesuffix(" and ")
            )
    completed = {**DEFAULTS.get(name, {}), **options}
    if name == "multikrum":
        most = _fewest(config) - completed["num_malicious_nodes"] - 2
        completed.setdefault("num_nodes_to_select", max(1, most))
    return completed


def _own(name: str, options: Mapping[str, Any]) -> Strategy:
    """What the factory of a dotted path, or of an installed package, makes."""
    path, factory = f"aggregation.strategy={name}", _factory(name)
    takes = _parameters(factory)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"aggregation.options: {error}; {path} takes {', '.join(takes) or 'none'}") from None
    try:
        strategy = factory(**options)
    except Exception as error:  # code of others, which may raise anything
        raise ConfigError(f"{path} cannot be made: {type(error).__name__}: {error} (aggregation.options)") from error
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"{path} returned a {type(strategy).__name__}, not a Flower Strategy")
    return strategy


def _factory(name: str) -> Callable[..., Any]:
    """The class or function of that name: nothing else is ever called, so that no setting runs `os:system`."""
    factory = imported(AGGREGATION, name)
    if isinstance(factory, type):
        made: object = factory
    elif inspect.isfunction(factory):
        try:
            made = get_type_hints(factory).get("return")
        except Exception as error:  # an annotation may be any text
            raise ConfigError(
                f"aggregation.strategy={name}: its annotations cannot be read: {type(error).__name__}: {error}"
            ) from error
    else:
        made = None
    if not (isinstance(made, type) and issubclass(made, Strategy)):
        raise ConfigError(
            f"aggregation.strategy={name} is a {type(factory).__name__} that is neither a subclass of "
            "flwr.serverapp.strategy.Strategy nor a function annotated to return one, as in def make() -> Strategy"
        )
    return factory


def _parameters(factory: Callable[..., Any]) -> dict[str, Any]:
    """What a factory of one's own takes, with defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}


def described(point: Point, name: str) -> tuple[str, list[str]]:
    """What a strategy is about, and its options in words. Raises `ConfigError` as `make_base`."""
    if name in STRATEGIES:
        target: Callable[..., Any] = STRATEGIES[name]
        options = _taken(name)
    else:
        target = _factory(name)
        options = _parameters(target)
    told = {k: "required" if v is inspect.Parameter.empty else f"= {v!r}" for k, v in options.items()}
    if name == "multikrum":
        told["num_nodes_to_select"] = "= replies - num_malicious_nodes - 2"
    return about(target), [f"{option} {default}" for option, default in told.items()]


def _fewest(config: RunConfig) -> int:
    """Replies a round goes on with at the least."""
    return math.ceil(config.quorum * config.shards)


def _require_enough_replies(name: str, strategy: FedAvg, config: RunConfig) -> None:
    """Raise `ConfigError` where a robust strategy could be outvoted in a round of as few replies as quorum allows."""
    fewest, needed, why = _fewest(config), 1, ""
    if isinstance(strategy, FedMedian):
        needed, why = 3, "so that two outvote one"
    elif isinstance(strategy, FedTrimmedAvg):
        beta = strategy.beta
        needed, why = math.ceil(1 / beta), f"to trim one at each end with beta={beta:g}"
    elif isinstance(strategy, MultiKrum | Krum):
        malicious = strategy.num_malicious_nodes
        needed, why = 2 * malicious + 3, f"to outvote num_malicious_nodes={malicious}"
    if fewest < needed:
        raise ConfigError(
            f"aggregation.strategy={name} needs {needed} replies a round {why}, and shards={config.shards} with "
            f"quorum={config.quorum:g} may leave {fewest}: raise "
            + ("shards, quorum or beta" if name == "fedtrimmedavg" else "shards or quorum")
        )
    if name == "multikrum":
        most, chosen = fewest - strategy.num_malicious_nodes - 2, strategy.num_nodes_to_select  # type: ignore[attr-defined]
        if not 1 <= chosen <= most:
            raise ConfigError(
                f"aggregation.options: num_nodes_to_select must be in 1..{most} (replies - num_malicious_nodes - 2; "
                f"got {chosen})"
            )


# What a base is told of the federation


class ShardGrid:
    """All that a base strategy's configure_train asks of a Grid: node IDs, one for each shard."""

    def __init__(self, shards: int) -> None:
        self.shards = shards

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.shards + 1))


def refuse_to_wait(base: Strategy, shards: int) -> None:
    """Flower's strategies wait without limit for their minimum of clients; here there are as many as shards.

    Raises `ValueError` for a minimum above that.
    """
    inner: Strategy | None = base
    while inner is not None:
        for name in ("min_available_nodes", "min_train_nodes"):
            if getattr(inner, name, 0) > shards:
                raise ValueError(
                    f"{type(inner).__name__}({name}={getattr(inner, name)}) would wait for ever with {shards} shards: "
                    f"give it {name}={shards} or less"
                )
        inner = getattr(inner, "strategy", None)


# What a base keeps from round to round


def base_state(base: Strategy) -> BaseState:
    """What it has learned so far: an optimizer's moments, an adaptive clipping norm; empty where it keeps nothing.

    A strategy of one's own has its say by `state_dict()`, of arrays by name.
    """
    if isinstance(base, ServerOptimizer):
        return base_state(base.strategy) | base_state(base.optimizer)
    if isinstance(base, DifferentialPrivacyAdaptiveBase):
        return {"clipping-norm": np.array([base.clipping_norm])}
    if isinstance(base, FedOpt):
        moments = {"m": base.m_t or {}, "v": base.v_t or {}}
        return {f"{which}.{key}": value for which, part in moments.items() for key, value in part.items()}
    if isinstance(base, FedAvgM):
        return {f"momentum.{i:06d}": value for i, value in enumerate(base.momentum_vector or [])}
    return dict(base.state_dict()) if hasattr(base, "state_dict") else {}


def restore_base(base: Strategy, state: Mapping[str, NDArray]) -> None:
    """Give a fresh strategy what `base_state` told of an earlier one of the same settings."""
    if isinstance(base, ServerOptimizer):
        restore_base(base.strategy, state)
        restore_base(base.optimizer, state)
    elif isinstance(base, DifferentialPrivacyAdaptiveBase):
        base.clipping_norm = float(state["clipping-norm"][0]) if "clipping-norm" in state else base.clipping_norm
    elif isinstance(base, FedOpt):
        base.m_t, base.v_t = (
            repacked({key.removeprefix(which): value for key, value in state.items() if key.startswith(which)}) or None
            for which in ("m.", "v.")
        )
    elif isinstance(base, FedAvgM):
        base.momentum_vector = [state[key] for key in sorted(state) if key.startswith("momentum.")] or None
    elif hasattr(base, "load_state_dict"):
        base.load_state_dict(dict(state))
    elif type(base) not in STRATEGIES.values() and not isinstance(base, DifferentialPrivacyFixedClippingBase):
        log(
            WARNING, "resuming: %s has no state_dict, what it kept from round to round starts anew", type(base).__name__
        )
