"""`aggregation.*`: Flower's strategies underneath ours do what their papers say, and are refused where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import PLAIN, Federation, run_server
from federations import Recorder, assert_equal_states, furthest, spoiling
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.serverapp.strategy import FedAvg, FedMedian
from numpy.typing import NDArray
from outcomes import Outcome, assert_same_outcome, killed_at, uninterrupted

from clients.app import app as client_app
from ret_fl.aggregation import base_state, make_base
from ret_fl.averaging import needs_the_mean_only
from ret_fl.checkpoint import load_latest
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.loading import foreign_plugins
from ret_fl.packing import State
from ret_fl.protocol import ARRAYS

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]

FIVE: Mapping[str, Scalar] = {"shards": 5, "quorum": 1.0, "data.limit": 27, "num-server-rounds": 2}


def settings(strategy: str, options: str = "") -> Mapping[str, Scalar]:
    return {"aggregation.strategy": strategy, "aggregation.options": options}


# --- what comes out ---------------------------------------------------------------------------------------------

Replies = list[tuple[int, State]]
Oracle = Callable[[int, State, Replies], State]
"""Round (1, 2), weights before it, and the shards' samples and weights -> weights after it."""


def stacked(replies: Replies, name: str) -> NDArray[np.float64]:
    return np.stack([state[name] for _, state in replies]).astype(float)


def mean(round: int, before: State, replies: Replies) -> State:
    n = np.array([samples for samples, _ in replies], float)
    return {k: np.tensordot(n / n.sum(), stacked(replies, k), 1) for k in before}


def median(round: int, before: State, replies: Replies) -> State:
    return {k: np.sort(stacked(replies, k), axis=0)[2] for k in before}


def trimmed(round: int, before: State, replies: Replies) -> State:
    return {k: np.sort(stacked(replies, k), axis=0)[1:-1].mean(axis=0) for k in before}


def by_krum(chosen: int) -> Oracle:
    """Blanchard et al. 2017 with one malicious client of five: the nearest two of the others are what counts."""

    def oracle(round: int, before: State, replies: Replies) -> State:
        flat = np.stack([np.concatenate([state[k].ravel() for k in sorted(before)]) for _, state in replies])
        between = np.square(flat[:, None].astype(float) - flat[None]).sum(axis=2)
        score = np.sort(between, axis=1)[:, 1:3].sum(axis=1)
        return mean(round, before, [replies[i] for i in np.argsort(score)[:chosen]])

    return oracle


class Optimizer:
    """Reddi et al. 2021, algorithm 2, with Kingma and Ba's bias correction for Adam as Flower has it."""

    def __init__(self, kind: str, eta: float, tau: float = 1e-3) -> None:
        self.kind, self.eta, self.tau = kind, eta, tau
        self.m: State = {}
        self.v: State = {}

    def __call__(self, round: int, before: State, replies: Replies) -> State:
        after = mean(round, before, replies)
        for k in [k for k in before if k.startswith("raw.")]:
            after[k] = before[k] + self.step(round, k, after[k] - before[k])
        return after

    def step(self, round: int, k: str, delta: NDArray) -> NDArray:
        zero = np.zeros_like(delta)
        if self.kind == "momentum":
            self.m[k] = 0.9 * self.m.get(k, zero) + delta
            return self.eta * self.m[k]
        beta = 0.0 if self.kind == "adagrad" else 0.9
        self.m[k] = beta * self.m.get(k, zero) + (1 - beta) * delta
        v, square = self.v.get(k, zero), delta**2
        self.v[k] = {
            "adagrad": v + square,
            "adam": 0.99 * v + 0.01 * square,
            "yogi": v - 0.01 * square * np.sign(v - square),
        }[self.kind]
        corrected = np.sqrt(1 - 0.99 ** (round + 1)) / (1 - 0.9 ** (round + 1)) if self.kind == "adam" else 1.0
        return self.eta * corrected * self.m[k] / (np.sqrt(self.v[k]) + self.tau)


CASES: dict[str, tuple[str, Oracle]] = {
    "fedavg": ("", mean),
    "fedmedian": ("", median),
    "fedtrimmedavg": ("beta = 0.2", trimmed),
    "krum": ("", by_krum(1)),
    "multikrum": ("num_nodes_to_select = 2", by_krum(2)),
    "fedavgm": ("server_learning_rate = 0.5", Optimizer("momentum", 0.5)),
    "fedadam": ("eta = 0.01", Optimizer("adam", 0.01)),
    "fedyogi": ("eta = 0.01, tau = 0.01", Optimizer("yogi", 0.01, 0.01)),
    "fedadagrad": ("eta = 0.01", Optimizer("adagrad", 0.01)),
}


@pytest.mark.parametrize("name", CASES)
def test_two_rounds_come_to_what_the_paper_says(tiny: Tiny, federate: Federate, name: str) -> None:
    options, oracle = CASES[name]
    config, seen = tiny(PLAIN, FIVE, settings(name, options)), Recorder()
    fed = federate(config, seen, base=make_base(config))
    final = fed.run()
    expected = fed.start
    for number in (1, 2):
        replies = [(r.num_examples, state) for r, state in seen.replies if r.round == number and state is not None]
        assert len(replies) == 5
        expected = oracle(number, expected, replies)
    assert furthest(final, fed.start) > 1e-3
    assert furthest(final, expected) < 1e-5  # float32, times eta / tau
    assert all(value.dtype == np.float32 for value in final.values())


def test_server_optimizers_take_the_mean_and_robust_strategies_every_reply(tiny: Tiny) -> None:
    takes_mean = {name: needs_the_mean_only(make_base(tiny(FIVE, settings(name)))) for name in CASES}
    assert {name for name, enough in takes_mean.items() if enough} == {
        "fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"
    }  # fmt: skip


# --- who survives a client that sends garbage --------------------------------------------------------------------


def scaled(request: Message, reply: Message) -> None:
    """Weights a thousand times too large: finite and of the right shape, so that nothing refuses them."""
    told = reply.content[ARRAYS]
    reply.content[ARRAYS] = ArrayRecord({k: Array((1000 * v.numpy()).astype(np.float32)) for k, v in told.items()})


@pytest.fixture(scope="module")
def honest() -> dict[str, State]:
    return {}


@pytest.mark.parametrize("name", ["fedavg", "fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_only_robust_strategies_survive_scaled_garbage(
    tiny: Tiny, federate: Federate, name: str, honest: dict[str, State]
) -> None:
    """How far the model lies from that of honest clients, in units of how far those trained it."""
    clean, spoilt = tiny(PLAIN, FIVE), tiny(PLAIN, FIVE, settings(name))
    if not honest:
        fed = federate(clean)
        honest |= {"start": fed.start, "final": fed.run()}
    final = federate(spoilt, spoiling(3, scaled, rounds=(1, 2)), base=make_base(spoilt)).run()
    trained, off = furthest(honest["final"], honest["start"]), furthest(final, honest["final"])
    assert (off > 100 * trained) if name == "fedavg" else (off < 2 * trained)


# --- what is refused, before any training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "more", "said"),
    [
        ("krum", "", {"shards": 4}, r"aggregation.strategy=krum needs 5 replies .* shards=4"),
        ("krum", "num_malicious_nodes = 2", FIVE, r"needs 7 replies a round to outvote num_malicious_nodes=2"),
        ("krum", "", {"shards": 5, "quorum": 0.5}, r"quorum=0.5 may leave 3: raise shards or quorum"),
        ("krum", "num_malicious_nodes = 0", FIVE, "num_malicious_nodes = 0 must be finite and 1 or more"),
        ("multikrum", "num_nodes_to_select = 3", FIVE, r"num_nodes_to_select must be in 1\.\.2 .* got 3"),
        ("fedtrimmedavg", "", {"shards": 4, "quorum": 1}, r"needs 5 replies a round to trim one .* beta=0.2"),
        ("fedtrimmedavg", "beta = 0.5", FIVE, "beta = 0.5 must be finite and above 0 and below 0.5"),
        ("fedtrimmedavg", "beta = 0", FIVE, "beta = 0 must be finite and above 0"),
        ("fedadam", "eta = 0", {}, "eta = 0 must be finite and above 0"),
        ("fedadam", "tau = nan", {}, "tau = nan must be finite"),
        ("fedadam", "tau = 1" + 400 * "0", {}, "must be finite"),
        ("fedyogi", "beta-2 = 1.0", {}, r"beta_2 = 1.0 must be finite and in \[0, 1\)"),
        ("fedavgm", "server-momentum = -0.1", {}, r"server_momentum = -0.1 must be finite and in \[0, 1\)"),
        ("fedavgm", "server_learning_rate = inf", {}, "server_learning_rate = inf must be finite"),
        ("fedmedian", "", {"shards": 2, "quorum": 1}, "needs 3 replies a round so that two outvote one"),
        ("fedadam", "etta = 1.0", {}, r"etta unknown: .*fedadam takes eta, beta_1, beta_2, tau"),
        ("fedadam", "eta_l = 1.0", {}, "eta_l unknown"),
        ("fedadam", "fraction_train = 0.5", {}, "fraction_train unknown"),
        ("fedadam", "eta = 'fast'", {}, "eta = 'fast' must be a number"),
        ("krum", "num_malicious_nodes = 1.5", FIVE, "num_malicious_nodes = 1.5 must be a whole number"),
        ("fedavg", "eta = 1.0", {}, "aggregation.strategy=fedavg takes none"),
        ("fedadam", "eta: 1.0", {}, r"aggregation.options must be KEY = VALUE, .* \(got 'eta: 1.0'\)"),
        ("fedadamm", "", {}, r"aggregation.strategy: no strategy 'fedadamm'; take one of fedavg \| .* package.m"),
        ("no_such_module:Thing", "", {}, "'no_such_module:Thing' cannot be imported here: ModuleNotFoundError"),
        ("own_plugins.py:Thing", "", {}, "cannot be imported here"),
        ("../own_plugins:Thing", "", {}, "write package.module:name"),
        ("test_aggregation:NOT_CALLABLE", "", {}, "is a int that is neither a subclass"),
        ("test_aggregation:not_a_strategy", "", {}, "is a function that is neither .* nor a function annotated"),
        ("test_aggregation:unannotated", "", {}, "is a function that is neither"),
        ("test_aggregation:misread", "", {}, "its annotations cannot be read: NameError"),
        ("test_aggregation:lying", "", {}, "returned a str, not a Flower Strategy"),
        ("test_aggregation:failing", "", {}, r"cannot be made: KeyError: 'no luck' \(aggregation.options\)"),
        ("flwr.serverapp.strategy:Strategy", "", {}, "cannot be made: TypeError: Can't instantiate abstract class"),
        ("test_aggregation:halfway", "way = 1", {}, r"unexpected keyword argument 'way'; .*halfway takes share"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_setting(
    tiny: Tiny, strategy: str, options: str, more: Mapping[str, Scalar], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_base(tiny({"quorum": 0.5}, settings(strategy, options), more))


@pytest.mark.parametrize("path", ["os:system", "subprocess:run", "subprocess:Popen", "builtins:exec", "builtins:print"])
def test_no_setting_calls_what_makes_no_strategy(tiny: Tiny, tmp_path: Path, path: str) -> None:
    touched = tmp_path / "touched"
    for parameter in ("command", "args", "source"):
        with pytest.raises(ConfigError, match=rf"aggregation\.strategy={path} is a \w+ that is neither"):
            make_base(tiny(settings(path, f"{parameter} = 'touch {touched}', shell = true")))
        with pytest.raises(ConfigError, match="that is neither"):
            make_base(tiny(settings(path, f"{parameter} = 'touch {touched}'")))
    assert not touched.exists()


def test_flowers_warning_of_what_is_meant_is_not_given_and_others_are(
    tiny: Tiny, flower_log: pytest.LogCaptureFixture
) -> None:
    for name in ("fedavg", "fedadam", "test_aggregation:halfway", "test_aggregation:warning"):
        make_base(tiny(settings(name)))
    assert {record.getMessage() for record in flower_log.records} == {"a warning of its own"}
    FedAvg(fraction_evaluate=0.0)
    assert "fraction_evaluate is set to 0.0" in flower_log.text


def test_a_run_with_too_few_shards_trains_nothing(tiny: Tiny, tmp_path: Path) -> None:
    asked: list[str] = []

    def client(message: Message, context: Context) -> Message:
        asked.append(message.metadata.message_type)
        return client_app(message, context)

    with pytest.raises(ConfigError, match=r"aggregation\.strategy=krum needs 5 replies"):
        run_server(tiny(settings("krum")), tmp_path / "run", client)
    assert MessageType.TRAIN not in asked


# --- a strategy of one's own -------------------------------------------------------------------------------------

NOT_CALLABLE = 3


def not_a_strategy() -> str:
    raise AssertionError("it is called")


def unannotated():  # type: ignore[no-untyped-def]
    raise AssertionError("it is called")


def misread() -> Nowhere:  # type: ignore[name-defined]  # noqa: F821
    raise AssertionError("it is called")


def lying() -> FedAvg:
    return "fedavg"  # type: ignore[return-value]


def failing() -> FedAvg:
    raise KeyError("no luck")


def warning() -> FedAvg:
    logging.getLogger("flwr").warning("a warning of its own")
    return FedAvg()


class Halfway(FedAvg):
    """Goes part of the way to the mean, and counts its rounds."""

    def __init__(self, share: float) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.share, self.rounds, self.before = share, 0, ArrayRecord()

    def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
        self.before = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.rounds += 1
        both = {k: (self.before[k].numpy(), v.numpy()) for k, v in arrays.items()}
        return ArrayRecord({k: Array(old + self.share * (new - old)) for k, (old, new) in both.items()}), metrics


def halfway(share: float = 0.5) -> Halfway:
    return Halfway(share)


class Remembering(Halfway):
    def state_dict(self) -> dict[str, NDArray]:
        return {"rounds": np.array([self.rounds])}

    def load_state_dict(self, state: Mapping[str, NDArray]) -> None:
        self.rounds = int(state["rounds"][0])


def test_a_strategy_of_ones_own_is_named_by_its_path(tiny: Tiny, federate: Federate) -> None:
    config, seen = (
        tiny(PLAIN, settings("test_aggregation:halfway", "share = 0.25"), {"num-server-rounds": 1}),
        Recorder(),
    )
    fed = federate(config, seen, base=make_base(config))
    final = fed.run()
    whole = mean(1, fed.start, [(r.num_examples, state) for r, state in seen.replies if state])
    expected = {k: 0.75 * v + 0.25 * whole[k] for k, v in fed.start.items()}
    assert furthest(final, expected) < 1e-5


def test_a_path_of_flowers_own_is_its_name(tiny: Tiny) -> None:
    config = tiny(FIVE, settings("flwr.serverapp.strategy:FedMedian"))
    assert config.aggregation.strategy == "fedmedian" and foreign_plugins(config) == []
    assert isinstance(make_base(config), FedMedian)
    own = tiny(settings("test_aggregation:halfway", "share = 0.25"))
    assert foreign_plugins(own) == [
        "aggregation.strategy: test_aggregation:halfway (by its path, aggregation.options: share = 0.25)"
    ]


# --- across an interruption --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "kept"),
    [("fedadam", "eta = 0.01", {"m", "v"}), ("fedavgm", "", {"momentum"}),
     ("test_aggregation:Remembering", "share = 0.5", {"rounds"})],
)  # fmt: skip
def test_a_stateful_strategy_resumes_as_if_it_had_not_stopped(
    tiny: Tiny, tmp_path: Path, strategy: str, options: str, kept: set[str]
) -> None:
    config = tiny(settings(strategy, options), {"num-server-rounds": 3})
    killed_at(config, tmp_path / "run", 3, 1)
    stopped = load_latest(tmp_path / "run" / "checkpoints")
    assert (stopped.base, {key.partition(".")[0] for key in stopped.base_state}) == (strategy, kept)
    resumed = run_server(config, tmp_path / "run", resume=True)
    assert_same_outcome(Outcome.of(resumed), uninterrupted(config))
    last, whole = load_latest(resumed.checkpoints).base_state, uninterrupted(config).last.base_state
    assert last.keys() == whole.keys()
    assert all(np.array_equal(last[key], whole[key]) for key in last)


@pytest.mark.parametrize(("strategy", "options"), [("fedadam", "eta = 0.01"), ("fedavgm", "")])
def test_a_server_optimizer_goes_on_from_state_that_was_divided_otherwise(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, options: str
) -> None:
    config = tiny(settings(strategy, options), {"num-server-rounds": 3})
    with monkeypatch.context() as patch:
        patch.setattr("ret_fl.packing.PIECE_BYTES", 100_000)
        killed_at(config, tmp_path / "run", 3, 1)
    stopped = load_latest(tmp_path / "run" / "checkpoints")
    resumed = run_server(config, tmp_path / "run", resume=True)
    ended = load_latest(resumed.checkpoints)
    assert_equal_states(ended.weights, uninterrupted(config).last.weights)
    assert len(ended.base_state) < len(stopped.base_state)


def test_what_starts_anew_after_an_interruption_is_said(
    tiny: Tiny, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    config = tiny(settings("test_aggregation:halfway"))
    killed_at(config, tmp_path / "run", 2, 1)
    with flower_log.at_level(logging.WARNING):
        run_server(config, tmp_path / "run", resume=True)
    assert "Halfway has no state_dict, what it kept from round to round starts anew" in flower_log.text


def test_another_strategy_goes_on_from_the_weights(
    tiny: Tiny, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    from ret_fl.settings import change_run

    killed_at(tiny(settings("fedavgm")), tmp_path / "run", 2, 1)
    change_run(tmp_path / "run", {"aggregation.strategy": "fedadam", "aggregation.options": "eta = 0.01"})
    with flower_log.at_level(logging.WARNING):
        run = run_server(tiny(), tmp_path / "run", resume=True)
    assert "fedadam goes on from fedavgm's weights, with no state of its own" in flower_log.text
    assert len(run.rows()) == 2
    assert {key[:2] for key in load_latest(run.checkpoints).base_state} == {"m.", "v."}


def test_a_plain_mean_keeps_nothing(tiny: Tiny) -> None:
    assert base_state(make_base(tiny())) == {}
