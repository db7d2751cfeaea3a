"""Audits of runs and of anyone's models: from folders to audit.json and report.html.

`ret_fl.audit` knows images, models and numbers; what a run's folder holds, and where data comes from, is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ret_fl.audit import schema
from ret_fl.audit.attacks import Stage
from ret_fl.audit.features import FeatureModel, load_features
from ret_fl.audit.folder import load_audit, save_audit
from ret_fl.audit.generate import Generated, generate, load_denoiser
from ret_fl.audit.inputs import AuditData, Background, Options, distinct_rows
from ret_fl.audit.pipelines import is_text_to_image, locate, pixel_shape, require_text_to_image
from ret_fl.audit.ready import Channels, as_options, read_bytes, read_some
from ret_fl.audit.report import Pictures
from ret_fl.audit.run import require_enough, require_same_shape, run_audit
from ret_fl.background import background_of
from ret_fl.config import ConfigError, DataConfig, RunConfig
from ret_fl.data.sources import DataSplits, load_images, load_splits
from ret_fl.data.store import SampleStore
from ret_fl.dataspec import builtin_splits, is_builtin, require_named, source_of
from ret_fl.diffusion.text_to_image import data_read, is_stable_diffusion
from ret_fl.loading import load_auditors
from ret_fl.rundir import RunDir

SAMPLES = "samples"
"""Folder of drawn images inside an audit's, so that an interrupted audit goes on where it was."""
HELD_OUT = 0.2
"""Share of the reference that is held out at least, where nothing else is. Without a floor no copy rate can be read; a
reference smaller than the training set raises both alike."""

MEASURES = ("threshold", "members", "auditors", "auditor_options")
"""The options that decide what is measured; the others say where and how fast."""

PROMPT_SEED = 42
"""Of the choice of training captions as prompts."""

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

    @classmethod
    def at_end(cls, config: RunConfig) -> Drawing:
        """As a run draws when it ends; one that drew nothing has the default number of samples."""
        samples = config.samples or cls.samples
        prompts = training_prompts(config, samples)
        guidance = config.text.guidance if prompts else cls.guidance
        return cls(samples, config.seed, config.sample_steps, prompts, guidance)


def training_prompts(config: RunConfig, count: int) -> tuple[str, ...]:
    """Captions of training images drawn with replacement, the same for all runs on the same data; () for other models.

    So are those of Somepalli et al. 2023 and of the paper, which draw 4,000.
    """
    if not is_stable_diffusion(config.model.init_from):
        return ()
    captions = load_splits(data_read(config)).train.captions
    if captions is None:
        raise ConfigError("data.captions: the run's images have lost their captions, which are its prompts")
    chosen = np.random.default_rng(PROMPT_SEED).integers(len(captions), size=count)
    return tuple(captions[i][0] for i in chosen)


def prompts_of(data: str, count: int) -> tuple[str, ...]:
    """As `training_prompts`, where `data` is the folder of a run."""
    return training_prompts(RunDir.existing(data).read_config(), count) if is_run(Path(data)) else ()


def own_drawing(model: Path) -> Drawing:
    """As a run drew at its end; for any other model the defaults."""
    return Drawing.at_end(RunDir.existing(model).read_config()) if is_run(model) else Drawing()


def own_auditors(model: Path, options: Options) -> Options:
    """The options with the auditors of a run; as they are for any other model."""
    if not is_run(model):
        return options
    audit = RunDir.existing(model).read_config().audit
    return replace(options, auditors=audit.auditors, auditor_options=audit.options)


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
        out: the folder; None: as `audit_folder` says.
        drawing, options: how images are drawn, and how they are measured; None: as a run was at its end, or the
            defaults.
        leakage: whether to attack the model by its losses, where it is one that has losses.
        on_stage: told what is done next. on_drawn: told how many images of how many are drawn.

    Raises:
        ValueError, FileNotFoundError: the model or the data cannot be used; the message says what to change.
    """
    path = Path(model)
    if data is None and not is_run(path):
        raise ConfigError(f"{path} is no run of ret-fl, which would know its training images: name them as data")
    drawing = drawing or own_drawing(path)
    options = options or own_auditors(path, Options(seed=drawing.seed))
    load_auditors(options.auditors, options.auditor_options)  # before anything is drawn
    folder = (
        Path(out)
        if out is not None
        else audit_folder(path, drawing, options, data, reference, held_out, features=features, leakage=leakage)
    )
    networks = [load_features(spec, device=options.device) for spec in features]
    real = open_data(data if data is not None else model, reference, held_out, drawing)
    check_before_drawing([path], real, networks, drawing)
    on_stage(f"images of {model}")
    generated = draw(path, folder, drawing, options, on_drawn)
    audit, pictures = measure(path, generated, real, networks, options, leakage, on_stage)
    save_audit(folder, audit, pictures)
    return audit


def audit_folder(
    model: Path,
    drawing: Drawing,
    options: Options,
    data: str | Path | None = None,
    reference: str | Path | None = None,
    held_out: str | Path | None = None,
    *,
    features: Sequence[str] = (),
    leakage: bool = True,
) -> Path:
    """Where the audit of a model goes unless it is told: audits/<name>, or audit/ in a run.

    A run's summary and pictures tell of what lies in its audit/. Only the audit that it would make at its end takes
    that place. <name> is the end of the model's path, with as many parts as tell it from models audited before.
    """
    if is_run(model):
        same_data = (data is None or Path(data) == model) and reference is None and held_out is None
        own = own_auditors(model, Options())
        same_measures = all(getattr(options, k) == getattr(own, k) for k in MEASURES)
        if same_data and drawing == own_drawing(model) and same_measures and leakage and not features:
            return model / "audit"
    parts = model.resolve().parts[1:]
    folders = [Path("audits") / "-".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
    return next((folder for folder in folders if _audited_in(folder) in (None, model.resolve())), folders[-1])


def _audited_in(folder: Path) -> Path | None:
    """The model whose audit a folder holds, if it holds one."""
    try:
        return Path(load_audit(folder)[0].model.path).resolve()
    except (OSError, ValueError):
        return None


def check_before_drawing(
    models: Sequence[Path], data: AuditData, features: Sequence[FeatureModel], drawing: Drawing
) -> None:
    """Refuse what would else be refused after drawing, which may take hours.

    Raises `ValueError`: sizes of images that differ, image models that cannot take them, ready images that cannot be
    read, text-to-image without prompts, fewer than 4 training images.
    """
    for model in models:
        require_same_shape(data, _drawn_shape(model, drawing))
    require_enough(data)
    for network in features:
        network.features(data.train.pixels(np.arange(1)))


def _drawn_shape(model: Path, drawing: Drawing) -> tuple[int, int, int] | None:
    """(C, H, W) of the images that `draw` will give; None where only drawing them can tell."""
    kind, folder = locate(model)
    if kind == "images":
        images, _ = read_some(model, drawing.samples, drawing.image_size, drawing.channels)
        _, *shape = images.shape
        return shape[0], shape[1], shape[2]
    if is_text_to_image(folder):
        require_text_to_image(folder, drawing.prompts)
        return None
    channels, height, width = pixel_shape(folder)
    if drawing.image_size:
        height = width = drawing.image_size
    return {"auto": channels, "grey": 1, "rgb": 3}[drawing.channels], height, width


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
    features: Sequence[FeatureModel] = (),
    options: Options | None = None,
    leakage: bool = True,
    on_stage: Stage = lambda stage: None,
) -> tuple[schema.Audit, Pictures]:
    """The audit of one model's images against data already open; a run's folder adds what it recorded."""
    options = options or Options()
    run = RunDir.existing(model) if is_run(model) else None
    return run_audit(
        model,
        generated,
        data,
        denoiser=lambda: load_denoiser(model, options.device) if leakage else None,
        feature_models=features,
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
        data: a run's folder (its own split), training images (a folder of image files, a .npy, a save_to_disk folder,
            parquet files or CIFAR's python version, whose test batch is what reference and held_out take of it), or, if
            there is no such path, one of the built-in sources (digits, mnist, glyphs, patches, faces; split as by
            default) or a hub name. Floats of a .npy are rounded to 8 bits.
        reference, held_out: real images never trained on, in the same forms as training images. Where no images are
            held out, what `reference` has beyond the number of distinct training images is, and a fifth of it at least.
        drawing: its image_size and channels bring files to the model's size.

    Raises:
        ValueError: unreadable or missing images (`ConfigError`; the message names the file or setting), or sets that
            share images.
        FileNotFoundError: no such .npy file.
    """
    drawing = drawing or Drawing()
    require_named(data, reference, held_out)
    if is_run(Path(data)):
        opened = data_of(RunDir.existing(data).read_config())
    elif is_builtin(data):
        opened = _from_splits(str(data), builtin_splits(str(data)))
    elif (Path(data) / "model_index.json").is_file():
        raise ConfigError(f"{data} is a model without its training images: name them by --data")
    else:
        opened = AuditData(str(data), _store(data, drawing, trained=True))
    if held_out is not None:
        further = _store(held_out, drawing, trained=False)
        _refuse_shared("held_out", further, "train", opened.train)
        if reference is None and opened.reference is not None:
            _refuse_shared("held_out", further, "reference", opened.reference)
        opened = replace(opened, held_out=further, one_split=False)
    if reference is not None:
        opened = _with_reference(opened, _store(reference, drawing, trained=False))
    return opened


def data_of(config: RunConfig) -> AuditData:
    """The data of a run."""
    return _from_splits(config.data.path or config.data.source, load_splits(data_read(config)))


def _from_splits(source: str, splits: DataSplits) -> AuditData:
    held_out = splits.held_out if len(splits.held_out) else None
    return AuditData(source, splits.train, splits.reference, held_out, splits.canaries, one_split=True)


def _store(spec: str | Path, drawing: Drawing, *, trained: bool) -> SampleStore:
    """The images of files; of CIFAR, which tells them apart, those that train or those that do not."""
    path = Path(spec).expanduser()
    if path.suffix == ".npy":
        return SampleStore(read_bytes(path, drawing.image_size, drawing.channels))
    config = DataConfig.model_validate(
        {
            "source": source_of(spec),
            "path": str(spec),
            "image_size": drawing.image_size,
            "channels": drawing.channels,
            "captions": "",
            "caption_column": "",
        }
    )
    try:
        found = load_images(config)
    except ConfigError as error:
        raise ConfigError(as_options(error, spec)) from error
    store = SampleStore(found.images, found.labels, found.num_classes)
    return store if found.outside is None else store.subset(np.flatnonzero(found.outside != trained))


def _with_reference(data: AuditData, reference: SampleStore) -> AuditData:
    """Distinct reference images, as many as distinct training images, and held-out ones where there are none yet."""
    _refuse_shared("reference", reference, "train", data.train)
    if data.held_out is not None:
        _refuse_shared("held_out", data.held_out, "reference", reference)
    order = np.random.default_rng(0).permutation(distinct_rows(reference))
    count, held_out = len(distinct_rows(data.train)), data.held_out
    if held_out is None:
        count = min(count, len(order) - round(HELD_OUT * len(order)))
        held_out = reference.subset(np.sort(order[count:])) if count < len(order) else None
    return replace(data, reference=reference.subset(np.sort(order[:count])), held_out=held_out, one_split=False)


def _refuse_shared(name: str, images: SampleStore, other_name: str, others: SampleStore) -> None:
    shared = len(np.intersect1d(images.content_hashes, others.content_hashes))
    if shared:
        raise ValueError(f"{name} shares {shared} images with {other_name}: give images that are in one set only")
