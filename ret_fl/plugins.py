"""Where own code goes without a fork: what is called at each plug-in point, with what, and what it gives back.

A plug-in is a function with the parameters of its point, by name and in order, or a class whose instances are called
with them. A class may hold a pydantic model `Settings`: it is then made with one, filled from the `options` of its
section. A setting names plug-ins: those of this table, those that installed packages register under the entry-point
group, or any that can be imported, as `package.module:name`. docs/extending.md has examples, ret_fl/loading.py the
lookup.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from flwr.serverapp.strategy import Strategy
    from numpy.typing import NDArray
    from torch import Tensor

    from ret_fl.audit.inputs import Evidence
    from ret_fl.config import AgcConfig, PartitionConfig, RedistributionConfig, TaaConfig
    from ret_fl.ledger import Moves, ShardLedger
    from ret_fl.mitigation.agc import Seen
    from ret_fl.protocol import TrainReport


class ShardPolicy(Protocol):
    """Deals samples to shards, on the server, before the first round."""

    def __call__(
        self,
        num_samples: int,
        labels: NDArray[np.int64] | None,
        shards: int,
        config: PartitionConfig,
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """The shard of each sample: int [num_samples], each in [0, shards), no shard empty. labels: int64, or None."""


class LossGate(Protocol):
    """Says which samples of a batch give gradient, on the client. It is made anew for every order (shard and round)."""

    def __call__(self, loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
        """What each sample weighs: bool [B], or float [B] in [0, 1]. One of weight 0 counts as skipped.

        loss: float32 [B], without gradient; t: int64 [B], its timesteps; all on the device of training.
        """


class Augmenter(Protocol):
    """Changes images before they train, on the client, where TAA asks for it."""

    def __call__(self, images: Tensor, strength: Tensor, config: TaaConfig) -> Tensor:
        """Changed images, float [B, C, H, W] in [-1, 1] as given. strength: float [B] in [0, 1]; 0 leaves as it is."""


class RedistributionPolicy(Protocol):
    """Proposes moves of samples between shards, on the server, after a round."""

    def __call__(
        self,
        ledger: ShardLedger,
        reports: Sequence[TrainReport],
        rng: np.random.Generator,
        config: RedistributionConfig,
    ) -> Moves:
        """Moves for the ledger, which the caller applies. reports: the sound ones of the round. It only reads."""


class Auditor(Protocol):
    """Measures something more of a finished model."""

    def __call__(self, evidence: Evidence) -> Mapping[str, float]:
        """Numbers by name, for audit.json and the report."""


class StrategyFactory(Protocol):
    """Makes what averages the proxies: a Flower Strategy's class, or a function annotated to return one."""

    def __call__(self, **options: Any) -> Strategy:
        """Called with aggregation.options, on the server, before the first round."""


@dataclass(frozen=True)
class Point:
    """A plug-in point.

    kind: what a plug-in of it is called. group: of entry points. setting: names the plug-in, or several joined by '+'.
    side: where it is called. built_in: name -> 'module:name' of those that come along. words: further values of the
    setting that call nothing.
    """

    kind: str
    group: str
    setting: str
    protocol: type
    side: str
    built_in: Mapping[str, str]
    words: Mapping[str, str] = field(default_factory=dict)
    several: bool = False

    @property
    def options(self) -> str:
        """The setting with the plug-ins' own settings."""
        return self.setting.partition(".")[0] + ".options"

    @property
    def parameters(self) -> list[str]:
        """What a plug-in is called with."""
        return list(inspect.signature(self.protocol.__call__).parameters)[1:]

    def by_name(self, text: str) -> str:
        """A value of the setting with every built-in by its name, where it gives the path of one."""
        known = {path: name for name, path in self.built_in.items()}
        parts = text.split("+") if self.several else [text]
        return "+".join(known.get(part.strip(), part) for part in parts)


def _own(module: str, names: Mapping[str, str]) -> dict[str, str]:
    return {name: f"ret_fl.{module}:{attribute}" for name, attribute in names.items()}


SHARD_POLICIES = Point(
    "shard policy",
    "ret_fl.shard_policies",
    "partition.scheme",
    ShardPolicy,
    "server",
    _own(
        "data.partition",
        {"iid": "iid", "shuffled": "shuffled", "class": "by_class", "dirichlet": "dirichlet", "file": "by_file"},
    ),
)
GATES = Point(
    "gate",
    "ret_fl.gates",
    "agc.mode",
    LossGate,
    "client",
    _own("mitigation.agc", {"off": "off", "agc": "agc", "own": "own", "sample": "Sample", "random": "random"}),
)
AUGMENTERS = Point(
    "augmenter",
    "ret_fl.augmenters",
    "taa.policy",
    Augmenter,
    "client",
    _own("mitigation.taa", {"glyph": "glyph", "photo": "photo"}),
    words={"auto": "Glyph or photo, as the data's source says."},
)
POLICIES = Point(
    "policy",
    "ret_fl.policies",
    "redistribution.policy",
    RedistributionPolicy,
    "server",
    _own(
        "redistribution",
        {"balance": "balance", "memorized": "memorized", "high-loss": "high_loss", "random": "random"},
    ),
    words={
        "quarantine": "Memorized samples are visited less (quarantine.*); nothing moves.",
        "none": "Nothing moves.",
    },
    several=True,
)
AUDITORS = Point(
    "auditor",
    "ret_fl.auditors",
    "audit.auditors",
    Auditor,
    "audit",
    {**_own("audit.variety", {"variety": "variety"}), **_own("audit.swapped", {"swapped": "swapped"})},
    words={"none": "Only the audit's own numbers."},
    several=True,
)
POINTS = (SHARD_POLICIES, GATES, AUGMENTERS, POLICIES, AUDITORS)
FLOWERS = (
    "FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"
)  # fmt: skip
AGGREGATION = Point(
    "strategy",
    "ret_fl.strategies",
    "aggregation.strategy",
    StrategyFactory,
    "server",
    {name.lower(): f"flwr.serverapp.strategy:{name}" for name in FLOWERS},
)
"""Not one of POINTS: what is named makes a Strategy and is not called itself (ret_fl/aggregation.py)."""
