"""What goes between a client process and its worker: frames on a Unix socket, each with its length before it.

A message goes as Flower's own protobuf without the bytes of its arrays, and those after it, each a frame: they are
sent from where they lie, and none is copied into a message of hundreds of MB. Each is copied once where it is received,
for Flower's Array takes nothing but bytes.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from google.protobuf.message import DecodeError

MAX_TEXT = 64 << 20
"""Bytes of JSON, of a context, or of a message without its arrays."""
MAX_ARRAY = 4 << 30
"""Bytes of one array."""

Proto = TypeVar("Proto", ProtoContext, ProtoMessage)

_LENGTH = struct.Struct("!Q")
_CREDENTIALS = struct.Struct("3i")


class FrameError(ConnectionError):
    """The connection ended within a frame, or a frame is not what it should be."""


def send_frames(connection: socket.socket, *frames: bytes) -> None:
    """Send frames, one after the other."""
    for data in frames:
        connection.sendall(_LENGTH.pack(len(data)))
        connection.sendall(data)


def receive_frame(connection: socket.socket, limit: int) -> bytes:
    """Receive one frame. Raises `FrameError` for one longer than `limit`, before there is memory for it."""
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    if length > limit:
        raise FrameError(f"a frame of {length:,} bytes, where {limit:,} are the most there may be")
    return bytes(_receive(connection, length))


def _receive(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    missing = memoryview(data)
    while missing:
        got = connection.recv_into(missing)
        if not got:
            raise FrameError("the other side ended the connection")
        missing = missing[got:]
    return data


def send_told(connection: socket.socket, **told: Any) -> None:
    """Send a JSON object."""
    send_frames(connection, json.dumps(told).encode())


def receive_told(connection: socket.socket) -> dict[str, Any]:
    """Receive a JSON object. Raises `FrameError` for anything else."""
    try:
        told = json.loads(receive_frame(connection, MAX_TEXT))
    except ValueError as error:
        raise FrameError(f"a frame that is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise FrameError(f"a frame that is no JSON object: {told!r:.80}")
    return told


def _receive_proto(connection: socket.socket, kind: type[Proto]) -> Proto:
    try:
        return kind.FromString(receive_frame(connection, MAX_TEXT))
    except DecodeError as error:
        raise FrameError(f"a frame that is no {kind.__name__} of Flower's: {error}") from None


def send_context(connection: socket.socket, context: Context) -> None:
    """Send a context; ret-fl keeps next to nothing in its state."""
    send_frames(connection, context_to_proto(context).SerializeToString())


def receive_context(connection: socket.socket) -> Context:
    """Receive a context."""
    return context_from_proto(_receive_proto(connection, ProtoContext))


def pack_message(message: Message) -> list[bytes]:
    """The frames of a message; its arrays are not copied. Raises `ValueError` for one too large to be sent."""
    skeleton, arrays = _taken_apart(message)
    if len(skeleton) > MAX_TEXT or any(len(data) > MAX_ARRAY for data in arrays):
        raise ValueError(f"a message of more than {MAX_ARRAY:,} bytes in an array, or {MAX_TEXT:,} beside its arrays")
    return [skeleton, *arrays]


def _taken_apart(message: Message) -> tuple[bytes, list[bytes]]:
    if not message.has_content():
        return message_to_proto(message).SerializeToString(), []
    content = message.content
    arrays = [array.data for record in content.values() if isinstance(record, ArrayRecord) for array in record.values()]
    message.content = RecordDict(
        {key: _hollow(record) if isinstance(record, ArrayRecord) else record for key, record in content.items()}
    )
    try:
        return message_to_proto(message).SerializeToString(), arrays
    finally:
        message.content = content


def _hollow(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({key: Array(a.dtype, a.shape, a.stype, b"") for key, a in record.items()})


def receive_message(connection: socket.socket) -> Message:
    """Receive the frames of a message."""
    message = message_from_proto(_receive_proto(connection, ProtoMessage))
    records = message.content.values() if message.has_content() else ()
    for record in records:
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                record[key] = Array(array.dtype, array.shape, array.stype, receive_frame(connection, MAX_ARRAY))
    return message


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end is the same user's."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(told)
    return bool(user == os.getuid())
