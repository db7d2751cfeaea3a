"""A node's side of the sample service: fetch what an order names, check it, and go on after a service was away."""

from __future__ import annotations

import logging
import random
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from grpc.experimental import ChannelOptions
from numpy.typing import NDArray

from ret_fl.config import ConfigError, ServiceConfig
from ret_fl.samples import service_pb2 as pb
from ret_fl.samples.batches import SERVICE, Batch, from_message
from ret_fl.samples.limits import IDENTITY_ONLY, KEEPALIVE, MESSAGE_BYTES, stream_seconds
from ret_fl.samples.records import Description, DescriptionError, Hashes, Records, hash_records
from ret_fl.samples.service_pb2_grpc import SampleServiceStub

logger = logging.getLogger(__name__)

DESCRIBE_SECONDS = 20
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0
_jitter = random.SystemRandom()  # training's own generators must not be touched


class SampleServiceError(RuntimeError):
    """The service cannot be reached, refuses, or sends other samples. The message says what to change."""


class SampleClient:
    """A connection to the sample service that `config` names; made at once, opened at the first call.

    Raises `ConfigError` if the certificates cannot be read.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
            KEEPALIVE,
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.use_local_subchannel_pool", 1),
            IDENTITY_ONLY,
            (ChannelOptions.SingleThreadedUnaryStream, 1),
        ]
        if config.insecure:
            self._channel = grpc.insecure_channel(config.address, options)
        else:
            self._channel = grpc.secure_channel(config.address, _credentials(config), options)
        self._describe = SampleServiceStub(self._channel).Describe
        self._fetch = self._channel.unary_stream(
            f"/{SERVICE}/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=from_message,
        )
        self._compression = pb.ZLIB if config.compression == "zlib" else pb.NONE

    def close(self) -> None:
        self._channel.close()

    def describe(self) -> Description:
        """What the service has. Raises `SampleServiceError`."""
        waits = _Waits(self._config)
        while True:
            try:
                answer = self._describe(pb.DescribeRequest(), timeout=DESCRIBE_SECONDS)
                break
            except grpc.RpcError as error:
                waits.after(error)
        shape = (answer.channels, answer.height, answer.width)
        try:
            return Description(answer.fingerprint, answer.samples, shape, answer.num_classes, answer.kind)
        except DescriptionError as error:
            raise SampleServiceError(f"{self._config.address} is no sample service of ret-fl: {error}") from None

    def fetch(
        self, known: Description, grant: bytes, signature: bytes, ids: NDArray[np.int64], hashes: Hashes
    ) -> Iterator[Records]:
        """Records of the samples `ids`, in that order, a batch at a time, each with its hash.

        A stream that breaks is begun anew with what is still missing. Raises `SampleServiceError` if the service stays
        away for longer than `service.patience`, refuses, or sends anything else.
        """
        done = 0
        waits = _Waits(self._config)
        while done < len(ids):
            rest = ids[done:].astype("<u4").tobytes()
            request = pb.FetchRequest(grant=grant, signature=signature, ids=rest, compression=self._compression)
            missing = (len(ids) - done) * known.record.itemsize
            call = self._fetch(request, timeout=stream_seconds(missing))
            try:
                for batch in _ahead(call):
                    records = self._unpacked(batch, known.record, len(ids) - done)
                    self._check(records, hashes[done : done + len(records)])
                    done += len(records)
                    waits = _Waits(self._config)
                    yield records
                if done < len(ids):
                    raise SampleServiceError(f"{self._config.address} ended early: do both run the same ret-fl?")
            except grpc.RpcError as error:
                waits.after(error)
            finally:
                call.cancel()

    def _check(self, records: Records, hashes: Hashes) -> None:
        """Raises `SampleServiceError` if the records are not those with these hashes, in that order."""
        if (hash_records(records) != hashes).any():
            raise SampleServiceError(
                f"{self._config.address} sends other samples than the server has: it must serve the same files with "
                "the same data settings"
            )

    def _unpacked(self, batch: Batch, record: np.dtype[np.void], room: int) -> Records:
        """The records of a batch, at most `room`; a compressed one is inflated no further than that."""
        data, limit = batch.records, min(MESSAGE_BYTES, room * record.itemsize)
        if batch.compression == pb.ZLIB:
            inflater = zlib.decompressobj()
            try:
                data = inflater.decompress(data, limit + 1)
            except zlib.error:
                data = b""
            data = data if inflater.eof else b""
        if not data or len(data) % record.itemsize or len(data) > limit:
            raise SampleServiceError(f"{self._config.address} sends no whole samples: do both run the same ret-fl?")
        return np.frombuffer(data, record)


def _ahead(call: grpc.Call) -> Iterator[Batch]:
    """What a stream brings; the next batch is received while the last one is hashed."""
    with ThreadPoolExecutor(1, thread_name_prefix="sample-stream") as receiving:
        try:
            coming = receiving.submit(next, call, None)
            while (batch := coming.result()) is not None:
                coming = receiving.submit(next, call, None)
                yield batch
        finally:
            call.cancel()


class _Waits:
    """Growing waits between attempts, until the service was away for `service.patience` seconds."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._give_up: float | None = None  # counted from the first failure
        self._next = _FIRST_WAIT

    def after(self, error: grpc.RpcError) -> None:
        """Sleep, where the failure may pass; raise `SampleServiceError` where it will not, or patience is over."""
        address, code, why = self._config.address, error.code(), error.details()
        if code == grpc.StatusCode.PERMISSION_DENIED:
            raise SampleServiceError(f"the sample service {address} refuses: {why}") from None
        if code not in _PASSING and not _overloaded(error):
            raise SampleServiceError(f"the sample service {address} failed: {code.name}: {why}") from None
        seconds = self._next * _jitter.uniform(0.5, 1.5)
        now = time.monotonic()
        self._give_up = self._give_up or now + self._config.patience
        if now + seconds > self._give_up:
            raise SampleServiceError(
                f"the sample service {address} cannot be reached ({code.name}: {why}): check service.address, the "
                "certificates (service.ca; service.insecure if it runs with --insecure), and whether it runs; "
                f"service.patience={self._config.patience:g} s were waited"
            ) from None
        logger.warning("the sample service %s is away (%s: %s), again in %.1f s", address, code.name, why, seconds)
        time.sleep(seconds)
        self._next = min(2 * self._next, _LONGEST_WAIT)


def _overloaded(error: grpc.RpcError) -> bool:
    """Whether gRPC itself turned the call away, as more came at once than it takes; a message too large stays so."""
    return error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in (error.details() or "")


def _credentials(config: ServiceConfig) -> grpc.ChannelCredentials:
    def read(path: str) -> bytes | None:
        return Path(path).expanduser().read_bytes() if path else None

    try:
        return grpc.ssl_channel_credentials(read(config.ca), read(config.key), read(config.certificate))
    except OSError as error:
        raise ConfigError(f"service.ca, service.certificate, service.key: {error}") from None
