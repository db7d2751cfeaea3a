"""The cifar source: CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in the pickles their author distributes.

A pickle is a program, and may run anything. The ones read here need no more than the two calls that rebuild a numpy
array, so the unpickler knows these two and refuses a file that names anything else, before it is called.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.decode import Encoded, decode_cached, describe_files
from ret_fl.data.images import ImageSet

SIDE = 32
PIXELS = 3 * SIDE**2


@dataclass(frozen=True)
class Layout:
    """How one of the two is distributed: its folder, its files, and where they keep the class."""

    folder: str
    training: tuple[str, ...]
    test: str
    labels: bytes
    num_classes: int

    @property
    def files(self) -> tuple[str, ...]:
        """All batches, the one that does not train last."""
        return (*self.training, self.test)


LAYOUTS = (
    Layout("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", b"labels", 10),
    Layout("cifar-100-python", ("train",), "test", b"fine_labels", 100),
)


def load_cifar(config: DataConfig) -> ImageSet:
    """The images of data.path: the training batches, then the test batch, which does not train; fine labels.

    data.path is cifar-10-python.tar.gz or cifar-100-python.tar.gz, the folder in it, or a folder with that folder.

    Raises:
        ConfigError: nothing of the kind is there, a batch is missing or damaged, a pickle asks for more than arrays, or
            as `decode_cached`.
    """
    if not config.path:
        raise ConfigError("data.source=cifar needs data.path: cifar-10-python.tar.gz, or the folder in it")
    path = Path(config.path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"data.path: {path} does not exist: put cifar-10-python.tar.gz or cifar-100-python.tar.gz there (as their "
            "author distributes them, nothing is downloaded), or set data.path to where it is"
        )
    found = find_layouts(path)
    if len(found) != 1:
        what = "holds both" if found else "is not CIFAR's python version"
        raise ConfigError(
            f"data.path: {path} {what}: name cifar-10-python.tar.gz or cifar-100-python.tar.gz, or the folder in it "
            f"({' or '.join(known.folder for known in LAYOUTS)})"
        )
    (layout,) = found
    if path.is_file():
        files, root = [path], path.parent
    else:
        root = _folder(path, layout)
        files = [root / name for name in layout.files]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(f"data.path: {', '.join(missing)} is missing: unpack the archive again")
    return decode_cached(["cifar", layout.folder, describe_files(files, root)], lambda: _encoded(path, layout), config)


def find_layouts(path: Path) -> list[Layout]:
    """Which of the two lie at a path: none, one, or both below a folder."""
    if path.is_dir():
        return [known for known in LAYOUTS if _is_folder(_folder(path, known), known)]
    if not path.is_file() or not tarfile.is_tarfile(path):
        return []
    by_folder = {known.folder: known for known in LAYOUTS}
    with tarfile.open(path) as archive:
        # the first member tells; to look at all would decompress all
        tops = (Path(member.name).parts[:1] for member in archive)
        return next(([by_folder[top[0]]] for top in tops if top and top[0] in by_folder), [])


def _folder(path: Path, layout: Layout) -> Path:
    return path / layout.folder if (path / layout.folder).is_dir() else path


def _is_folder(folder: Path, layout: Layout) -> bool:
    return folder.name == layout.folder or all((folder / name).is_file() for name in layout.files)


def _encoded(path: Path, layout: Layout) -> Encoded:
    contents = _read(path, layout)
    batches = [(name, *_batch(contents[name], name, layout)) for name in layout.files]
    images = np.concatenate([pixels for _, pixels, _ in batches])
    labels = np.concatenate([classes for _, _, classes in batches])
    names = [f"{name}[{row}]" for name, pixels, _ in batches for row in range(len(pixels))]
    outside = np.arange(len(images)) >= len(images) - len(batches[-1][1])

    def opened(i: int) -> Image.Image:
        return Image.fromarray(images[i].reshape(3, SIDE, SIDE).transpose(1, 2, 0))

    return Encoded(len(images), opened, names.__getitem__, labels, layout.num_classes, outside)


def _read(path: Path, layout: Layout) -> dict[str, bytes]:
    """Every batch's file, from the folder or, in one pass and without unpacking it, from the archive."""
    if path.is_dir():
        return {name: (_folder(path, layout) / name).read_bytes() for name in layout.files}
    members = {f"{layout.folder}/{name}": name for name in layout.files}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in members and (file := archive.extractfile(member)):
                    found[members[member.name]] = file.read()
    except (EOFError, tarfile.TarError, zlib.error, OSError) as error:
        raise ConfigError(f"data.path: {path} is damaged ({error}): download it again") from error
    if missing := [name for name in layout.files if name not in found]:
        raise ConfigError(f"data.path: {path} has no {layout.folder}/{missing[0]}: download it again")
    return found


def _batch(content: bytes, name: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3072] and classes int64 [n] of a batch."""
    table = read_pickle(content, name)
    if not isinstance(table, dict):
        raise ConfigError(f"data.path: {name} holds a {type(table).__name__}, not a batch of CIFAR")
    pixels, classes = table.get(b"data"), table.get(layout.labels)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        raise ConfigError(f"data.path: {name} has no images: its 'data' must be uint8 [n, {PIXELS}]")
    if (
        not isinstance(classes, list)
        or len(classes) != len(pixels)
        or not all(isinstance(c, int) and 0 <= c < layout.num_classes for c in classes)
    ):
        raise ConfigError(
            f"data.path: {name}: its {layout.labels.decode()!r} must be {len(pixels)} classes below "
            f"{layout.num_classes}"
        )
    return np.asarray(pixels), np.array(classes, np.int64)


# Unpickling


def read_pickle(content: bytes, name: str) -> Any:
    """What a pickle holds: dicts, lists, numbers, texts (bytes, as Python 2 wrote them) and numeric arrays.

    Raises `ConfigError` for any other content; nothing that it names is run.
    """
    try:
        return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except ConfigError as error:
        raise ConfigError(f"data.path: {name}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything, and none of it is known to the caller
        raise ConfigError(f"data.path: {name} is no whole pickle: {type(error).__name__}: {error}") from error


class _Call:
    """Stands in for one function that a pickle may name, and cannot be changed by it."""

    __slots__ = ("_does",)

    def __init__(self, does: Callable[..., Any]) -> None:
        self._does = does

    def __call__(self, *arguments: object) -> Any:
        return self._does(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise ConfigError("it changes a function")


class _NumericType:
    """Stands in for a numpy.dtype of numbers: an array of objects could hold anything.

    A pickle may set no more of it than its byte order; a real dtype's state could make it one of objects.
    """

    __slots__ = ("kind",)

    def __init__(self, code: str | bytes, *_: object) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.kind = np.dtype(text)
        if self.kind.kind not in "biuf" or self.kind.fields is not None or self.kind.subdtype is not None:
            raise ConfigError(f"an array of type {text!r}: only arrays of numbers are read")

    def __setstate__(self, state: object) -> None:
        """numpy's (3, byte order, no sub-array, no names, no fields, -1, -1, 0)."""
        plain = (None, None, None, -1, -1, 0)
        if not isinstance(state, tuple) or (*state[:1], *state[2:]) != (3, *plain):
            raise ConfigError("it changes the type of an array: only plain numbers are read")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise ConfigError(f"a byte order {order!r}")
        if order == "<":
            self.kind = self.kind.newbyteorder("<")
        elif order == ">":
            self.kind = self.kind.newbyteorder(">")


class _NumericArray(np.ndarray):
    """What numpy's _reconstruct gives, an empty array that the pickle then fills: with numbers only."""

    def __setstate__(self, state: object) -> None:
        """numpy's (version, shape, type, whether in Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _NumericType):
            raise ConfigError("it fills an array in a way that is not numpy's own")
        version, shape, kind, fortran, content = state
        if not isinstance(content, bytes):
            raise ConfigError("an array that is not filled with bytes")
        super().__setstate__((version, shape, kind.kind, fortran, content))


def _empty_array(*_: object) -> np.ndarray:
    return np.empty(0, np.uint8).view(_NumericArray)


def _latin1(text: str, encoding: str | bytes) -> bytes:
    """_codecs.encode, by which Python 3 writes bytes in old protocols."""
    if encoding not in ("latin1", b"latin1"):
        raise ConfigError(f"a text in {encoding!r}: only latin1 is read")
    return text.encode("latin1")


def _no_call(*_: object) -> NoReturn:
    raise ConfigError("numpy.ndarray is called: only numpy's own way to pickle arrays is read")


_KNOWN: Mapping[tuple[str, str], _Call] = {
    ("numpy.core.multiarray", "_reconstruct"): _Call(_empty_array),
    ("numpy._core.multiarray", "_reconstruct"): _Call(_empty_array),
    ("numpy", "ndarray"): _Call(_no_call),
    ("numpy", "dtype"): _Call(_NumericType),
    ("_codecs", "encode"): _Call(_latin1),
}
"""What a pickle may name, and what stands in for it: nothing is imported."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Call:
        if (module, name) not in _KNOWN:
            raise ConfigError(
                f"refused: the pickle wants {module}.{name}, which CIFAR does not need, and which could run anything. "
                "Take the file from the authors' site, or the parquet form (data.source=hf)"
            )
        return _KNOWN[module, name]
