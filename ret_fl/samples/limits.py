"""What service and client hold each other to."""

from __future__ import annotations

BATCH_SAMPLES = 256
BATCH_BYTES = 4 << 20
"""A batch of the stream ends at so many samples or bytes, whichever comes first; a single sample may exceed it."""
MAX_RECORD = 16 << 20
"""No image may take more bytes than this."""
MAX_CLASSES = 100_000
"""A client makes a model with as many class embeddings as it is told there are classes."""
MESSAGE_BYTES = MAX_RECORD + (64 << 10)
"""No message of the service is larger: gRPC refuses one that says it is before it makes room for it."""
KEEPALIVE = ("grpc.keepalive_time_ms", 30_000)
"""A peer that vanished without a word is noticed."""
IDENTITY_ONLY = ("grpc.compression_enabled_algorithms_bitset", 1)
"""gRPC's own compression stays off: it inflates before it looks at the size. Ours is bounded (zlib, in Batch)."""
_SLOWEST = 256 << 10


def request_bytes(samples: int) -> int:
    """The largest request for a dataset of so many samples: a grant and a list of IDs, each with every ID once."""
    return 8 * samples + (64 << 10)


def stream_seconds(size: int) -> float:
    """How long a stream of `size` bytes may take: a minute, and what it takes at 256 KiB/s. Then it is ended."""
    return 60 + size / _SLOWEST
