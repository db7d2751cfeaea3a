"""What the tests share: one torch thread, tiny settings, and federations in one process."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result as CliResult
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import Result, Strategy
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from clients.app import app as client_app
from ret_fl.cli import app
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.clusters import find_clusters
from ret_fl.data.sources import deal, load_splits
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.proxymodel import ProxyModel, open_model, trained_parameters
from ret_fl.dispatch import Dispatcher
from ret_fl.ledger import ShardLedger
from ret_fl.packing import State, pack_state, unpack_state
from ret_fl.rounds import RoundSummary
from ret_fl.rundir import RunDir
from ret_fl.strategy import RedistributeEnsemble
from ret_fl.trainer import ProxyTrainer, state_of
from simulations.inline import InlineGrid, run_inline

ROOT = Path(__file__).resolve().parent.parent

TINY: dict[str, Scalar] = {
    "data.limit": 24,
    "shards": 2,
    "num-server-rounds": 2,
    "local-epochs": 1,
    "batch-size": 8,
    "optimizer.lr": 0.012,
    "optimizer.warmup-steps": 3,
    "samples": 0,
    "evaluate-every": 0,
    "agc.mode": "agc",
    "agc.mem-ratio": 1.5,
    "agc.decay": 0.8,
    "agc.bins": 0,
    "agc.bias-correct": False,
    "device": "cpu",
    "threads": 1,
    "wait-seconds": 0.1,
}
"""Digits, a few steps a round: a run takes about a second."""

MEMORIZED: dict[str, Scalar] = TINY | {
    "data.canaries": 2,
    "data.canary-repeats": 6,
    "num-server-rounds": 3,
    "local-epochs": 4,
    "samples": 12,
    "sample-steps": 4,
    "seed": 5,
    "keep-checkpoints": 9,
    "agc.t-max": 1000,
    "name": "audited",
}
"""Canaries among 34 images, every checkpoint kept, an audit at the end."""

PLAIN: dict[str, Scalar] = {
    "agc.mode": "off",
    "redistribution.policy": "none",
    "data.duplicates": "keep",
    "optimizer.schedule": "constant",
}
"""No mitigation at all: what is left is federated averaging."""

Client = Callable[[Message, Context], Message]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits, shuffled: float32 [1797, 1, 8, 8] in [0, 1], and their classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return torch.as_tensor(data.images[order], dtype=torch.float32)[:, None] / 16, torch.as_tensor(data.target[order])


@pytest.fixture(scope="session")
def stored(digits: tuple[torch.Tensor, torch.Tensor]) -> Callable[..., SampleStore]:
    """stored(first, count, labels=False): digits first..first+count-1 as a store."""

    def make(first: int, count: int, labels: bool = False) -> SampleStore:
        images, classes = (part[first : first + count] for part in digits)
        pixels = (images * 255).round().to(torch.uint8)
        return SampleStore(pixels, classes, 10) if labels else SampleStore(pixels)

    return make


@pytest.fixture(scope="session")
def real(digits: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digits as an audit takes them: 200 to train on, as many for reference, and the others held out."""
    images = digits[0]
    return images[:200], images[200:400], images[400:]


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """caplog that hears Flower's logger too, which does not propagate."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and replies are looked for at once."""
    monkeypatch.setattr("ret_fl.dispatch.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("ret_fl.dispatch.PULL_SECONDS", 0.01)
    monkeypatch.setattr("ret_fl.roster.POLL_SECONDS", 0.01)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunConfig]:
    """Tiny settings with changes on top; clients keep their state in the test's own folder."""

    def make(*changes: Mapping[str, Scalar]) -> RunConfig:
        flat = TINY | {"state-dir": str(tmp_path / "proxies")}
        for change in changes:
            flat |= change
        return RunConfig.from_flat(flat)

    return make


def fresh_weights(config: RunConfig) -> State:
    """The weights a run of this config starts from."""
    start = trained_parameters(opened_model(config).unet)
    return state_of(start, start if config.ema.decay else None)


def opened_model(config: RunConfig) -> ProxyModel:
    """The model a run of this config trains, at its start."""
    train = load_splits(config.data).train
    return open_model(config, train.image_shape, train.num_classes)


def make_trainer(config: RunConfig, device: str = "cpu") -> ProxyTrainer:
    train = load_splits(config.data).train
    return ProxyTrainer(config, train.image_shape, train.num_classes, torch.device(device))


@dataclass
class Federation:
    """A strategy on an in-process grid, and what its rounds left behind."""

    config: RunConfig
    grid: InlineGrid
    strategy: RedistributeEnsemble
    start: State
    rounds: list[RoundSummary] = field(default_factory=list)
    owners: list[list[int]] = field(default_factory=list)
    result: Result | None = None

    def run(self, rounds: int | None = None) -> State:
        """Greet, train, and return the final weights."""
        config, roster = self.config, self.strategy.roster
        roster.greet(Dispatcher(self.grid, roster, config.retries, config.patience))
        rounds = rounds or config.num_server_rounds
        self.result = self.strategy.start(
            self.grid, pack_state(self.start), rounds, timeout=config.round_timeout, evaluate_fn=self._note
        )
        return unpack_state(self.result.arrays)

    def _note(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round and self.strategy.last is not None:
            self.rounds.append(self.strategy.last)
            self.owners.append(self.strategy.ledger.shard.tolist())
        return None


def make_federation(
    config: RunConfig, client: Client = client_app, nodes: int | None = None, base: Strategy | None = None
) -> Federation:
    """A federation of real clients, or of `client` in their place."""
    data = load_splits(config.data)
    train = data.train
    strategy = RedistributeEnsemble(
        ShardLedger.start(deal(config, data), config.shards),
        config,
        fingerprint=train.fingerprint,
        clusters=find_clusters(train, config.data),
        run_key="test",
        base=base,
        frozen=opened_model(config).frozen,
    )
    grid = InlineGrid(client, nodes or config.shards, config.to_flat())  # type: ignore[arg-type]
    return Federation(config, grid, strategy, fresh_weights(config))


@pytest.fixture
def federate() -> Callable[..., Federation]:
    return make_federation


def run_server(config: RunConfig, out: Path, client: Client = client_app, *, resume: bool = False) -> RunDir:
    """The whole ServerApp in this process, into `out`, as `ret-fl run --engine inline` does it."""
    import server.app

    flat = config.to_flat() | {"out": str(out), "state-dir": str(out / "proxies")}
    if resume:
        flat |= {"resume": str(out)}
    run_inline(server.app.app, client, flat, config.shards)  # type: ignore[arg-type]
    return RunDir(out)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, audited at its end."""
    return run_server(RunConfig.from_flat(MEMORIZED), tmp_path_factory.mktemp("audited") / "run").path


def copied_app(folder: Path) -> Path:
    """The app as `flwr run` and `--app` take it, in a folder of its own, where it may be edited."""
    for part in ("ret_fl", "server", "clients", "simulations"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def ret_fl(*arguments: object) -> CliResult:
    """The command, in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])
