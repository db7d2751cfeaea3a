"""One audit from end to end: copies, quality, leakage, and what the report shows of them."""

from __future__ import annotations

import datetime
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.classifier import MIN_SIDE, FeatureClassifier, small_images, train_classifier
from ret_fl.audit.copies import replication
from ret_fl.audit.distances import MEMORY_MB
from ret_fl.audit.features import FeatureModel
from ret_fl.audit.fidelity import fidelity
from ret_fl.audit.generate import Denoiser, Generated
from ret_fl.audit.leakage import exposure, membership, pia_scores, suspected_duplicates
from ret_fl.audit.report import Pictures
from ret_fl.audit.similarity import similarity
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import Objective
from ret_fl.diffusion.sampling import noise_shape
from ret_fl.evaluation import loss_grid, timestep_grid
from ret_fl.files import user_cache
from ret_fl.pictures import Pairs

FEWEST = 4
"""Images a set needs for precision and recall, whose radius is that of the third neighbour."""
CLASSIFIED = 10_000
"""Real images the feature classifier is trained on, at most."""
READ = 256
"""Of these, images read from a set at a time: they may be large."""
PATIENCE = 10.0
"""Seconds of training before it is told how far it is, and between two times."""
GRID = 10
"""Timesteps of the loss grid."""

Stage = Callable[[str], None]


@dataclass(frozen=True)
class AuditData:
    """The real images of an audit; their sizes must be those of the generated ones.

    source: what the report calls them. train: what the model was trained on, repeats included. reference: as many
    distinct real images never trained on, to calibrate the copy rate. held_out: further such images, for floors and
    quality. canaries: int64 [n, repeats], the rows of `train` that hold each image repeated on purpose. one_split:
    whether all sets come from one source, whose classes have the same numbers in each.
    """

    source: str
    train: SampleStore
    reference: SampleStore | None = None
    held_out: SampleStore | None = None
    canaries: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    one_split: bool = False


@dataclass(frozen=True)
class Options:
    """How an audit measures.

    threshold: calibrated ratio below which a sample is a copy. k: neighbours of MQ and Carlini's ratio; None: 50, or
    all training images where they are fewer. members: images of each side in membership inference, at most.
    """

    threshold: float = 0.3
    k: int | None = None
    members: int = 2000
    seed: int = 0
    device: torch.device | str = "cpu"
    memory_mb: int = MEMORY_MB


@dataclass(frozen=True)
class Background:
    """What is known of the model's training beside its weights; nothing for a model from elsewhere.

    groups: sample IDs (int64) by what training made of them, for the histograms of losses. rows: of metrics.jsonl.
    """

    training: schema.Training | None = None
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()
    skip_by_timestep: tuple[np.ndarray, np.ndarray] | None = None


def run_audit(
    path: Path,
    generated: Generated,
    data: AuditData,
    *,
    denoiser: Denoiser | None = None,
    feature_models: Sequence[FeatureModel] = (),
    background: Callable[[], Background] = Background,
    options: Options | None = None,
    on_stage: Stage = lambda stage: None,
) -> tuple[schema.Audit, Pictures]:
    """Audit images of one model.

    Args:
        path: where the model lies, for the record.
        generated: its images.
        data: what it was trained on, and real images it was not trained on.
        denoiser: the model itself, for attacks by its losses; None leaves leakage out.
        feature_models: for similarity and quality, beside the classifier of the data.
        background: gives what a ret-fl run recorded; its warnings join the audit's.
        options: how to measure.
        on_stage: told what is measured next.

    Returns:
        The numbers of audit.json and the pictures of report.html. Python warnings met on the way are in
        `Audit.warnings`.

    Raises:
        ValueError: images of the sets differ in shape, or as in `replication`.
    """
    options = options or Options()
    _require_same_shape(generated, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        known = background()
        train, held_out = data.train.pixels(), _pixels(data.held_out)
        on_stage("copies")
        copies, _ = replication(
            generated.images,
            train,
            _pixels(data.reference),
            held_out,
            data.canaries,
            threshold=options.threshold,
            k=options.k,
            memory_mb=options.memory_mb,
            device=options.device,
        )
        qualities: list[schema.Fidelity] = []
        similarities: list[schema.Similarity] = []
        classifier = _classifier(data, options, on_stage)
        for model in [*([classifier] if classifier else []), *feature_models]:
            on_stage(f"quality in features of {model.name}")
            if min(len(_distinct(data.train)), len(generated.images)) < FEWEST:
                warnings.warn(f"no quality measured: it needs {FEWEST} samples and training images", stacklevel=1)
                break
            qualities.append(fidelity(model, generated.images, held_out, train, seed=options.seed))
        for model in feature_models:
            on_stage(f"similarity in features of {model.name}")
            floor = None if held_out is None else model.features(held_out)
            own, trained = model.features(generated.images), model.features(train)
            similarities.append(similarity(own, trained, floor, name=model.name, memory_mb=options.memory_mb))
        leakage: schema.Leakage | None = None
        losses: dict[str, np.ndarray] = {}
        if denoiser and _takes(denoiser, data):
            leakage, losses = _leakage(denoiser, data, known, options, on_stage)
    audit = schema.Audit(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("ret-fl", "torch", "diffusers")}
        | {"python": platform.python_version()},
        model=schema.ModelInfo(
            name=generated.name,
            path=str(path),
            kind=generated.kind,
            samples=len(generated.images),
            seed=generated.seed,
            steps=generated.steps,
            parameters=generated.parameters,
        ),
        data=_data_info(data),
        replication=copies,
        similarity=similarities,
        fidelity=qualities,
        leakage=leakage,
        training=known.training,
        warnings=list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))),
    )
    suspects = leakage.duplicates.suspects if leakage and leakage.duplicates else []
    pictures = Pictures(
        samples=generated.images[:100],
        worst=_closest(generated, data, copies.worst),
        suspects=data.train.unit(np.array([s.train for s in suspects], np.int64)),
        rows=known.rows,
        losses=losses,
        skip_by_timestep=known.skip_by_timestep,
    )
    return audit, pictures


def _closest(generated: Generated, data: AuditData, worst: Sequence[schema.WorstCopy]) -> Pairs:
    ratio = torch.tensor([torch.nan if w.ratio is None else w.ratio for w in worst])
    originals = data.train.unit(np.array([w.train for w in worst], np.int64))
    return Pairs("", generated.images[[w.sample for w in worst]], originals, ratio)


def _pixels(store: SampleStore | None) -> Tensor | None:
    return store.pixels() if store is not None and len(store) else None


def _require_same_shape(generated: Generated, data: AuditData) -> None:
    wanted = data.train.image_shape
    named = {"generated images": tuple(generated.images.shape[1:])}
    named |= {n: s.image_shape for n, s in (("reference", data.reference), ("held-out", data.held_out)) if s}
    for name, shape in named.items():
        if shape != wanted:
            raise ValueError(
                f"{name} are {'x'.join(map(str, shape))} (channels, height, width), the training images "
                f"{'x'.join(map(str, wanted))}: bring all to one size by --image-size and --channels"
            )


def _data_info(data: AuditData) -> schema.DataInfo:
    canaries, repeats = data.canaries.shape
    return schema.DataInfo(
        source=data.source,
        image_shape=data.train.image_shape,
        train=len(data.train),
        distinct=len(np.unique(data.train.content_hashes)),
        reference=len(data.reference) if data.reference else 0,
        held_out=len(data.held_out) if data.held_out else 0,
        canaries=canaries,
        canary_repeats=repeats,
    )


def _distinct(store: SampleStore) -> np.ndarray:
    """int64: the first row of every distinct image, ascending."""
    return np.sort(np.unique(store.content_hashes, return_index=True)[1])


def _classifier(data: AuditData, options: Options, on_stage: Stage) -> FeatureClassifier | None:
    """A classifier of all real images, each once: it favours neither those trained on nor those held out."""
    if data.train.num_classes < 2 or min(data.train.image_shape[1:]) < MIN_SIDE:
        return None
    # images of another origin number their classes in their own way
    every_set = (data.train, data.reference, data.held_out) if data.one_split else (data.train,)
    stores = [s for s in every_set if s is not None and s.labels is not None]
    distinct = [torch.from_numpy(_distinct(s)) for s in stores]
    count = sum(map(len, distinct))
    # chosen before any is read: the sets may be far larger
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[_spread(count, CLASSIFIED)] = True
    rows = [ids[part] for ids, part in zip(distinct, chosen.split([len(ids) for ids in distinct]), strict=True)]
    labels = torch.cat([s.labels[ids] for s, ids in zip(stores, rows, strict=True) if s.labels is not None])
    if len(labels.unique()) < 2:
        return None
    stage = "a classifier of the data, for its features"
    on_stage(stage)
    images = torch.cat(
        [small_images(s.pixels(part)) for s, ids in zip(stores, rows, strict=True) for part in ids.split(READ)]
    )
    return train_classifier(
        images,
        labels,
        data.train.num_classes,
        path=user_cache("classifiers") / f"{data.train.fingerprint[:16]}-{count}.safetensors",
        device=options.device,
        on_progress=_unhurried(lambda done, total: on_stage(f"{stage}: {done} of {total} passes")),
    )


def _unhurried(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`tell`, left out where it comes within `PATIENCE` seconds of the time before."""
    told = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PATIENCE:
            told = time.monotonic()
            tell(done, total)

    return on_progress


def _spread(count: int, most: int) -> Tensor:
    """int64: at most `most` of 0..count-1, evenly spread."""
    return torch.from_numpy(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _takes(denoiser: Denoiser, data: AuditData) -> bool:
    """Whether a model's losses can be asked for on these images; a warning says why not."""
    unet, _, fold = denoiser
    channels, height, width = noise_shape(unet)
    shape = (channels // fold**2, height * fold, width * fold)
    if shape != data.train.image_shape:
        own, given = ("x".join(map(str, s)) for s in (shape, data.train.image_shape))
        warnings.warn(f"leakage left out: the model works on {own}, the images are {given}", stacklevel=2)
        return False
    classes = unet.config.num_class_embeds
    unlabelled = any(s is not None and s.labels is None for s in (data.train, data.reference, data.held_out))
    if classes and (unlabelled or data.train.num_classes > classes):
        warnings.warn(f"leakage left out: the model wants the labels of its {classes} classes", stacklevel=2)
        return False
    return True


def _leakage(
    denoiser: Denoiser, data: AuditData, background: Background, options: Options, on_stage: Stage
) -> tuple[schema.Leakage, dict[str, np.ndarray]]:
    """Leakage, and losses of the training images by group."""
    on_stage("leakage: losses of training images")
    unet, scheduler, fold = denoiser
    objective = Objective(scheduler, torch.device(options.device), fold=fold)
    timesteps = timestep_grid(scheduler.config.num_train_timesteps, GRID)

    def grid(store: SampleStore, ids: Tensor) -> Tensor:
        return loss_grid(unet, objective, store, ids, timesteps=GRID, seed=options.seed)

    canary_rows = np.ascontiguousarray(data.canaries[:, 0]) if len(data.canaries) else np.empty(0, np.int64)
    distinct = torch.from_numpy(_distinct(data.train))
    chosen = distinct[_spread(len(distinct), options.members)]
    measured = torch.unique(torch.cat([chosen, torch.from_numpy(canary_rows)]))
    losses = grid(data.train, measured)
    scores = losses.mean(1)
    # canaries beyond the chosen few would weigh more among them than in the data
    fair = torch.isin(measured, chosen)
    unseen = [s for s in (data.held_out, data.reference) if s is not None and len(s)]
    attacks, exposed = [], None
    if unseen:
        on_stage("leakage: losses of images never trained on")
        everything = [(s, torch.arange(len(s))) for s in unseen]
        each = options.members // len(unseen)
        picked = [(s, ids[_spread(len(ids), each)]) for s, ids in everything]
        unseen_scores = torch.cat([grid(s, ids).mean(1) for s, ids in picked])
        attacks.append(membership(scores[fair], unseen_scores, "loss", seed=options.seed))
        on_stage("leakage: membership by PIA")
        step = scheduler.config.num_train_timesteps // 5
        members = pia_scores(unet, objective, data.train, measured[fair], t=step)
        non_members = torch.cat([pia_scores(unet, objective, s, ids, t=step) for s, ids in picked])
        attacks.append(membership(members, non_members, "pia", seed=options.seed))
        if len(canary_rows):
            exposed = exposure(scores[torch.searchsorted(measured, torch.from_numpy(canary_rows))], unseen_scores)
    duplicates = _duplicates(data.train, measured, losses, timesteps, 2 * scheduler.config.num_train_timesteps // 5)
    groups = {
        name: scores[torch.isin(measured, torch.from_numpy(ids))].numpy() for name, ids in background.groups.items()
    }
    if not groups:
        groups = {"training": scores.numpy()} | ({"never trained on": unseen_scores.numpy()} if unseen else {})
    return schema.Leakage(membership=attacks, exposure=exposed, duplicates=duplicates), groups


def _duplicates(
    train: SampleStore, measured: Tensor, losses: Tensor, timesteps: Tensor, t_max: int
) -> schema.Duplicates:
    """`suspected_duplicates` among the images of the `measured` rows, every copy of them counted."""
    hashes = train.content_hashes
    by_content = np.argsort(hashes[measured.numpy()])
    sorted_hashes = hashes[measured.numpy()][by_content]
    place = np.searchsorted(sorted_hashes, hashes).clip(max=len(measured) - 1)
    rows = np.flatnonzero(sorted_hashes[place] == hashes)
    found = suspected_duplicates(losses[by_content[place[rows]]], timesteps, hashes[rows], t_max=t_max)
    named = [s.model_copy(update={"train": int(rows[s.train])}) for s in found.suspects]
    return found.model_copy(update={"suspects": named})
