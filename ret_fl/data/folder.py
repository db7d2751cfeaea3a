"""The image-folder source: PNG, JPEG, WebP and BMP files below a folder; the top sub-folder is the class.

A captions.json in the folder gives each image its captions.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.decode import Encoded, decode_cached, describe_files
from ret_fl.data.images import Captions, ImageSet

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load_folder(config: DataConfig) -> ImageSet:
    """All images below data.path, in the order of their paths.

    Those below data.held-out-path, if it is set, come last and do not train. Classes are the names of the top
    sub-folders, sorted; images beside such folders form a class of their own. Without sub-folders there are no classes.

    Raises:
        ConfigError: data.path is unset, missing, or holds no images; captions that are not those of the images; or as
            `decode_cached`.
    """
    if not config.path:
        raise ConfigError("data.source=image-folder needs a folder of images in data.path")
    training, root = _images(config.path, "data.path"), Path(config.path).expanduser()
    contents: list[object] = ["image-folder", describe_files(training, root)]
    files, relative, outside = training, [file.relative_to(root) for file in training], None
    names = [path.as_posix() for path in relative]
    folders = [(root, training)]
    if config.held_out_path:
        others, beside = _images(config.held_out_path, "data.held-out-path"), Path(config.held_out_path).expanduser()
        contents.append(describe_files(others, beside))
        files, relative = training + others, relative + [file.relative_to(beside) for file in others]
        names += [file.as_posix() for file in others]
        outside = np.arange(len(files)) >= len(training)
        folders.append((beside, others))

    captioned = bool(config.captions) and (root / config.captions).is_file()

    def find() -> Encoded:
        labels, num_classes = _classes(relative)
        captions = None
        if captioned:
            each = [_captions(place / config.captions, place, images) for place, images in folders]
            captions = tuple(own for part in each for own in part)
        return Encoded(
            len(files), lambda i: Image.open(files[i]), names.__getitem__, labels, num_classes, outside, captions
        )

    if captioned:
        contents += [
            describe_files([told], told.parent) for place, _ in folders if (told := place / config.captions).is_file()
        ]
    return decode_cached(contents, find, config)


def _images(path: str, setting: str) -> list[Path]:
    """The image files below a folder, sorted. Raises `ConfigError` naming the setting if there are none."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{setting}: {root} is not a folder")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ConfigError(f"{setting}: no PNG, JPEG, WebP or BMP images below {root}")
    return files


def _captions(path: Path, root: Path, images: list[Path]) -> Captions:
    """The captions that a file gives the images below `root`, by their paths there. Raises `ConfigError`.

    The file holds an object from paths to a caption or a list of them. Its paths may begin elsewhere, as they do in the
    files of Somepalli et al.: their ends count.
    """
    names = [image.relative_to(root).as_posix() for image in images]
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.captions: {path} cannot be read: {error}; data.captions='' reads none") from None
    if not isinstance(told, dict):
        raise ConfigError(f"data.captions: {path} must hold one object, from the path of an image to its captions")
    keys = _keys(told, names, path)
    captions = []
    for name in names:
        own = told[keys[name]] if name in keys else None
        own = [own] if isinstance(own, str) else own
        if not isinstance(own, list) or not own or not all(isinstance(text, str) for text in own):
            raise ConfigError(
                f"data.captions: {path} gives {name} no caption (a text, or a list of some); data.captions='' reads "
                "none"
            )
        captions.append(tuple(own))
    return tuple(captions)


def _keys(told: dict[str, object], names: list[str], path: Path) -> dict[str, str]:
    """Which key of a captions file is about each image: its very path, else the key that ends with it.

    Raises `ConfigError` where that leaves a choice: other captions by two keys for one image, or two images for a key.
    """
    exact = {name for name in names if name in told}
    keys = {name: name for name in exact}
    known, depths = set(names), sorted({len(PurePosixPath(name).parts) for name in names}, reverse=True)
    for key in told:
        if key in exact:
            continue
        parts = PurePosixPath(key.replace("\\", "/")).parts
        ends = ["/".join(parts[-depth:]) for depth in depths if depth <= len(parts)]
        ends = [end for end in ends if end in known]
        if ends and ends[0] in exact:
            continue  # about an image that the file names by its very path, too
        found = [end for end in ends if end not in exact]
        if len(found) > 1:
            raise ConfigError(
                f"data.captions: {path} has {key}, whose end is the path of {found[0]} and of {found[1]}: write paths "
                "as they are below the image folder"
            )
        for name in found:
            if told[keys.setdefault(name, key)] != told[key]:
                raise ConfigError(
                    f"data.captions: {path} has other captions for {keys[name]} than for {key}, and both may be "
                    f"{name}: write paths as they are below the image folder"
                )
    return keys


def _classes(paths: list[Path]) -> tuple[np.ndarray | None, int]:
    """The class of each relative path (int64 [N]) and how many there are; None and 0 if no path has a folder."""
    tops = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    if not any(tops):
        return None, 0
    names, labels = np.unique(tops, return_inverse=True)
    return labels.astype(np.int64), len(names)
