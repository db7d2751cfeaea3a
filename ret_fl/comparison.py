"""Audits of several models against the same data, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ret_fl.audit import schema
from ret_fl.audit.attacks import Stage
from ret_fl.audit.features import load_features
from ret_fl.audit.folder import save_audit
from ret_fl.audit.inputs import AuditData, Options
from ret_fl.audit.plane import plane_figure
from ret_fl.audit.report import Pictures
from ret_fl.auditing import Drawing, Drawn, check_before_drawing, draw, is_run, measure
from ret_fl.checkpoint import checkpoints
from ret_fl.config import ConfigError
from ret_fl.data.sources import load_splits
from ret_fl.diffusion.text_to_image import data_read
from ret_fl.handover import save_model
from ret_fl.loading import load_auditors
from ret_fl.rundir import RunDir


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

    out/<name>/ has each model's audit, early-stopped ones included, from when it is measured; in the end the reports
    show the others beside it, and out/plane.png is the copy-quality plane. early_stop: models of one training at
    growing lengths, oldest first. All are drawn from alike: with the defaults, unless `drawing` says otherwise.

    Returns the audits in the order of `models`, and the baseline's. Raises as `audit_model`, and `ConfigError` if two
    models would share a folder, as one named twice does.
    """
    drawing = drawing or Drawing()
    options = options or Options(seed=drawing.seed)
    load_auditors(options.auditors, options.auditor_options)  # before anything is drawn
    every = [*models, *early_stop]
    names = unique_names(every)
    folders = [out / _as_folder(name) for name in names]
    _refuse_one_folder(every, folders)
    networks = [load_features(spec, device=options.device) for spec in features]
    check_before_drawing(every, data, networks, drawing)

    def one(i: int, by_losses: bool) -> tuple[schema.Audit, Pictures]:
        on_stage(f"images of {names[i]}")
        generated = replace(draw(every[i], folders[i], drawing, options, on_drawn), name=names[i])
        audit, pictures = measure(every[i], generated, data, networks, options, by_losses, on_stage)
        save_audit(folders[i], audit, pictures)  # the next one may take hours, or fail
        return audit, pictures

    found = [one(i, leakage) for i in range(len(models))]
    curve = [one(i, False)[0] for i in range(len(models), len(every))]
    audits = [audit for audit, _ in found]
    base = audits[list(models).index(baseline)] if baseline is not None else None
    for folder, (audit, pictures) in zip(folders, found, strict=False):
        others = [a for a in audits if a is not audit]
        save_audit(
            folder, audit, pictures, baseline=base if audit is not base else None, others=others, early_stop=curve
        )
    if any(a.replication.copy_rates and a.fidelity for a in audits):
        plane_figure(audits, base, curve).savefig(out / "plane.png", dpi=150)
    return audits, base


def _as_folder(name: str) -> str:
    return name.replace("/", "-")


def _refuse_one_folder(models: Sequence[Path], folders: Sequence[Path]) -> None:
    taken: dict[Path, Path] = {}
    for model, folder in zip(models, folders, strict=True):
        if folder in taken:
            raise ConfigError(
                f"{taken[folder]} and {model} would share the folder {folder}: name every model once, or rename one"
            )
        taken[folder] = model


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell it from the others."""
    parts = [path.resolve().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        others = [p for p in parts if p != own]
        depth = next((d for d in range(1, len(own)) if all(p[-d:] != own[-d:] for p in others)), len(own))
        return "/".join(own[-depth:])

    return [name(own) for own in parts]


def checkpoint_models(models: Sequence[Path], folder: Path) -> list[Path]:
    """A diffusers pipeline in `folder` of every checkpoint that each run kept, oldest first; another model is its own.

    Raises `ConfigError` if a run kept none but the first: `keep-checkpoints` says how many stay.
    """
    found = []
    for model, name in zip(models, unique_names(models), strict=True):
        of_run = _save_checkpoints(RunDir.existing(model), folder / _as_folder(name)) if is_run(model) else [model]
        if not of_run:
            raise ConfigError(
                f"--early-stop {model}: no checkpoint there; train with keep-checkpoints=1000 to keep all"
            )
        found += of_run
    return found


def _save_checkpoints(run: RunDir, folder: Path) -> list[Path]:
    config = run.read_config()
    data = load_splits(data_read(config)).train
    models = []
    for checkpoint in checkpoints(run.checkpoints):
        if checkpoint.round:
            path = folder / f"{run.path.name}, round {checkpoint.round}"
            save_model(path, config, data, checkpoint.weights, checkpoint.shards, checkpoint.ledger)
            models.append(path)
    return models
