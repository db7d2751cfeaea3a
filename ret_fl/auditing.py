"""Audits of runs and of anyone's models: from folders to audit.json and report.html.

`ret_fl.audit` knows images, models and numbers; what a run's folder holds, and where data comes from, is known here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from ret_fl.audit import schema
from ret_fl.audit.features import load_features
from ret_fl.audit.folder import save_audit
from ret_fl.audit.generate import Generated, generate, load_denoiser
from ret_fl.audit.plane import plane_figure
from ret_fl.audit.ready import read_images
from ret_fl.audit.report import Pictures
from ret_fl.audit.run import AuditData, Background, Options, run_audit
from ret_fl.checkpoint import checkpoints
from ret_fl.config import ConfigError, DataConfig, RunConfig, describe
from ret_fl.data.sources import DataSplits, load_images, load_splits
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.models import build_unet, fold_factor
from ret_fl.diffusion.objective import make_scheduler
from ret_fl.diffusion.sampling import save_pipeline
from ret_fl.ledger import ShardLedger
from ret_fl.recorder import ema_state
from ret_fl.rundir import RunDir

Channels = Literal["auto", "grey", "rgb"]
BUILTIN = tuple(s for s in get_args(DataConfig.model_fields["source"].annotation) if s not in ("image-folder", "hf"))
SAMPLES = "samples"
"""Folder of drawn images inside an audit's, so that an interrupted audit goes on where it was."""

Stage = Callable[[str], None]
Drawn = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How a model's images are drawn or read; see `ret_fl.audit.generate.generate`."""

    samples: int = 1000
    seed: int = 0
    steps: int = 50
    prompts: tuple[str, ...] = ()
    guidance: float = 7.5
    image_size: int = 0
    channels: Channels = "auto"


def audit_model(
    model: str | Path,
    data: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    held_out: str | Path | None = None,
    features: Sequence[str] = (),
    out: str | Path | None = None,
    drawing: Drawing | None = None,
    options: Options | None = None,
    leakage: bool = True,
    on_stage: Stage = lambda stage: None,
    on_drawn: Drawn | None = None,
) -> schema.Audit:
    """Audit one model, and write audit.json and report.html into a folder.

    Args:
        model: a run's folder, a diffusers pipeline folder, a folder of images, or a .npy file of images.
        data: the training images, as in `open_data`; None takes those of `model`, which must then be a run.
        reference, held_out: real images never trained on, as in `open_data`.
        features: image models for similarity and quality, as in `ret_fl.audit.features.load_features`.
        out: the folder; None: audit/ inside a run, else audits/<name>.
        drawing, options: how images are drawn, and how they are measured.
        leakage: whether to attack the model by its losses, where it is one that has losses.
        on_stage: told what is done next. on_drawn: told how many images of how many are drawn.

    Raises:
        ValueError, FileNotFoundError: the model or the data cannot be used; the message says what to change.
    """
    path, folder, options = Path(model), audit_folder(Path(model), out), options or Options()
    if data is None and not is_run(path):
        raise ConfigError(f"{path} is no run of ret-fl, which would know its training images: name them as data")
    real = open_data(data if data is not None else model, reference, held_out, drawing)
    on_stage(f"images of {model}")
    generated = draw(path, folder, drawing, options, on_drawn)
    audit, pictures = measure(path, generated, real, features, options, leakage, on_stage)
    save_audit(folder, audit, pictures)
    return audit


def audit_folder(model: Path, out: str | Path | None = None) -> Path:
    """Where the audit of a model goes."""
    if out is not None:
        return Path(out)
    return model / "audit" if is_run(model) else Path("audits") / model.resolve().name


def is_run(path: Path) -> bool:
    """Whether a folder is a ret-fl run's."""
    return (path / "config.json").is_file() and (path / "final").is_dir()


def draw(
    model: Path,
    folder: Path,
    drawing: Drawing | None = None,
    options: Options | None = None,
    on_drawn: Drawn | None = None,
) -> Generated:
    """Images of `model`; those it draws are kept in the audit's `folder`, and not drawn again."""
    drawing, options = drawing or Drawing(), options or Options()
    return generate(
        model,
        samples=drawing.samples,
        seed=drawing.seed,
        steps=drawing.steps,
        prompts=drawing.prompts,
        guidance=drawing.guidance,
        image_size=drawing.image_size,
        channels=drawing.channels,
        cache=folder / SAMPLES,
        device=options.device,
        on_progress=on_drawn,
    )


def measure(
    model: Path,
    generated: Generated,
    data: AuditData,
    features: Sequence[str] = (),
    options: Options | None = None,
    leakage: bool = True,
    on_stage: Stage = lambda stage: None,
) -> tuple[schema.Audit, Pictures]:
    """The audit of one model's images against data already open; a run's folder adds what it recorded."""
    options = options or Options()
    loaded = [load_features(spec, device=options.device) for spec in features]
    run = RunDir.existing(model) if is_run(model) else None
    return run_audit(
        model,
        generated,
        data,
        denoiser=load_denoiser(model, options.device) if leakage else None,
        feature_models=loaded,
        background=(lambda: background_of(run, data)) if run else Background,
        options=options,
        on_stage=on_stage,
    )


# Data


def open_data(
    data: str | Path,
    reference: str | Path | None = None,
    held_out: str | Path | None = None,
    drawing: Drawing | None = None,
) -> AuditData:
    """Real images for an audit.

    Args:
        data: a run's folder (its own split), one of the built-in sources (digits, mnist, glyphs, patches, faces; split
            as by default), or training images: a folder of image files, a .npy, a save_to_disk folder, parquet files
            or a hub name.
        reference, held_out: real images never trained on, in the same forms as training images. Of a reference
            larger than the (distinct) training set the surplus serves as held-out images, unless these are given.
        drawing: its image_size and channels bring files to the model's size.

    Raises:
        ValueError: (`ConfigError`) unreadable or missing images; the message names the file or setting.
        FileNotFoundError: no such .npy file.
    """
    drawing = drawing or Drawing()
    if is_run(Path(data)):
        opened = data_of(RunDir.existing(data).read_config())
    elif str(data) in BUILTIN:
        opened = _from_splits(str(data), load_splits(DataConfig.model_validate({"source": str(data)})))
    elif (Path(data) / "model_index.json").is_file():
        raise ConfigError(f"{data} is a model without its training images: name them by --data")
    else:
        opened = AuditData(str(data), _store(data, drawing))
    if held_out is not None:
        opened = replace(opened, held_out=_store(held_out, drawing), one_split=False)
    if reference is not None:
        opened = _with_reference(opened, _store(reference, drawing), keep_rest=held_out is None)
    return opened


def data_of(config: RunConfig) -> AuditData:
    """The data of a run."""
    return _from_splits(config.data.path or config.data.source, load_splits(config.data))


def _from_splits(source: str, splits: DataSplits) -> AuditData:
    held_out = splits.held_out if len(splits.held_out) else None
    return AuditData(source, splits.train, splits.reference, held_out, splits.canaries, one_split=True)


def _store(spec: str | Path, drawing: Drawing) -> SampleStore:
    path = Path(spec).expanduser()
    if path.suffix == ".npy":
        images = read_images(path, drawing.image_size, drawing.channels)
        return SampleStore((images * 255).round().to(torch.uint8))
    # a folder of datasets' own files holds no image files but tells itself apart by these
    is_dataset = path.suffix == ".parquet" or not path.is_dir() or _holds_dataset(path)
    config = DataConfig.model_validate(
        {
            "source": "hf" if is_dataset else "image-folder",
            "path": str(spec),
            "image_size": drawing.image_size,
            "channels": drawing.channels,
        }
    )
    found = load_images(config)
    return SampleStore(found.images, found.labels, found.num_classes)


def _holds_dataset(folder: Path) -> bool:
    names = ("state.json", "dataset_dict.json")
    return any((folder / name).is_file() for name in names) or any(folder.rglob("*.parquet"))


def _with_reference(data: AuditData, reference: SampleStore, *, keep_rest: bool) -> AuditData:
    """Distinct reference images, as many as distinct training images; what is over may serve as held-out images."""
    needed = len(np.unique(data.train.content_hashes))
    distinct = np.sort(np.unique(reference.content_hashes, return_index=True)[1])
    order = np.random.default_rng(0).permutation(distinct)
    rest = reference.subset(np.sort(order[needed:]))
    held_out = rest if keep_rest and data.held_out is None and len(rest) else data.held_out
    return replace(data, reference=reference.subset(np.sort(order[:needed])), held_out=held_out, one_split=False)


# Runs


def background_of(run: RunDir, data: AuditData) -> Background:
    """What a run's folder tells beside the model. Its sample IDs count only where `data` is what it was trained on."""
    config, rows = run.read_config(), run.rows()
    changed = [s for s, d in zip(describe(config), describe(), strict=True) if s.value != d.value]
    images = sum(row["images"] for row in rows)
    measured = [row for row in rows if "train_loss" in row]
    last = measured[-1] if measured else {}
    training = schema.Training(
        settings={s.key: s.value for s in changed if s.key not in ("out", "resume", "state-dir")},
        rounds=rows[-1]["round"] if rows else 0,
        images=images,
        moved=sum(row["moved"] for row in rows),
        skip_rate=sum(row["skip_rate"] * row["images"] for row in rows) / max(images, 1),
        failures=sum(row["failures"] for row in rows),
        final_train_loss=last.get("train_loss"),
        final_held_out_loss=last.get("held_out_loss"),
    )
    groups = {}
    if data_of(config).train.fingerprint != data.train.fingerprint:
        warnings.warn(f"{run.path.name} was trained on other images than those it is audited against", stacklevel=2)
    elif run.ledger.is_file():
        groups = _tails(ShardLedger.load(run.ledger), config.report_tail)
    return Background(training, groups, rows, _skips_by_timestep(config, rows))


def _tails(ledger: ShardLedger, share: float) -> dict[str, np.ndarray]:
    """Sample IDs by their losses in training: the lowest `share`, the highest, and the others."""
    ratio = ledger.log_loss_ratio()
    known = np.flatnonzero(~np.isnan(ratio))
    order = known[np.argsort(ratio[known])]
    tail = round(share * len(order))
    if not tail:
        return {}
    groups = {"memorized": order[:tail], "high-loss": order[-tail:], "others": order[tail:-tail]}
    return {name: np.sort(ids) for name, ids in groups.items()}


def _skips_by_timestep(config: RunConfig, rows: Sequence[dict[str, list[int]]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Timesteps, and the share of draws skipped there over the whole run; None where nothing was gated."""
    counted = [row for row in rows if "level_draws" in row]
    if not counted or config.agc.mode == "off":
        return None
    draws, skips = (np.sum([row[key] for row in counted], axis=0) for key in ("level_draws", "level_skips"))
    timesteps = (np.arange(len(draws)) + 0.5) * config.diffusion.timesteps / len(draws)
    return timesteps[draws > 0], (skips / np.maximum(draws, 1))[draws > 0]


def checkpoint_models(model: Path, folder: Path) -> list[Path]:
    """A diffusers pipeline in `folder` of every checkpoint that a run kept, oldest first; another model is its own.

    Raises `ConfigError` if the run kept none but the first: `keep-checkpoints` says how many stay.
    """
    if not is_run(model):
        return [model]
    run = RunDir.existing(model)
    config = run.read_config()
    data = load_splits(config.data).train
    models = []
    for number, weights in checkpoints(run.checkpoints):
        if number:
            unet = build_unet(config.model, data.image_shape, data.num_classes, config.seed)
            unet.load_state_dict(ema_state(weights))
            path = folder / f"{run.path.name}, round {number}"
            save_pipeline(path, unet, make_scheduler(config.diffusion), fold_factor(config.model, data.image_shape))
            models.append(path)
    if not models:
        raise ConfigError(f"--early-stop {run.path}: no checkpoint there; train with keep-checkpoints=1000 to keep all")
    return models


# Comparison


def compare(
    models: Sequence[Path],
    data: AuditData,
    out: Path,
    *,
    baseline: Path | None = None,
    early_stop: Sequence[Path] = (),
    features: Sequence[str] = (),
    drawing: Drawing | None = None,
    options: Options | None = None,
    leakage: bool = True,
    on_stage: Stage = lambda stage: None,
    on_drawn: Drawn | None = None,
) -> tuple[list[schema.Audit], schema.Audit | None]:
    """Audit several models against the same data, and write them side by side into `out`.

    out/<name>/ has each model's audit, whose report shows the others beside it; out/plane.png is the copy-quality
    plane. early_stop: models of one training at growing lengths, oldest first.

    Returns the audits in the order of `models`, and the baseline's. Raises as `audit_model`.
    """
    names = unique_names([*models, *early_stop])

    def one(path: Path, name: str, by_losses: bool) -> tuple[schema.Audit, Pictures]:
        folder = out / name.replace("/", "-")
        on_stage(f"images of {name}")
        generated = replace(draw(path, folder, drawing, options, on_drawn), name=name)
        return measure(path, generated, data, features, options, by_losses, on_stage)

    found = [one(path, name, leakage) for path, name in zip(models, names, strict=False)]
    curve = [one(path, name, False)[0] for path, name in zip(early_stop, names[len(models) :], strict=True)]
    audits = [audit for audit, _ in found]
    base = audits[list(models).index(baseline)] if baseline is not None else None
    for audit, pictures in found:
        others = [a for a in audits if a is not audit]
        save_audit(
            out / audit.model.name.replace("/", "-"), audit, pictures, baseline=base if audit is not base else None,
            others=others, early_stop=curve,
        )  # fmt: skip
    if any(a.replication.copy_rates and a.fidelity for a in audits):
        plane_figure(audits, base, curve).savefig(out / "plane.png", dpi=150)
    return audits, base


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell it from the others."""
    parts = [path.resolve().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        others = [p for p in parts if p != own]
        depth = next((d for d in range(1, len(own)) if all(p[-d:] != own[-d:] for p in others)), len(own))
        return "/".join(own[-depth:])

    return [name(own) for own in parts]
