"""CIFAR's files in small, byte for byte in the form in which Python 2 wrote the real ones."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Texts as Python 2's byte strings; numpy's arrays then come out as they did there, too."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: str | bytes) -> None:
        raw = value.encode("ascii") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(value: Any) -> bytes:
    out = io.BytesIO()
    _Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pixels(count: int, seed: int) -> np.ndarray:
    """uint8 [count, 3072]: red, green and blue planes, smooth enough for a perceptual hash to tell them apart."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return coarse.repeat(4, axis=2).repeat(4, axis=3).reshape(count, -1)


def write_cifar10(root: Path, each: int = 8, test: int = 10) -> Path:
    """cifar-10-batches-py/ with five batches of `each` images, classes in turn; its path."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    counts = [(f"data_batch_{i}", each) for i in range(1, 6)] + [("test_batch", test)]
    for seed, (name, count) in enumerate(counts):
        labels = [i % 10 for i in range(count)]
        batch = {
            "batch_label": name,
            "labels": labels,
            "data": pixels(count, seed),
            "filenames": [f"{name}-{i}.png" for i in range(count)],
        }
        (folder / name).write_bytes(python2_pickle(batch))
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": ["airplane"]}))
    return folder


def write_cifar100(root: Path, train: int = 40, test: int = 10) -> Path:
    """cifar-100-python/ with fine and coarse labels; its path."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate((("train", train), ("test", test))):
        batch = {
            "fine_labels": [i % 100 for i in range(count)],
            "coarse_labels": [i % 20 for i in range(count)],
            "data": pixels(count, 100 + seed),
        }
        (folder / name).write_bytes(python2_pickle(batch))
    return folder


def archive(folder: Path) -> Path:
    """<folder>.tar.gz beside it, as distributed; its path."""
    path = folder.parent / f"{folder.name}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path
