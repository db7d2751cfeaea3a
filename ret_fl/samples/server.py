"""The sample service: serves the training samples of one dataset by ID, each only to a client whose order names it."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc
import numpy as np

from ret_fl.config import ConfigError
from ret_fl.data.store import SampleStore
from ret_fl.samples import service_pb2 as pb
from ret_fl.samples.batches import SERVICE, Batch, to_message
from ret_fl.samples.grants import GrantError, Verifier
from ret_fl.samples.limits import (
    BATCH_BYTES,
    BATCH_SAMPLES,
    IDENTITY_ONLY,
    KEEPALIVE,
    MESSAGE_BYTES,
    request_bytes,
    stream_seconds,
)
from ret_fl.samples.records import Description, make_records

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """The service's certificate chain and key, and, to admit known nodes only, the CA of their certificates; PEM."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Raises `ConfigError` if a file cannot be read."""
        try:
            pair = (self.key.read_bytes(), self.certificate.read_bytes())
            ca = self.client_ca.read_bytes() if self.client_ca else None
        except OSError as error:
            raise ConfigError(f"--certificate, --key, --client-ca: {error}") from None
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


class SampleServer:
    """A gRPC server of one store, on `host`:`port` (0: any free one; `port` tells which).

    tls: None serves in plain text. streams: clients served at once; more are told to come back later.
    Raises `ConfigError` if it cannot listen there, with that certificate.
    """

    def __init__(
        self,
        store: SampleStore,
        description: Description,
        verifier: Verifier,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls | None,
        streams: int = 16,
    ) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=streams + 4, thread_name_prefix="samples"),
            options=[
                ("grpc.max_receive_message_length", request_bytes(len(store))),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                KEEPALIVE,
                IDENTITY_ONLY,
            ],
            maximum_concurrent_rpcs=4 * (streams + 4),  # beyond what waits for a thread, gRPC itself refuses
        )
        servicer = _Servicer(store, description, verifier, streams)
        self._server.add_generic_rpc_handlers((servicer.handlers(),))
        address = f"{host}:{port}"
        try:
            if tls:
                self.port = self._server.add_secure_port(address, tls.credentials())
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}; check --host, --port, --certificate") from None

    def start(self) -> None:
        self._server.start()

    def wait(self) -> None:
        """Until the server is stopped."""
        self._server.wait_for_termination()

    def stop(self, grace: float = 5) -> None:
        """Refuse new requests at once, end those in progress after `grace` seconds, return when all have ended."""
        self._server.stop(grace).wait()


class _Servicer:
    def __init__(self, store: SampleStore, description: Description, verifier: Verifier, streams: int) -> None:
        self._store, self._description, self._verifier = store, description, verifier
        self._free = threading.Semaphore(streams)
        size = description.record.itemsize
        self._batch = max(1, min(BATCH_SAMPLES, BATCH_BYTES // size))

    def handlers(self) -> grpc.GenericRpcHandler:
        """Those of service_pb2_grpc.py, but for how batches become bytes."""
        methods = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self.describe, pb.DescribeRequest.FromString, pb.Description.SerializeToString
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch, pb.FetchRequest.FromString),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        known = self._description
        channels, height, width = known.image_shape
        return pb.Description(
            fingerprint=known.fingerprint,
            samples=known.samples,
            channels=channels,
            height=height,
            width=width,
            num_classes=known.num_classes,
            kind=known.kind,
        )

    def fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        if len(request.ids) % 4:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "ids are not uint32s")
        ids = np.frombuffer(request.ids, "<u4").astype(np.int64)
        try:
            grant = self._verifier.check(request.grant, request.signature, ids)
        except GrantError as error:
            _refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error))
        if len(ids) > len(grant.ids) or (len(ids) and ids.max() >= len(self._store)):
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "IDs repeat, or there are no such samples")
        if not self._free.acquire(blocking=False):
            _refuse(context, grpc.StatusCode.UNAVAILABLE, "as many clients as --streams allows are being served")
        began, size = time.monotonic(), len(ids) * self._description.record.itemsize
        # gRPC sends a batch only when the client has room for it: a client that reads nothing is cut off by time, later
        # than an honest one ends by its own deadline
        watchdog = threading.Timer(stream_seconds(size) + 15, context.cancel)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield from self._batches(ids, request.compression)
        finally:
            watchdog.cancel()
            self._free.release()
            told = f"run {grant.run_key[:8]!r}, round {grant.round}, shard {grant.shard}: {len(ids)} samples"
            logger.info("%s, %.1f MB, %.2f s", told, size / 1e6, time.monotonic() - began)

    def _batches(self, ids: np.ndarray, compression: pb.Compression) -> Iterator[bytes]:
        room = np.empty(min(self._batch, len(ids)), self._description.record)
        for start in range(0, len(ids), self._batch):
            records = make_records(self._store, ids[start : start + self._batch], room.dtype, room)
            data = records.view(np.uint8).data
            if compression == pb.ZLIB:
                yield to_message(Batch(zlib.compress(data, 1), pb.ZLIB))
            else:
                yield to_message(Batch(data, pb.NONE))


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, why: str) -> NoReturn:
    logger.warning("refused %s: %s", context.peer(), why)
    context.abort(code, why)
    raise AssertionError("abort raises")
