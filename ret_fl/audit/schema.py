"""audit.json: every number of an audit, versioned, for tools and for the report.

`Audit.model_validate_json(path.read_text())` reads one back. Shares lie in [0, 1], intervals are 95 %.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION: Final = 1


class Part(BaseModel):
    """A frozen group of numbers; unknown names are refused, NaN and infinity survive JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Interval(Part):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


class ModelInfo(Part):
    """What was audited, and how its images were drawn or read.

    kind: a ret-fl run, a diffusers pipeline, or images without a model. prompts, guidance: of text-to-image. image_size
    (0: their own), channels: what the images were brought to; None in audits made before it was kept. ensemble: how
    they were drawn from K proxies that were never averaged; None for one model.
    """

    name: str
    path: str
    kind: Literal["run", "pipeline", "images"]
    samples: int
    seed: int | None
    steps: int | None
    parameters: int | None
    prompts: list[str] = []
    guidance: float | None = None
    image_size: int | None = None
    channels: Literal["auto", "grey", "rgb"] | None = None
    ensemble: Literal["choose", "average"] | None = None


class Measuring(Part):
    """How it was measured. members: images of each side whose losses were looked at, at most. seed: of all choices."""

    members: int
    seed: int
    device: str


class Fingerprints(Part):
    """SHA-256 (hex) of each set of images, in order and with its labels; None: no such set."""

    train: str
    reference: str | None
    held_out: str | None


class DataInfo(Part):
    """Training, reference and held-out images; `distinct` counts training images without exact duplicates.

    fingerprints: None in audits made before they were kept.
    """

    source: str
    image_shape: tuple[int, int, int]
    train: int
    distinct: int
    reference: int
    held_out: int
    canaries: int
    canary_repeats: int
    fingerprints: Fingerprints | None = None


class CopyRate(Part):
    """Share of samples much closer to a training image than to any image of an equal-size disjoint real set.

    rate has a Wilson interval; floor is the same of real held-out images; above_floor is rate - floor with a bootstrap
    interval over both sets. Canary shares are of all samples. variant: 'pixels', or 'shift' and 'flip', where the
    training and reference images may first be moved by a pixel or mirrored.
    """

    variant: Literal["pixels", "shift", "flip"]
    threshold: float
    rate: Interval
    floor: Interval | None
    above_floor: Interval | None
    distinct: int
    canary: float | None
    ordinary: float | None
    canary_hits: list[int] | None


class MemorizedQuantity(Part):
    """Share of samples, and of real held-out images, whose ratio to their k nearest training images is below tau."""

    tau: float
    generated: float
    floor: float | None


class CarliniShare(Part):
    """Share of samples, and of held-out images, with Carlini's un-squared ratio <= 1."""

    alpha: float
    generated: float
    floor: float | None


class WorstCopy(Part):
    """A sample beside its nearest training image: calibrated ratio (None without reference), squared distance.

    Both in the variant named by `Replication.worst_variant`.
    """

    sample: int
    train: int
    ratio: float | None
    distance: float


class Replication(Part):
    """Copies by pixels. distance: median squared distance to the nearest training image, of samples and held-out.

    worst: the sample closest to each training image, closest first, in the variant of the copy rate that the verdict
    speaks of; worst_variant is None in audits made before it was kept, all by pixels.
    """

    copy_rates: list[CopyRate]
    k: int
    memorized: list[MemorizedQuantity]
    carlini: list[CarliniShare]
    distance: float
    held_out_distance: float | None
    worst: list[WorstCopy]
    worst_variant: Literal["pixels", "shift", "flip"] | None = None


class Similarity(Part):
    """Cosine similarity to the most similar training image in the features of an image model.

    percentile_95 of SSCD features is the memorization score of the Stable Diffusion papers. floor_*: the same of
    held-out images (whitened pixels, which are made of these: of reference images). background_percentile_95: of
    training images against the other training images.
    """

    features: str
    mean: float
    percentile_50: float
    percentile_95: float
    above_half: float
    floor_percentile_95: float | None
    background_percentile_95: float | None
    floor_above_half: float | None = None


class Fidelity(Part):
    """Quality and diversity against held-out images (or training images where none are held out) in some features.

    real_*: the same of an equally large set of training images in the samples' place: what a perfect model that
    copies everything would score. train_frechet, inception_score (mean and deviation over 10 parts): of Inception-v3,
    as papers report them; the first is against all training images, and rewards copying. confident: share of samples
    the classifier is surer than 90 % of. recipe: what decides the features, a hash of how the classifier of the data
    was trained, or the model's name; None in audits made before it was kept.
    """

    features: str
    against: Literal["held-out", "train"]
    images: int
    frechet: float
    kid: float
    precision: float
    recall: float
    confident: float | None
    real_frechet: float | None
    real_precision: float | None
    real_recall: float | None
    train_frechet: float | None = None
    inception_score: float | None = None
    inception_deviation: float | None = None
    real_inception_score: float | None = None
    recipe: str | None = None


class ClipScore(Part):
    """Mean cosine of samples and their prompts in a joint space of images and text; real: of training images and their
    captions, None where they are not known."""

    features: str
    mean: float
    real: float | None


class Membership(Part):
    """Telling training from held-out images by one score a model gives them. auc .5 is guessing."""

    attack: Literal["loss", "pia"]
    members: int
    non_members: int
    auc: Interval
    tpr_at_1_percent: Interval
    tpr_at_01_percent: Interval


class Exposure(Part):
    """log2(n) - log2(rank) of each canary's loss among n images never seen; `most` is log2(n), the highest possible."""

    exposures: list[float]
    mean: float
    most: float


class SuspectedDuplicate(Part):
    """A training image whose loss is far below that of others at the same timesteps. copies: exact ones in the data."""

    train: int
    log_ratio: float
    z: float
    copies: int


class Duplicates(Part):
    """Suspects by loss, lowest first; the list is cut.

    examined: distinct training images whose losses were looked at. below: how many of them lie below the bar, listed or
    not. precision and recall: of all below the bar against those examined that have exact copies, if any have. None in
    audits made before it was kept: examined, below, z (the bar) and t_max (the timesteps looked at are below it).
    """

    suspects: list[SuspectedDuplicate]
    precision: float | None
    recall: float | None
    examined: int | None = None
    below: int | None = None
    z: float | None = None
    t_max: int | None = None


class Leakage(Part):
    membership: list[Membership]
    exposure: Exposure | None
    duplicates: Duplicates | None


class LossHistogram(Part):
    """Losses of training samples of one group: `counts` of them between neighbouring `edges`, alike for all groups."""

    group: str
    median: float
    edges: list[float]
    counts: list[int]


class SkipCurve(Part):
    """Share of draws that training skipped, by the timestep they were drawn at."""

    timesteps: list[float]
    share: list[float]


class Training(Part):
    """What a run's folder tells: settings off their defaults, and metrics.jsonl reduced to what the report draws.

    epsilon, delta: differential privacy of a whole shard, of a run that has it.
    """

    settings: dict[str, bool | int | float | str]
    rounds: int
    images: int
    moved: int
    skip_rate: float
    failures: int
    final_train_loss: float | None
    final_held_out_loss: float | None
    skips: SkipCurve | None = None
    epsilon: float | None = None
    delta: float | None = None


class Added(Part):
    """What a plug-in of `audit.auditors` measured: numbers by name.

    source: the package it is from, or 'by its path'. about: its own first line. settings: its own.
    """

    auditor: str
    source: str
    about: str
    settings: dict[str, Any]
    values: dict[str, float]


class Audit(Part):
    """An audit of one model."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    versions: dict[str, str]
    model: ModelInfo
    data: DataInfo
    replication: Replication
    similarity: list[Similarity]
    fidelity: list[Fidelity]
    leakage: Leakage | None
    training: Training | None
    warnings: list[str]
    losses: list[LossHistogram] = []
    measuring: Measuring | None = None
    clip: list[ClipScore] = []
    added: list[Added] = []
