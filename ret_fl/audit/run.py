"""One audit from end to end: copies, quality, leakage, and what the report shows of them."""

from __future__ import annotations

import datetime
import hashlib
import logging
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.attacks import Stage, attack, takes
from ret_fl.audit.classifier import (
    MIN_SIDE,
    OF_TURNS,
    TURNS,
    FeatureClassifier,
    small_images,
    train_classifier,
    turned,
)
from ret_fl.audit.clipscore import clip_score
from ret_fl.audit.copies import replication
from ret_fl.audit.distances import Images
from ret_fl.audit.features import FeatureModel, LoadedModel
from ret_fl.audit.fidelity import fidelity
from ret_fl.audit.generate import Denoiser, Generated
from ret_fl.audit.inputs import AuditData, Background, Evidence, Options, distinct_rows, spread_rows
from ret_fl.audit.losses import loss_histograms
from ret_fl.audit.report import Pictures
from ret_fl.audit.similarity import similarity
from ret_fl.audit.whitened import FEWEST as FEWEST_WHITENED
from ret_fl.audit.whitened import MOST, WhitenedPixels
from ret_fl.data.store import SampleStore
from ret_fl.files import user_cache
from ret_fl.loading import Plugin, load_auditors
from ret_fl.pictures import Pairs

log = logging.getLogger(__name__)

FEWEST = 4
"""Images a set needs for precision and recall, whose radius is that of the third neighbour."""
CLASSIFIED = 10_000
"""Real images the feature classifier is trained on, at most."""
READ = 256
"""Images read from a set, or shown to an image model, at a time: they may be large."""
PATIENCE = 10.0
"""Seconds of training before it is told how far it is, and between two times."""


def run_audit(
    path: Path,
    generated: Generated,
    data: AuditData,
    *,
    denoiser: Callable[[], Denoiser | None] = lambda: None,
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
        denoiser: gives the model itself, for attacks by its losses; None leaves leakage out.
        feature_models: for similarity and quality, beside the classifier of the data.
        background: gives what a ret-fl run recorded. Warnings of both join the audit's.
        options: how to measure.
        on_stage: told what is measured next.

    Returns:
        The numbers of audit.json and the pictures of report.html. Python warnings met on the way are in
        `Audit.warnings`.

    Raises:
        ValueError: images of the sets differ in shape, fewer than 4 distinct training images, an auditor that cannot
            be loaded, or as in `replication`.
    """
    options = options or Options()
    auditors = load_auditors(options.auditors, options.auditor_options)
    require_same_shape(data, tuple(generated.images.shape[1:]))
    require_enough(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        known = background()
        if generated.left_out:
            taken, count = len(generated.images), len(generated.images) + generated.left_out
            warnings.warn(
                f"{taken:,} of {count:,} images of {generated.name} were audited, evenly spread: "
                f"--samples {count} takes all",
                stacklevel=1,
            )
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
        if (whitened := _whitened_similarity(generated, data, train, held_out, options)) is not None:
            similarities.append(whitened)
        classifier = _classifier(data, options, on_stage)
        models: list[FeatureModel] = [_Remembering(model) for model in feature_models]
        for model in [*([classifier] if classifier else []), *models]:
            on_stage(f"quality in features of {model.name}")
            if len(generated.images) < FEWEST:
                warnings.warn(f"no quality measured: it needs {FEWEST} samples", stacklevel=1)
                break
            if held_out is None:
                warnings.warn(
                    "quality is measured against the training images, as none are held out: it rewards copying",
                    stacklevel=1,
                )
            qualities.append(
                fidelity(model, generated.images, held_out, train, seed=options.seed, memory_mb=options.memory_mb)
            )
        for model in models:
            on_stage(f"similarity in features of {model.name}")
            floor = None if held_out is None else model.features(held_out)
            own, trained = model.features(generated.images), model.features(train)
            similarities.append(similarity(own, trained, floor, name=model.name, memory_mb=options.memory_mb))
        clip = _clip_scores(feature_models, generated, data, on_stage)
        leakage: schema.Leakage | None = None
        losses: dict[str, np.ndarray] = {}
        if (loaded := denoiser()) and takes(loaded, data):
            leakage, losses = attack(loaded, data, known, options, on_stage)
        added = _added(auditors, Evidence(path, generated.images, data, denoiser, options), on_stage)
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
            prompts=list(generated.prompts),
            guidance=generated.guidance,
            image_size=generated.image_size,
            channels=generated.channels,
            ensemble=generated.ensemble,
        ),
        data=_data_info(data),
        replication=copies,
        similarity=similarities,
        fidelity=qualities,
        leakage=leakage,
        training=known.training,
        losses=loss_histograms(losses),
        clip=clip,
        added=added,
        measuring=schema.Measuring(members=options.members, seed=options.seed, device=str(options.device)),
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


def _added(auditors: Sequence[Plugin], evidence: Evidence, on_stage: Stage) -> list[schema.Added]:
    """What plug-ins measure. One that fails is a warning: the audit's own numbers may have taken hours."""
    found = []
    for plugin in auditors:
        on_stage(f"auditor {plugin.name}")
        try:
            values = {str(name): float(value) for name, value in plugin.call(evidence).items()}
        except Exception as error:  # code of others may raise anything
            log.exception("auditor %s failed", plugin.name)
            warnings.warn(f"the auditor {plugin.name} failed: {type(error).__name__}: {error}", stacklevel=1)
            continue
        settings = plugin.settings.model_dump(mode="json") if plugin.settings else {}
        found.append(
            schema.Added(
                auditor=plugin.name, source=plugin.source, about=plugin.about, settings=settings, values=values
            )
        )
    return found


def _whitened_similarity(
    generated: Generated, data: AuditData, train: Tensor, held_out: Tensor | None, options: Options
) -> schema.Similarity | None:
    """In whitened pixels: components of the held-out images, so the floor is that of the reference images."""
    if data.held_out is None or held_out is None or min(data.train.image_shape[1:]) < MIN_SIDE:
        return None
    rows = torch.cat(spread_rows([data.held_out], MOST))
    if len(rows) < FEWEST_WHITENED:
        return None
    model = WhitenedPixels(held_out[rows])
    floor = None if data.reference is None else model.features(data.reference.pixels())
    own, trained = model.features(generated.images), model.features(train)
    return similarity(own, trained, floor, name=model.name, memory_mb=options.memory_mb)


def _clip_scores(
    models: Sequence[FeatureModel], generated: Generated, data: AuditData, on_stage: Stage
) -> list[schema.ClipScore]:
    """How samples fit their prompts, by each model that knows text."""
    readers = [model for model in models if isinstance(model, LoadedModel) and model.text is not None]
    if not readers or not generated.prompts:
        return []
    captions = None if data.train.captions is None else [own[0] for own in data.train.captions]
    scores = []
    for model in readers:
        on_stage(f"CLIP score by {model.name}")
        scores.append(clip_score(model, generated.images, generated.prompts, data.train.pixels(), captions))
    return [score for score in scores if score is not None]


class _Remembering:
    """A feature model that looks at every image once, in however many sets and scores it stands."""

    def __init__(self, model: FeatureModel) -> None:
        self._model, self.name = model, model.name
        self._known: dict[bytes, Tensor] = {}

    def features(self, images: Images) -> Tensor:
        """As the model's own."""
        return torch.cat([self._part(part) for part in torch.as_tensor(images).split(READ)])

    def _part(self, images: Tensor) -> Tensor:
        keys = [hashlib.sha256(row.numpy()).digest() for row in images.contiguous()]
        new = {key: i for i, key in enumerate(keys) if key not in self._known}
        if new:
            self._known.update(zip(new, self._model.features(images[list(new.values())]), strict=True))
        return torch.stack([self._known[key] for key in keys])

    def class_probabilities(self, images: Images) -> Tensor | None:
        """As the model's own; None if it has none."""
        classify = getattr(self._model, "class_probabilities", None)
        return classify(images) if classify else None


def _closest(generated: Generated, data: AuditData, worst: Sequence[schema.WorstCopy]) -> Pairs:
    ratio = torch.tensor([torch.nan if w.ratio is None else w.ratio for w in worst])
    originals = data.train.unit(np.array([w.train for w in worst], np.int64))
    return Pairs("", generated.images[[w.sample for w in worst]], originals, ratio)


def _pixels(store: SampleStore | None) -> Tensor | None:
    return store.pixels() if store is not None and len(store) else None


def require_enough(data: AuditData) -> None:
    """Refuse fewer distinct training images than any score needs. Raises `ValueError`."""
    if (distinct := len(distinct_rows(data.train))) < FEWEST:
        raise ValueError(f"an audit needs at least {FEWEST} distinct training images, got {distinct}")


def require_same_shape(data: AuditData, generated: tuple[int, ...] | None = None) -> None:
    """Refuse images of several sizes. generated: the samples' (C, H, W), None if not known yet. Raises `ValueError`."""
    wanted = data.train.image_shape
    named = {n: s.image_shape for n, s in (("reference", data.reference), ("held-out", data.held_out)) if s}
    for name, shape in (({"generated": generated} if generated else {}) | named).items():
        if shape != wanted:
            raise ValueError(
                f"{name} images are {'x'.join(map(str, shape))} (channels, height, width), the training images "
                f"{'x'.join(map(str, wanted))}: bring all to one size by --image-size and --channels"
            )


def _data_info(data: AuditData) -> schema.DataInfo:
    canaries, repeats = data.canaries.shape
    return schema.DataInfo(
        source=data.source,
        image_shape=data.train.image_shape,
        train=len(data.train),
        distinct=len(distinct_rows(data.train)),
        reference=len(data.reference) if data.reference else 0,
        held_out=len(data.held_out) if data.held_out else 0,
        canaries=canaries,
        canary_repeats=repeats,
        fingerprints=schema.Fingerprints(
            train=data.train.fingerprint,
            reference=data.reference.fingerprint if data.reference else None,
            held_out=data.held_out.fingerprint if data.held_out else None,
        ),
    )


def _classifier(data: AuditData, options: Options, on_stage: Stage) -> FeatureClassifier | None:
    """A classifier of all real images, each once: it favours neither those trained on nor those held out.

    Of their classes, or of how each is turned: without labels, or where sets of several sources number their classes
    each in its own way.
    """
    if min(data.train.image_shape[1:]) < MIN_SIDE:
        return None
    every_set = [s for s in (data.train, data.reference, data.held_out) if s is not None and len(s)]
    labels = [s.labels for s in every_set if s.labels is not None]
    labelled = (data.one_split or len(every_set) == 1) and len(labels) == len(every_set)
    labelled = labelled and len(torch.cat(labels).unique()) >= 2
    # chosen before any is read: the sets may be far larger
    rows = spread_rows(every_set, CLASSIFIED if labelled else CLASSIFIED // TURNS)
    stage = "a classifier of the data, for its features"
    on_stage(stage)
    images = torch.cat(
        [small_images(s.pixels(part)) for s, ids in zip(every_set, rows, strict=True) for part in ids.split(READ)]
    )
    if labelled:
        target, classes = torch.cat([own[ids] for own, ids in zip(labels, rows, strict=True)]), data.train.num_classes
    else:
        (images, target), classes = turned(images), TURNS
    model = train_classifier(
        images,
        target,
        classes,
        path=user_cache("classifiers") / f"{data.train.fingerprint[:16]}-{len(images)}.safetensors",
        device=options.device,
        on_progress=_unhurried(lambda done, total: on_stage(f"{stage}: {done} of {total} passes")),
    )
    model.name = FeatureClassifier.name if labelled else OF_TURNS
    return model


def _unhurried(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`tell`, left out where it comes within `PATIENCE` seconds of the time before."""
    told = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PATIENCE:
            told = time.monotonic()
            tell(done, total)

    return on_progress
