"""A model's weights on the wire: many tensors end to end in one array, whose key says which.

Flower enters every array of a message, and every 5 MB of it, into the SuperLink's database, and locks that while it
does and while it deletes them. A U-Net has hundreds of small tensors: one by one they keep other SuperNodes waiting
for longer than the 5 s after which Flower answers "database is locked". Averages, medians and norms are the same.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

State = dict[str, NDArray[np.float32]]
"""A model's weights: 'raw.<name>' and 'ema.<name>'."""

PIECE_BYTES = 4 * (5 << 20) - 4096
"""No array is larger, unless a single tensor is. Flower cuts arrays at 5 MiB: five entries, of four pieces."""


class PackingError(ValueError):
    """Arrays that are not what they say."""


_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def decode(record: ArrayRecord) -> dict[str, NDArray]:
    """Every array by its key. Raises `PackingError` for one whose bytes are not the array it says it is."""
    try:
        return {key: _array(value) for key, value in record.items()}
    except (ValueError, TypeError, OSError, EOFError, SyntaxError, OverflowError, tokenize.TokenError) as error:
        raise PackingError(f"an array cannot be decoded: {error}") from None


def _array(value: Array) -> NDArray:
    """What Flower makes of its bytes, once it is clear that they are one array and ask for no more memory."""
    stream = io.BytesIO(value.data)
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise ValueError(f"its format is {version}")
    shape, _, dtype = _READERS[version](stream)
    if math.prod(shape) * dtype.itemsize != len(value.data) - stream.tell():
        raise ValueError(f"it is {len(value.data)} bytes long and says it is {dtype} {shape}")
    return value.numpy()


def pack_state(state: State) -> ArrayRecord:
    """A state in arrays of at most `PIECE_BYTES`, the same for the same names and shapes in whatever order."""
    if odd := [name for name in state if "," in name]:
        raise ValueError(f"weights cannot be called {odd[0]!r}: names travel joined by commas")
    record = ArrayRecord()
    for names in _pieces(state):
        record[_key(names, state)] = Array(np.concatenate([state[name].ravel() for name in names]))
    return record


def _key(names: Sequence[str], state: Mapping[str, NDArray]) -> str:
    """What the array of these tensors is called."""
    return ",".join(f"{name}:{'x'.join(map(str, state[name].shape))}" for name in names)


def _pieces(state: Mapping[str, NDArray]) -> Iterator[list[str]]:
    """Names that go into one array: neighbours in the order of their names, of one type."""
    piece: list[str] = []
    room = PIECE_BYTES
    for name in sorted(state, key=lambda name: (state[name].dtype.str, name)):
        value = state[name]
        if piece and (value.nbytes > room or value.dtype != state[piece[0]].dtype):
            yield piece
            piece, room = [], PIECE_BYTES
        piece.append(name)
        room -= value.nbytes
    if piece:
        yield piece


def repacked(arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Packed arrays by key, divided as `pack_state` divides them now: a checkpoint's may be of other sizes."""
    tensors = {name: value for key, flat in arrays.items() for name, value in parts(key, flat)}
    # by float32, as the weights are divided that these belong to
    like = {name: np.broadcast_to(np.float32(0), value.shape) for name, value in tensors.items()}
    return {_key(names, like): np.concatenate([tensors[n].ravel() for n in names]) for names in _pieces(like)}


def unpack_state(record: ArrayRecord) -> State:
    """The state in a record. Raises `PackingError` for an array that its key does not describe."""
    return {name: value for key, flat in decode(record).items() for name, value in parts(key, flat)}


def parts(key: str, flat: NDArray) -> list[tuple[str, NDArray]]:
    """The tensors of one array, as views. Raises `PackingError` if they do not fill it."""
    try:
        told = [part.rsplit(":", 1) for part in key.split(",")]
        shapes = [(name, tuple(map(int, filter(None, shape.split("x"))))) for name, shape in told]
        if len(dict(shapes)) < len(shapes) or any(side < 0 for _, shape in shapes for side in shape):
            raise ValueError("a name stands twice, or a side is below 0")
        ends = np.cumsum([int(np.prod(shape, dtype=np.int64)) for _, shape in shapes])
        if flat.shape != (ends[-1],):
            raise ValueError(f"it holds {flat.shape}")
        pieces = np.split(flat, ends[:-1])
        return [(name, piece.reshape(shape)) for (name, shape), piece in zip(shapes, pieces, strict=True)]
    except (ValueError, OverflowError) as error:
        raise PackingError(f"an array does not hold the weights {key[:80]}: {error}") from None
