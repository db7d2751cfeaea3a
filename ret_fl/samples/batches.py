"""A `Batch` of service.proto as bytes and back, without the copies of all samples that protobuf's own code makes."""

from __future__ import annotations

from typing import NamedTuple

from ret_fl.samples import service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["SampleService"].full_name
_RECORDS = b"\x0a"  # field 1; its length and it follow
_ZLIB = b"\x10\x01"  # field 2 is ZLIB; one that is NONE is left out


class Batch(NamedTuple):
    """The two fields of the message."""

    records: bytes | memoryview
    compression: pb.Compression


def to_message(batch: Batch) -> bytes:
    """What `pb.Batch.SerializeToString` makes of the same."""
    size = len(batch.records)
    head = _RECORDS + _varint(size) if size else b""
    return b"".join((head, batch.records, _ZLIB if batch.compression == pb.ZLIB else b""))


def from_message(message: bytes) -> Batch:
    """As `pb.Batch.FromString`; the records lie in `message`. Raises `DecodeError` if it is no batch."""
    size, start = _read_varint(message, 1) if message.startswith(_RECORDS) else (0, 0)
    tail = message[start + size :]
    if start + size > len(message) or tail not in (b"", _ZLIB):  # another's way to write a batch, or none
        told = pb.Batch.FromString(message)
        return Batch(told.records, told.compression)
    return Batch(memoryview(message)[start : start + size], pb.ZLIB if tail else pb.NONE)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; every byte but the last has its highest bit set."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """The number at `start`, at most 35 bits of it, and where it ends."""
    value = 0
    for i, byte in enumerate(message[start : start + 5]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, start + i + 1
    return len(message), start
