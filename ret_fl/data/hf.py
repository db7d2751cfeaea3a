"""The hf source: images of a `datasets` dataset, from the hub, a save_to_disk folder, or parquet files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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
    a dataset on the hub. A file or glob is taken whole, as the split asked for. The rows of data.held-out-path (split
    data.held-out-split), if it is set, come last and do not train.

    Raises:
        ConfigError: the path, split or column does not exist, `datasets` is missing, or as `decode_cached`.
    """
    if not config.path:
        raise ConfigError("data.source=hf needs data.path: a hub name, a save_to_disk folder or parquet files")
    contents, open_training = _found(config)
    if not config.held_out_path:
        return decode_cached(contents, lambda: _encoded([open_training()], config), config)
    beside = config.model_copy(update={"path": config.held_out_path, "split": config.held_out_split})
    others, open_others = _found(beside)
    return decode_cached([contents, others], lambda: _encoded([open_training(), open_others()], config), config)


def _found(config: DataConfig) -> tuple[object, Callable[[], Any]]:
    """What tells the dataset at data.path from any other, and how to open it."""
    columns = [config.split, config.image_column, config.label_column, config.caption_column]
    root, files = _local(config.path)
    if files:
        return ["hf", describe_files(files, root), columns], lambda: _open_local(root, files, config)
    dataset = _call(config, "load_dataset", config.path, split=config.split)
    return ["hf", dataset._fingerprint, columns], lambda: dataset


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


def _encoded(datasets: Sequence[Any], config: DataConfig) -> Encoded:
    """The rows of all datasets one after the other; those of the second and further ones must not train."""
    tables = [_image_rows(dataset, config) for dataset in datasets]
    labels, num_classes = _labels(datasets, config)
    ends = np.cumsum([len(table) for table in tables])

    def place(i: int) -> tuple[int, int]:
        which = int(np.searchsorted(ends, i, side="right"))
        return which, i - int(ends[which - 1] if which else 0)

    def open_row(i: int) -> Image.Image:
        which, row = place(i)
        cell = tables[which][row][config.image_column]
        if cell is None:
            raise ValueError("the row has no image")
        return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))

    def name(i: int) -> str:
        which, row = place(i)
        return f"held-out row {row}" if which else f"row {row}"

    outside = np.arange(ends[-1]) >= ends[0] if len(tables) > 1 else None
    return Encoded(int(ends[-1]), open_row, name, labels, num_classes, outside, _captions(datasets, config))


def _image_rows(dataset: Any, config: DataConfig) -> Any:
    """The image column alone, its cells undecoded."""
    import datasets

    if config.image_column not in dataset.column_names:
        raise ConfigError(f"data.image-column: no {config.image_column!r} among {dataset.column_names}")
    if not len(dataset):
        raise ConfigError(f"data.path: {config.path} (data.split={config.split}) has no rows")
    rows = dataset.select_columns([config.image_column])
    try:
        return rows.cast_column(config.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # the last is what pyarrow raises for such a cast
        raise ConfigError(f"data.image-column: {config.image_column!r} does not hold images: {error}") from error


def _captions(datasets: Sequence[Any], config: DataConfig) -> Captions | None:
    if any(config.caption_column not in dataset.column_names for dataset in datasets):
        return None
    captions: list[tuple[str, ...]] = []
    for i, cell in enumerate(cell for dataset in datasets for cell in dataset[config.caption_column]):
        own = (cell,) if isinstance(cell, str) else cell
        if not isinstance(own, list | tuple) or not own or not all(isinstance(text, str) for text in own):
            raise ConfigError(
                f"data.caption-column: row {i} of {config.caption_column!r} has no caption, or list of them"
            )
        captions.append(tuple(own))
    return tuple(captions)


def _labels(datasets: Sequence[Any], config: DataConfig) -> tuple[np.ndarray | None, int]:
    if any(config.label_column not in dataset.column_names for dataset in datasets):
        return None, 0
    columns = [np.array(dataset[config.label_column][:]) for dataset in datasets]
    if len({column.dtype.kind == "U" for column in columns}) > 1:
        raise ConfigError(
            f"data.label-column: {config.label_column!r} holds texts in one of data.path and data.held-out-path, and "
            "numbers in the other"
        )
    values = np.concatenate(columns)
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise ConfigError(
            f"data.label-column: {config.label_column!r} must hold one integer or string a row; "
            "name another column, or one that does not exist to go without classes"
        )
    told = [getattr(dataset.features[config.label_column], "names", None) for dataset in datasets]
    declared = next((own for own in told if own is not None), None)
    if odd := [own for own in told if own is not None and own != declared]:
        raise ConfigError(
            f"data.label-column: data.path and data.held-out-path number their classes each in its own way "
            f"({_shortened(declared)}; {_shortened(odd[0])}): save both with the same classes, or name a column that "
            "does not exist to go without"
        )
    if declared is not None and values.dtype.kind in "iu" and values.min() >= 0:
        if (most := int(values.max())) >= len(declared):
            raise ConfigError(
                f"data.label-column: a row has class {most}, and only {len(declared)} are declared "
                f"({_shortened(declared)}): save data.path and data.held-out-path with the same classes"
            )
        return values.astype(np.int64), len(declared)
    names, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), len(names)


def _shortened(names: Sequence[str] | None) -> str:
    """Some names of classes, and how many there are."""
    names = list(names or ())
    return f"{len(names)} classes: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
