"""CIFAR as its author distributes it: read as it is, and never run."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cifars import archive, pixels, python2_pickle, write_cifar10, write_cifar100
from pictures import assert_disjoint, load, raw

from ret_fl.auditing import open_data
from ret_fl.config import ConfigError
from ret_fl.data.cifar import read_pickle
from ret_fl.data.sources import DataSplits


def from_cifar(path: Path, **settings: object) -> DataSplits:
    fixed = {"source": "cifar", "path": str(path), "cache_dir": str(path.parent / "cache")}
    return load(**(fixed | {"held_out": 0, "reference": False} | settings))


def test_the_stand_ins_are_pickles_as_python_2_wrote_them() -> None:
    written = python2_pickle({"data": pixels(1, 0), "labels": [3]})
    opcodes = {op.name for op, _, _ in pickletools.genops(written)}
    assert "BINSTRING" in opcodes and not opcodes & {"BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "STACK_GLOBAL"}
    names = [arg for op, arg, _ in pickletools.genops(written) if op.name == "GLOBAL"]
    assert names == ["numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"]


@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
def test_cifar_10_trains_on_its_training_batches_and_holds_the_test_batch_out(tmp_path: Path, form: str) -> None:
    folder = write_cifar10(tmp_path / "data")
    path = {"folder": folder, "parent": folder.parent, "archive": archive(folder)}[form]
    splits = from_cifar(path)
    assert (len(splits.train), len(splits.held_out), splits.reference) == (40, 10, None)
    assert splits.train.image_shape == (3, 32, 32) and splits.train.num_classes == 10
    expected = {
        (i % 10, row.tobytes()) for seed in range(5) for i, row in enumerate(pixels(8, seed))
    }  # planes as they are in the file
    assert {(int(c), x.numpy().tobytes()) for c, x in zip(*raw(splits), strict=True)} == expected
    assert {x.numpy().tobytes() for x in splits.held_out.pixels()} == {row.tobytes() for row in pixels(10, 5)}
    assert_disjoint(splits)


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    splits = from_cifar(write_cifar100(tmp_path))
    assert splits.train.num_classes == 100 and splits.train.labels is not None
    assert sorted(splits.train.labels.tolist()) == list(range(40))


def test_size_and_colour_are_as_set(tmp_path: Path) -> None:
    assert from_cifar(write_cifar10(tmp_path), image_size=8, channels="grey").train.image_shape == (1, 8, 8)


def test_folder_and_archive_are_the_same_data(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    assert from_cifar(folder).train.fingerprint == from_cifar(archive(folder)).train.fingerprint


def test_an_audit_takes_its_training_batches_as_data_and_its_test_batch_as_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_cifar10(tmp_path)
    splits = from_cifar(folder)
    data = open_data(folder, held_out=archive(folder))
    assert data.held_out is not None and (len(data.train), len(data.held_out)) == (40, 10)
    assert set(data.train.content_hashes) == set(splits.train.content_hashes)
    assert set(data.held_out.content_hashes) == set(splits.held_out.content_hashes)


# --- hostile and damaged files ----------------------------------------------------------------------------------------


DTYPE = b"\x80\x02cnumpy\ndtype\n(U\x02u8K\x00K\x01tR"
ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    folder, proof = write_cifar10(tmp_path), tmp_path / "it-ran"
    for call in (_Runs(os.system, f"touch {proof}"), _Runs(eval, f"open({str(proof)!r}, 'w')"), _Runs(Path, "x")):
        (folder / "data_batch_3").write_bytes(pickle.dumps({"data": call}, protocol))
        with pytest.raises(ConfigError, match=r"data_batch_3: refused: the pickle wants .*data\.source=hf"):
            from_cifar(folder)
        with pytest.raises(ConfigError, match="refused"):
            from_cifar(archive(folder))
    assert not proof.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # GLOBAL numpy.ndarray, called with a shape
        (b"cnumpy\nndarray\n(K\x05\x85tR.", "numpy.ndarray is called"),
        # an array of objects
        (b"cnumpy\ndtype\n(U\x01OI00\nI01\ntR.", "only arrays of numbers"),
        # BUILD on a type: fields, a sub-array, and a byte order that is none
        (DTYPE + b"(K\x03U\x01|N(U\x01xt}K\x08K\x08K\x00tb.", "changes the type of an array"),
        (DTYPE + b"(K\x03U\x01|(cnumpy\ndtype\nK\x02tNNK\x08K\x08K\x00tb.", "changes the type of an array"),
        (DTYPE + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb.", "changes the type of an array"),
        (DTYPE + b"(K\x03U\x01ONNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.", "a byte order 'O'"),
        (DTYPE + b"}b.", "changes the type of an array"),
        # BUILD on an array: of a type that is none of ours, filled with a list
        (ARRAY + b"(K\x01K\x01\x85U\x02u8\x89U\x08aaaaaaaatb.", "fills an array in a way"),
        (ARRAY + b"(K\x01K\x01\x85" + DTYPE[2:] + b"\x89]tb.", "not filled with bytes"),
        (ARRAY + b"(K\x01K\x09\x85" + DTYPE[2:] + b"\x89U\x08aaaaaaaatb.", "no whole pickle"),
        # BUILD on a function: would change the function that reads the next file
        (b"\x80\x02cnumpy\ndtype\n}U\x04call}sb.", "changes a function"),
        # NEWOBJ wants a class
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "no whole pickle"),
        # a name inside a module that is known
        (b"cnumpy\nload\n.", r"wants numpy\.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "scalar"),
        (b"c_codecs\nencode\n(U\x01aU\x04rot3tR.", "only latin1"),
        # a persistent ID
        (b"Pos.system\n.", "no whole pickle"),
    ],
)
def test_only_arrays_of_numbers_and_plain_values_are_built(program: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pickle(program, "batch")


def test_what_python_3_writes_in_an_old_protocol_is_read_too() -> None:
    table = {b"data": pixels(2, 0), b"labels": [1, 2]}
    again = read_pickle(pickle.dumps(table, 2), "batch")
    assert np.array_equal(again[b"data"], table[b"data"]) and again[b"labels"] == [1, 2]


@pytest.mark.parametrize("kind", ["<u2", ">u2", "|u1", ">f8", "<i4", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_every_kind_and_order_are_read(kind: str, order: str) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4) % 7, kind, order=order)  # type: ignore[call-overload]
    for written in (pickle.dumps(array, 2), python2_pickle(array)):
        again = read_pickle(written, "batch")
        assert (again.dtype.kind, again.dtype.itemsize) == (array.dtype.kind, array.dtype.itemsize)
        np.testing.assert_array_equal(again, array)


def test_damaged_and_missing_batches_are_named(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    whole = (folder / "data_batch_2").read_bytes()
    for content, message in [
        (whole[:100], r"data_batch_2 is no whole pickle"),
        (python2_pickle([1]), r"data_batch_2 holds a list"),
        (python2_pickle({"data": pixels(2, 0).astype(np.int16), "labels": [0, 1]}), r"must be uint8 \[n, 3072\]"),
        (python2_pickle({"data": pixels(2, 0), "labels": [0, 10]}), r"'labels' must be 2 classes below 10"),
        (python2_pickle({"data": pixels(2, 0), "labels": [0]}), r"'labels' must be 2 classes below 10"),
    ]:
        (folder / "data_batch_2").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            from_cifar(folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(ConfigError, match=r"data_batch_2 is missing"):
        from_cifar(folder)
    with pytest.raises(ConfigError, match=r"has no cifar-10-batches-py/data_batch_2: download it again"):
        from_cifar(archive(folder))
    cut = archive(folder)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"cifar-10-batches-py\.tar\.gz is damaged .*: download it again"):
        from_cifar(cut)


def test_other_folders_and_files_are_refused_with_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "cifar.tar.gz").write_bytes(b"no archive")
    for path in (tmp_path / "photos", tmp_path / "cifar.tar.gz"):
        with pytest.raises(ConfigError, match=r"is not CIFAR's python version: name cifar-10-python\.tar\.gz"):
            from_cifar(path)
    with pytest.raises(ConfigError, match=r"nowhere\.tar\.gz does not exist: put cifar-10-python\.tar\.gz or"):
        from_cifar(tmp_path / "nowhere.tar.gz")
    write_cifar10(tmp_path / "both")
    write_cifar100(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"both holds both: name cifar-10-python\.tar\.gz or"):
        from_cifar(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"data\.source=cifar needs data\.path"):
        load(source="cifar")
