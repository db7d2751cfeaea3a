"""Every knob of a run, once: names, defaults, ranges and meanings.

Flower hands a run's settings over as a flat mapping with dotted, dashed keys
(``{"agc.mem-ratio": 1.25}``). `RunConfig.from_flat` turns it into a checked model and `RunConfig.to_flat`
turns it back; ``[tool.flwr.app.config]`` in pyproject.toml repeats the defaults because Flower refuses keys
that are not listed there (a test keeps both equal).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ret_fl.sections import (
    DISK_SOURCES,
    FINE_TUNING_RATE,
    LEARNING_RATES,
    WITHOUT_BANK,
    AgcConfig,
    AggregationConfig,
    AuditConfig,
    DataConfig,
    DiffusionConfig,
    DpConfig,
    EmaConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    QuarantineConfig,
    RedistributionConfig,
    Section,
    ServiceConfig,
    TaaConfig,
    TextConfig,
    dashed,
)

AFTER_NOISE = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
"""Strategies of aggregation.strategy that take a mean, to which dp.mode adds noise, and go on from there."""

Scalar = bool | int | float | str
"""What Flower can carry as one setting."""


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range. The message names it and says what is allowed."""


class RunConfig(Section):
    """All settings of a run. `RunConfig()` is the default run."""

    name: str = Field("ret", min_length=1, description="Goes into the name of the run's folder.")
    out: str = Field("", description="Folder of the results; empty: runs/<time>-<name>.")
    resume: str = Field("", description="Folder of an interrupted run to go on with.")
    seed: int = Field(0, ge=0, description="Seed of weights, batches, noise and moves.")
    num_server_rounds: int = Field(20, ge=1, description="R. A round is one phase of local training on every shard.")
    shards: int = Field(4, ge=1, description="K, the number of proxies; each trains on its own shard.")
    local_epochs: int = Field(10, ge=1, description="E, passes of a proxy over its shard in one round.")
    local_steps: int = Field(
        0, ge=0, description="Training steps of a proxy in one round, in place of local-epochs; 0: local-epochs counts."
    )
    batch_size: int = Field(32, ge=1, description="B, images a training step.")
    micro_batch: int = Field(
        0,
        ge=0,
        description="Images that go through the U-Net at once: a step adds up the gradients of several such parts of "
        "its batch. It changes memory and time, not the result. 0: the whole batch.",
    )
    aggregate_every: int = Field(
        1,
        ge=0,
        description="Average the proxies every n-th round; 2 is the paper's swap between aggregations. 0: never, they "
        "stay K models from the common start on, an ensemble (docs/method.md).",
    )
    ensemble: Literal["choose", "average"] = Field(
        "choose",
        description="With aggregate-every=0, how images are drawn at the end: each from one proxy, chosen by share of "
        "samples; or from the average of all K predictions at every denoising step.",
    )
    report: Literal["full", "tails"] = Field(
        "full", description="What a client tells of its samples: all of them, or only the two tails of its losses."
    )
    report_tail: float = Field(0.2, gt=0, le=0.5, description="Share of a shard in each reported tail.")
    samples: int = Field(256, ge=0, description="Images drawn from the final model; 0: none, and no copy rate.")
    sample_steps: int = Field(50, ge=1, description="DDIM steps a drawn image takes.")
    evaluate_every: int = Field(
        5,
        ge=0,
        description="Measure train and held-out loss of the averaged model every n rounds (with aggregate-every=0 the "
        "mean of the proxies'); 0: never.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many rounds back a run can be resumed from.")
    min_nodes: int = Field(1, ge=1, description="Clients needed in every round; more shards than clients take turns.")
    wait_seconds: float = Field(
        300, gt=0, description="How long to wait for min-nodes clients before stopping, to be resumed."
    )
    round_timeout: float = Field(
        43200, gt=0, description="Seconds after which a round gives up shards that are missing."
    )
    retries: int = Field(
        2, ge=0, description="How often a shard's order may go to another node in one round, when one fails it."
    )
    patience: float = Field(
        4,
        gt=1,
        description="An order is sent again after this many times the seconds such orders take on its node (and two "
        "minutes at least); what comes first counts.",
    )
    quorum: float = Field(0.5, gt=0, le=1, description="Share of shards whose reply must be sound, or the run stops.")
    device: str = Field(
        "auto", description="Device of the proxies: auto, cpu, cuda, mps. In simulation Flower picks each one's GPU."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 autocast where a GPU has it. fp16 is for older GPUs; it scales the loss."
    )
    compile: bool = Field(
        False, description="torch.compile the U-Net: about a minute once, then faster steps (on a GPU twice as fast)."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of server and clients; 0: one on the server, what the engine gives a client."
    )
    state_dir: str = Field(
        "", description="Where a client keeps its proxy between rounds; empty: ret-fl in the user's cache."
    )

    data: DataConfig = DataConfig.model_construct()
    service: ServiceConfig = ServiceConfig.model_construct()
    partition: PartitionConfig = PartitionConfig.model_construct()
    model: ModelConfig = ModelConfig.model_construct()
    text: TextConfig = TextConfig.model_construct()
    lora: LoraConfig = LoraConfig.model_construct()
    diffusion: DiffusionConfig = DiffusionConfig.model_construct()
    optimizer: OptimizerConfig = OptimizerConfig.model_construct()
    ema: EmaConfig = EmaConfig.model_construct()
    agc: AgcConfig = AgcConfig.model_construct()
    taa: TaaConfig = TaaConfig.model_construct()
    redistribution: RedistributionConfig = RedistributionConfig.model_construct()
    quarantine: QuarantineConfig = QuarantineConfig.model_construct()
    aggregation: AggregationConfig = AggregationConfig.model_construct()
    dp: DpConfig = DpConfig.model_construct()
    audit: AuditConfig = AuditConfig.model_construct()

    @model_validator(mode="after")
    def _with_a_learning_rate(self) -> RunConfig:
        if not self.optimizer.lr:
            # past the guard of a frozen model: a validator must return the very instance
            self.__dict__["optimizer"] = self.optimizer.model_copy(update={"lr": self.usual_rate})
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.agc.bins > self.diffusion.timesteps:
            raise ValueError(f"agc.bins ({self.agc.bins}) must not exceed diffusion.timesteps")
        if self.data.path and self.data.source not in DISK_SOURCES:
            raise ValueError(
                f"data.path is set but data.source={self.data.source} reads none: set data.source=image-folder, hf or "
                "cifar"
            )
        if self.data.held_out_path and self.data.source not in ("image-folder", "hf"):
            raise ValueError(
                f"data.held-out-path is set but data.source={self.data.source} reads none: set data.source="
                "image-folder or hf (cifar holds its test batches out)"
            )
        self._near_duplicates_fit()
        self._nothing_is_idle()
        if bool(self.service.certificate) != bool(self.service.key):
            raise ValueError("service.certificate and service.key belong together: set both or none")
        if self.service.insecure and (self.service.ca or self.service.key):
            raise ValueError("service.insecure speaks without TLS: unset it, or service.ca and service.key")
        if self.partition.path and self.partition.scheme != "file":
            raise ValueError("partition.path is set but not read: set partition.scheme=file")
        if not self.averages and self.aggregation.strategy != "fedavg":
            raise ValueError(
                f"aggregation.strategy={self.aggregation.strategy} is not used where nothing is averaged: set "
                "aggregate-every to 1 or more"
            )
        if self.lora.rank and not self.model.init_from:
            raise ValueError("lora.rank adapts a pretrained text-to-image model: name its folder in model.init-from")
        if self.ensemble != "choose" and self.averages:
            raise ValueError(
                f"ensemble={self.ensemble} draws from proxies that were kept apart: set aggregate-every=0 (got "
                f"{self.aggregate_every})"
            )
        if self.diffusion.beta_end < self.diffusion.beta_start:
            raise ValueError("diffusion.beta-end must not be below diffusion.beta-start")
        if self.agc.mode == "own" and self.report == "tails":
            raise ValueError(
                "agc.mode=own needs every sample's usual loss, report=tails tells those of the tails: set "
                "agc.mode=off or agc, or report=full"
            )
        if self.agc.warm_passes and self.agc.mode in WITHOUT_BANK:
            raise ValueError(
                f"agc.warm-passes={self.agc.warm_passes} fills the loss bank, which agc.mode={self.agc.mode} does not "
                "read (agc, own and plug-ins may): set agc.warm-passes=0"
            )
        if self.taa.mode != "off" and self.agc.mode in WITHOUT_BANK:
            raise ValueError(
                f"taa.mode={self.taa.mode} measures the distance to AGC's threshold, which agc.mode={self.agc.mode} "
                "has not: set agc.mode=agc or own, or taa.mode=off"
            )
        if self.private:
            self._require_what_dp_covers()
        return self

    @property
    def private(self) -> bool:
        """Whether weights leave a round only with the noise of differential privacy."""
        return self.dp.mode != "off"

    def _require_what_dp_covers(self) -> None:
        """Raise `ValueError` naming every setting by which something of a shard would get out beside its update."""
        needed = {
            "redistribution.policy=none (moves and quarantine let one shard's losses decide over another's samples)": (
                self.redistribution.policy == "none"
            ),
            "data.duplicates=keep (an image's visits would depend on its copies in other shards)": (
                self.data.duplicates == "keep"
            ),
            "partition.clusters=any (a sample's shard would depend on images of other shards)": (
                self.partition.clusters == "any"
            ),
            "agc.mode=off (the loss bank goes through the server)": self.agc.mode == "off",
            "quorum=1 (noise is made for the mean of all shards)": self.quorum == 1,
            "aggregate-every above 0 (proxies kept apart have no noise)": self.averages,
            "samples=0, or dp.audit=true (an audit shows training images, which epsilon does not cover)": (
                self.samples == 0 or self.dp.audit
            ),
            f"aggregation.strategy={' or '.join(AFTER_NOISE)} (got {self.aggregation.strategy}: what one shard can "
            "change there has no known bound)": self.aggregation.strategy in AFTER_NOISE,
        }
        missing = [setting for setting, fits in needed.items() if not fits]
        if missing:
            raise ValueError(f"dp.mode={self.dp.mode} needs {'; '.join(missing)}")
        if "adaptive" in self.dp.mode and 0 < self.dp.count_noise <= self.dp.noise_multiplier / 2:
            raise ValueError(
                f"dp.count-noise ({self.dp.count_noise:g}) must be above half of dp.noise-multiplier "
                f"({self.dp.noise_multiplier:g}), or 0 for as much as that"
            )

    @property
    def usual_rate(self) -> float:
        """The learning rate that optimizer.lr=0 means."""
        return FINE_TUNING_RATE if self.model.init_from else LEARNING_RATES[self.model.preset]

    @property
    def usual_rounds(self) -> int:
        """After how many rounds each sample's usual loss is known: `agc.usual-share` of them, at least one."""
        return max(1, round(self.agc.usual_share * self.num_server_rounds))

    @property
    def averages(self) -> bool:
        """Whether proxies are ever averaged; if not, the run ends with K models."""
        return self.aggregate_every > 0

    def _near_duplicates_fit(self) -> None:
        how, threshold = self.data.near_duplicates, self.data.near_threshold
        most = {"off": 0, "phash": 31, "cosine": 1}[how]
        if threshold > most:
            allowed = "set data.near-duplicates, which it is the threshold of" if how == "off" else f"at most {most}"
            raise ValueError(f"data.near-threshold={threshold:g} with data.near-duplicates={how}: {allowed}")
        if self.data.near_features and how != "cosine":
            raise ValueError(f"data.near-features is read by data.near-duplicates=cosine only (got {how})")
        if self.partition.clusters != "any" and self.partition.scheme not in ("iid", "shuffled"):
            raise ValueError(
                f"partition.clusters={self.partition.clusters} holds for the schemes 'iid' and 'shuffled' only: set it "
                f"to 'any' for {self.partition.scheme!r}"
            )

    def _nothing_is_idle(self) -> None:
        """Raise `ValueError` for a setting that somebody relies on and that would do nothing."""
        if self.optimizer.proximal_mu and not self.averages:
            raise ValueError(
                f"optimizer.proximal-mu={self.optimizer.proximal_mu:g} draws proxies to their average, and "
                "aggregate-every=0 makes none: set optimizer.proximal-mu=0, or aggregate-every to 1 or more"
            )
        if self.redistribution.control != "off" and self.redistribution.policy == "none":
            raise ValueError(
                f"redistribution.control={self.redistribution.control} is the control of a policy, and "
                "redistribution.policy=none: name the policy, or set redistribution.control=off"
            )
        unused = self.data.duplicates == "keep" and self.partition.clusters == "any"
        if self.data.near_duplicates != "off" and unused:
            raise ValueError(
                f"data.near-duplicates={self.data.near_duplicates} finds what data.duplicates=keep and "
                "partition.clusters=any do nothing about: change one of the two, or set data.near-duplicates=off"
            )
        usual = DpConfig()
        changed = [name for name in DpConfig.model_fields if getattr(self.dp, name) != getattr(usual, name)]
        if changed and not self.private:
            raise ValueError(
                f"{', '.join(f'dp.{dashed(name)}' for name in changed)} set with dp.mode=off, which adds no noise: set "
                "dp.mode, or leave them at their defaults"
            )

    def visits(self, samples: int) -> int:
        """Images a proxy trains on in one round, on a shard of so many samples."""
        return self.local_steps * self.batch_size or self.local_epochs * samples

    @classmethod
    def from_flat(cls, settings: Mapping[str, Scalar]) -> RunConfig:
        """Check Flower's flat run config; raises `ConfigError` naming each bad setting."""
        nested: dict[str, Any] = {}
        known = [s.key for s in describe()]
        for key, value in settings.items():
            if key not in known:
                same_leaf = [k for k in known if k.rpartition(".")[2] == key]
                close = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"unknown setting {key!r}{hint} (`ret-fl config` lists them all)")
            section, _, leaf = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[leaf] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    def to_flat(self) -> dict[str, Scalar]:
        """The same settings as Flower carries them."""
        return {s.key: s.value for s in describe(self)}


@dataclass(frozen=True)
class Setting:
    """One knob: its dashed key, value, JSON-schema constraints in words, and meaning."""

    key: str
    value: Scalar
    allowed: str
    meaning: str


def _allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[k]}" for k, sign in signs.items() if k in schema]
    return " and ".join([schema["type"], *bounds]) if bounds else schema["type"]


@cache
def _properties(section: type[Section]) -> Mapping[str, Any]:
    """JSON schema of each setting of a section, by dashed name. Cached: every order is packed and unpacked by it."""
    return section.model_json_schema(by_alias=True)["properties"]


def describe(config: RunConfig | None = None) -> Iterator[Setting]:
    """Every setting of `config` (default: the default run), in the order they are declared."""
    config = RunConfig() if config is None else config

    def walk(section: Section, prefix: str) -> Iterator[Setting]:
        properties = _properties(type(section))
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                yield from walk(value, f"{prefix}{dashed(name)}.")
            else:
                schema = properties[dashed(name)]
                yield Setting(prefix + dashed(name), value, _allowed(schema), schema["description"])

    return walk(config, "")


def off_default(config: RunConfig) -> list[Setting]:
    """The settings of a run that differ from the defaults; a learning rate that is the model's own does not."""
    usual = {s.key: s.value for s in describe()} | {"optimizer.lr": config.usual_rate}
    return [s for s in describe(config) if s.value != usual[s.key]]


def _explain(error: ValidationError) -> str:
    settings = {s.key: s for s in describe()}
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if key in settings:
            s = settings[key]
            lines.append(f"{key} = {problem['input']!r} is not allowed ({s.allowed}). {s.meaning}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return "\n".join(lines)
