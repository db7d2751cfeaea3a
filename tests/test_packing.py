"""Weights on the wire: whatever their number and sizes, few arrays, and the same weights on the other side."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

import ret_fl.packing
from ret_fl.packing import PIECE_BYTES, PackingError, pack_state, parts, repacked, unpack_state

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=12)


@settings(deadline=None)
@given(shapes, st.integers(4, 200), st.randoms())
def test_weights_arrive_as_they_were_in_pieces_of_the_same_names_whatever_their_order(
    sizes: list[tuple[int, ...]], piece_bytes: int, random: object
) -> None:
    rng = np.random.default_rng(0)
    state = {f"raw.{i}.weight": rng.normal(size=size).astype(np.float32) for i, size in enumerate(sizes)}
    names = list(state)
    random.shuffle(names)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ret_fl.packing, "PIECE_BYTES", piece_bytes)
        record, shuffled = pack_state(state), pack_state({name: state[name] for name in names})
    assert list(record) == list(shuffled)
    found = unpack_state(record)
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].shape == value.shape
    for key, array in record.items():
        assert "," not in key or 4 * int(np.prod(array.shape)) <= piece_bytes


def test_many_small_tensors_take_few_arrays() -> None:
    state = {f"raw.{i}": np.zeros(1000, np.float32) for i in range(2000)}
    assert len(pack_state(state)) == -(-2000 // (PIECE_BYTES // 4000))


def test_a_piece_fills_whole_chunks_of_those_that_flower_cuts_arrays_into() -> None:
    (array,) = pack_state({"raw.a": np.zeros(PIECE_BYTES // 4, np.float32)}).values()
    assert len(array.slice_array()) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_was_divided_otherwise_is_divided_as_weights_are_now(dtype: type) -> None:
    rng = np.random.default_rng(0)
    weights = {f"raw.{i}": rng.normal(size=(i + 1, 300_000)).astype(np.float32) for i in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ret_fl.packing, "PIECE_BYTES", 2 << 20)
        before = {key: array.numpy().astype(dtype) for key, array in pack_state(weights).items()}
    now = pack_state(weights)
    found = repacked(before)
    assert list(before) != list(found) == list(now)
    for key, array in now.items():
        assert found[key].dtype == dtype
        np.testing.assert_array_equal(found[key], array.numpy().astype(dtype))


@pytest.mark.parametrize("key", ["raw.a:3", "raw.a:2x2,raw.b:1", "raw.a", "raw.a:x-1", "raw.a:two"])
def test_an_array_that_its_key_does_not_describe_is_refused(key: str) -> None:
    with pytest.raises(PackingError, match=r"raw\.a"):
        parts(key, np.zeros(4, np.float32))
    with pytest.raises(PackingError):
        unpack_state(ArrayRecord({key: Array(np.zeros(4, np.float32))}))


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3, np.float32))
    return file.getvalue()


def says(shape: str) -> bytes:
    """A .npy whose header says that it is larger than it is."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(12)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an array", b"PK\x03\x04", npz(), says("(100000000000000,)"), says("(3,"), says("(-3,)"),
     says("(" + "9" * 400 + ",)")],
    ids=["nothing", "text", "a zip", "an npz", "a petabyte", "a cut header", "below 0", "beyond numbers"],
)  # fmt: skip
def test_bytes_that_are_no_array_are_refused_before_memory_is_asked_for(data: bytes) -> None:
    with pytest.raises(PackingError, match="cannot be decoded"):
        unpack_state(ArrayRecord({"raw.a:3": Array("float32", (3,), "numpy.ndarray", data)}))


@pytest.mark.parametrize("key", ["raw.a:3,raw.a:0", "raw.a:3,raw.b:-0x-1", "raw.a:" + "9" * 30])
def test_keys_that_describe_no_tensors_are_refused(key: str) -> None:
    with pytest.raises(PackingError, match="does not hold the weights"):
        unpack_state(ArrayRecord({key: Array(np.zeros(3, np.float32))}))


def test_a_name_that_could_not_be_read_again_does_not_travel() -> None:
    with pytest.raises(ValueError, match="joined by commas"):
        pack_state({"raw.a,b": np.zeros(3, np.float32)})
