"""What --data, --reference and --held-out may name: told before anything is read or asked of the network."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.cifar import find_layouts
from ret_fl.data.folder import IMAGE_SUFFIXES
from ret_fl.data.sources import DataSplits, load_splits
from ret_fl.sections import DISK_SOURCES

BUILTIN = tuple(s for s in get_args(DataConfig.model_fields["source"].annotation) if s not in DISK_SOURCES)
FORMS = (
    "a folder of images, a .npy or parquet file, a save_to_disk folder, CIFAR's python version (.tar.gz or its folder) "
    "or a hub dataset as owner/name"
)


def require_named(data: str | Path, reference: str | Path | None, held_out: str | Path | None) -> None:
    """Refuse what cannot be images: typing errors, empty folders, files of other kinds.

    Raises `ConfigError`, which names the option and what it may be.
    """
    _require_images("--data", data, f"one of {', '.join(BUILTIN)}, a run's folder, {FORMS}")
    for option, spec in (("--reference", reference), ("--held-out", held_out)):
        if spec is not None:
            _require_images(option, spec, FORMS)


def is_builtin(data: str | Path) -> bool:
    """Whether `data` is a built-in source: nothing lies at a path of this name."""
    return str(data) in BUILTIN and not Path(data).exists()


def source_of(data: str | Path) -> str:
    """The data.source that reads a path, or else a hub dataset of this name: hf, cifar or image-folder."""
    path = Path(data).expanduser()
    if find_layouts(path):
        return "cifar"
    # a folder of datasets' own files holds no image files but tells itself apart by these
    is_dataset = path.suffix == ".parquet" or not path.is_dir() or _holds_dataset(path)
    return "hf" if is_dataset else "image-folder"


def _holds_dataset(folder: Path) -> bool:
    names = ("state.json", "dataset_dict.json")
    return any((folder / name).is_file() for name in names) or any(folder.rglob("*.parquet"))


def builtin_splits(source: str) -> DataSplits:
    """A built-in source, split as a run does by default."""
    return load_splits(DataConfig.model_validate({"source": source}))


def told_split(data: str) -> str:
    """What of a built-in source is train, reference and held out, for people; '' for any other data."""
    if not is_builtin(data):
        return ""
    return (
        f"{data}, split as a run does by default: {builtin_splits(data).describe()}. A run trained with other data "
        "settings has another split: name it by --data RUN"
    )


def _require_images(option: str, spec: str | Path, forms: str) -> None:
    path, text = Path(spec).expanduser(), str(spec)
    tells_itself = any((path / name).is_file() for name in ("config.json", "model_index.json"))  # a run, a pipeline
    if option == "--data" and (is_builtin(spec) or tells_itself):
        return
    if find_layouts(path):
        return
    if path.is_dir():
        if not any(_is_image_or_dataset(file) for file in path.rglob("*")):
            raise ConfigError(
                f"{option} {spec}: no PNG, JPEG, WebP or BMP images in this folder, and no dataset. Give {forms}"
            )
    elif path.is_file():
        if path.suffix not in (".npy", ".parquet"):
            raise ConfigError(f"{option} {spec} is no file of images. Give {forms}")
    elif text in BUILTIN:
        raise ConfigError(f"{option} {spec}: built-in sources are for --data only. Give {forms}")
    elif not any(character in text for character in "*?[") and not _may_be_on_the_hub(text):
        raise ConfigError(f"{option} {spec}: there is no such file or folder. Give {forms}")


def _is_image_or_dataset(file: Path) -> bool:
    return file.suffix.lower() in {*IMAGE_SUFFIXES, ".parquet"} or file.name in ("state.json", "dataset_dict.json")


def _may_be_on_the_hub(text: str) -> bool:
    is_path = text.startswith((".", "/", "~")) or text.endswith((".npy", ".parquet"))
    return text.count("/") == 1 and not is_path
