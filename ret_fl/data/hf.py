"""The hf source: images of a `datasets` dataset, from the hub, a save_to_disk folder, or parquet files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.decode import Encoded, cache_dir, decode_cached, describe_files
from ret_fl.data.images import Captions, ImageSet


def load_hf(config: DataConfig) -> ImageSet:
    """The images of data.path (split data.split), in row order, with classes and captions if their columns exist.

    data.path is a folder written by `save_to_disk`, a parquet file, a folder or glob of parquet files, or the name of
    a dataset on the hub. A file or glob is taken whole, as the split asked for.

    Raises:
        ConfigError: the path, split or column does not exist, `datasets` is missing, or as `decode_cached`.
    """
    if not config.path:
        raise ConfigError("data.source=hf needs data.path: a hub name, a save_to_disk folder or parquet files")
    columns = [config.split, config.image_column, config.label_column, config.caption_column]
    root, files = _local(config.path)
    if files:
        contents = ["hf", describe_files(files, root), columns]
        return decode_cached(contents, lambda: _encoded(_open_local(root, files, config), config), config)
    dataset = _call(config, "load_dataset", config.path, split=config.split)
    return decode_cached(["hf", dataset._fingerprint, columns], lambda: _encoded(dataset, config), config)


def _local(path: str) -> tuple[Path, list[Path]]:
    """The folder and files that `path` names on this machine; no files if it can only be a hub name."""
    given = Path(path).expanduser()
    if any(character in path for character in "*?["):
        anchor = Path(given.anchor or ".")
        files = sorted(f for f in anchor.glob(given.relative_to(given.anchor).as_posix()) if f.is_file())
        if not files:
            raise ConfigError(f"data.path: no file matches {path}")
        return anchor, files
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        files = sorted(f for f in given.rglob("*") if f.is_file())
        saved = any(f.name in ("state.json", "dataset_dict.json") for f in files)
        if not saved and not any(f.suffix == ".parquet" for f in files):
            raise ConfigError(
                f"data.path: {given} holds neither a saved dataset nor parquet files; "
                "for a folder of image files set data.source=image-folder"
            )
        return given, files
    if given.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or given.suffix == ".parquet":
        raise ConfigError(f"data.path: {given} does not exist")
    return Path(), []


def _open_local(root: Path, files: list[Path], config: DataConfig) -> Any:
    if any(f.name in ("state.json", "dataset_dict.json") for f in files):
        loaded = _call(config, "load_from_disk", str(root))
        if not isinstance(loaded, dict):
            return loaded
        if config.split not in loaded:
            raise ConfigError(f"data.split: {root} has the splits {sorted(loaded)}, not {config.split!r}")
        return loaded[config.split]
    if Path(config.path).expanduser() == root:
        return _call(config, "load_dataset", str(root), split=config.split)
    names = [str(f) for f in files]
    return _call(config, "load_dataset", "parquet", data_files={config.split: names}, split=config.split)


def _call(config: DataConfig, function: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.function(...)`, its failures as ConfigError."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("data.source=hf needs datasets: pip install 'ret-fl[hf]'") from None
    if function == "load_dataset" and config.cache_dir:
        options["cache_dir"] = str(cache_dir(config) / "hf")
    try:
        return getattr(datasets, function)(*arguments, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"data.path: cannot load {config.path} (data.split={config.split}): {error}") from error


def _encoded(dataset: Any, config: DataConfig) -> Encoded:
    import datasets

    if config.image_column not in dataset.column_names:
        raise ConfigError(f"data.image-column: no {config.image_column!r} among {dataset.column_names}")
    if not len(dataset):
        raise ConfigError(f"data.path: {config.path} (data.split={config.split}) has no rows")
    labels, num_classes = _labels(dataset, config)
    rows = dataset.select_columns([config.image_column])
    try:
        rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # the last is what pyarrow raises for such a cast
        raise ConfigError(f"data.image-column: {config.image_column!r} does not hold images: {error}") from error

    def open_row(i: int) -> Image.Image:
        cell = rows[i][config.image_column]
        if cell is None:
            raise ValueError("the row has no image")
        return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))

    return Encoded(len(rows), open_row, lambda i: f"row {i}", labels, num_classes, _captions(dataset, config))


def _captions(dataset: Any, config: DataConfig) -> Captions | None:
    if config.caption_column not in dataset.column_names:
        return None
    captions: list[tuple[str, ...]] = []
    for i, cell in enumerate(dataset[config.caption_column]):
        own = (cell,) if isinstance(cell, str) else cell
        if not isinstance(own, list | tuple) or not own or not all(isinstance(text, str) for text in own):
            raise ConfigError(
                f"data.caption-column: row {i} of {config.caption_column!r} has no caption, or list of them"
            )
        captions.append(tuple(own))
    return tuple(captions)


def _labels(dataset: Any, config: DataConfig) -> tuple[np.ndarray | None, int]:
    if config.label_column not in dataset.column_names:
        return None, 0
    values = np.array(dataset[config.label_column][:])
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise ConfigError(
            f"data.label-column: {config.label_column!r} must hold one integer or string a row; "
            "name another column, or one that does not exist to go without classes"
        )
    declared = getattr(dataset.features[config.label_column], "num_classes", None)
    if declared is not None and values.min() >= 0:
        return values.astype(np.int64), int(declared)
    names, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), len(names)
