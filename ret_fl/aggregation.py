"""From `aggregation.*` and `dp.*` to the Flower Strategy that makes one model of the proxies, and its state.

A robust strategy (median, Krum) is given raw and EMA weights. A server optimizer takes its step on the raw weights
alone (ret_fl/serveroptimizer.py), after the noise of differential privacy where there is any.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.common.logger import log
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase
from flwr.serverapp.strategy.fedopt import FedOpt
from numpy.typing import NDArray

from ret_fl.config import ConfigError, RunConfig
from ret_fl.loading import parse_options
from ret_fl.privacy import with_noise
from ret_fl.serveroptimizer import ServerOptimizer

BaseState = dict[str, NDArray]
"""What a strategy keeps from round to round, by name."""

OPTIMIZERS: Mapping[str, type[FedOpt] | type[FedAvgM]] = {
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
}
STRATEGIES: Mapping[str, type[FedAvg]] = {
    "fedavg": FedAvg,
    **OPTIMIZERS,
    "fedmedian": FedMedian,
    "fedtrimmedavg": FedTrimmedAvg,
    "krum": Krum,
    "multikrum": MultiKrum,
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


def make_base(config: RunConfig) -> Strategy:
    """The strategy a run's proxies go through. Raises `ConfigError` naming the setting to change."""
    name, options = config.aggregation.strategy, parse_options("aggregation.options", config.aggregation.options)
    if name not in STRATEGIES:
        return _own(name, options)
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


def _completed(name: str, options: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The options with our defaults. Raises `ConfigError` for one that the class has not beyond those of FedAvg."""
    shared = inspect.signature(FedAvg).parameters
    taken = {k: p for k, p in inspect.signature(STRATEGIES[name]).parameters.items() if k not in (*shared, *UNUSED)}
    if odd := [option for option in options if option not in taken]:
        takes = f"takes {', '.join(taken) or 'none'}"
        raise ConfigError(f"aggregation.options: {', '.join(odd)} unknown: aggregation.strategy={name} {takes}")
    for option, value in options.items():
        whole = isinstance(taken[option].default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"aggregation.options: {option} = {value!r} must be a {'whole ' if whole else ''}number")
    completed = {**DEFAULTS.get(name, {}), **options}
    if name == "multikrum":
        most = _fewest(config) - completed["num_malicious_nodes"] - 2
        completed.setdefault("num_nodes_to_select", max(1, most))
    return completed


def _own(name: str, options: Mapping[str, Any]) -> Strategy:
    """What the callable of a dotted path makes."""
    path = f"aggregation.strategy={name}"
    if ":" not in name:
        raise ConfigError(f"{path}: unknown; one of {', '.join(STRATEGIES)}, or pkg.mod:Factory")
    try:
        factory: Callable[..., Any] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be found where the server runs: {error}") from None
    if not callable(factory):
        raise ConfigError(f"{path} is a {type(factory).__name__}, not a callable that returns a Flower Strategy")
    parameters = inspect.signature(factory).parameters
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"aggregation.options: {error}; {path} takes {', '.join(parameters) or 'none'}") from None
    strategy = factory(**options)
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"{path} returned a {type(strategy).__name__}, not a Flower Strategy")
    return strategy


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
        if beta <= 0:
            raise ConfigError("aggregation.options: beta must be above 0: fedtrimmedavg would trim nothing")
        needed, why = math.ceil(1 / beta), f"to trim one at each end with beta={beta:g}"
    elif isinstance(strategy, MultiKrum | Krum):
        malicious = strategy.num_malicious_nodes
        if malicious < 0:
            raise ConfigError(f"aggregation.options: num_malicious_nodes must not be negative (got {malicious})")
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
            {key.removeprefix(which): value for key, value in state.items() if key.startswith(which)} or None
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
