"""The sample service against copying the same bytes from disk to disk over the loopback.

    python -m benchmarks.samples                 # 32x32 colour images, batches of 256, one shard of 65,536
    python -m benchmarks.samples --tls           # the service with TLS, the copy without

Four ways to move the same samples, 256 at a time, from disk in one process to disk in another over the loopback:
  service   checks the grant, packs records; the client hashes every sample, compares it with the order, and writes the
            segments of its cache, each flushed to disk
  files     copies a data set as it usually lies there, one file an image: 256 files are read, sent, written as 256
            files; these are not flushed, since to flush each would take far longer than the copy
  grpc      what gRPC itself takes: a stream of the same bytes in Python, unchecked, written to one file, and that
            flushed
  stream    the least that can be done: the rows of a memory-mapped array, sent as they are, written to one file, and
            that flushed to disk
What was read before lies in the page cache for all. They take turns; a ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import psutil

from benchmarks.orders import first_order
from ret_fl.config import DataConfig, RunConfig, ServiceConfig
from ret_fl.data.store import SampleStore
from ret_fl.deploy.certificates import Authority, write_private
from ret_fl.files import sync
from ret_fl.protocol import TrainOrder
from ret_fl.samples.access import ServedAccess
from ret_fl.samples.grants import Signer, Verifier, make_key_pair
from ret_fl.samples.limits import BATCH_SAMPLES
from ret_fl.samples.records import Description, hash_samples
from ret_fl.samples.server import SampleServer, Tls

SHAPE = (3, 32, 32)
BAR = 0.8
FILES = 16_384  # as many files are made and copied, at most


def open_store(path: Path) -> SampleStore:
    images = np.load(path, mmap_mode="c")
    return SampleStore(images, np.arange(len(images)) % 10, 10)


def serve(path: Path, tls: Tls | None, ready: Connection) -> None:
    """The process that has the data: the service, until it is ended."""
    store = open_store(path)
    known = Description.of(store, "photo")
    server = SampleServer(store, known, Verifier(path.parent / "verify-key.pem", known.fingerprint), tls=tls)
    server.start()
    ready.send(server.port)
    server.wait()


def send(path: Path, order: np.ndarray, ready: Connection) -> None:
    """The process that has the data, of the plain copy: every connection gets the rows of `order`, batch by batch."""
    images = np.load(path, mmap_mode="r").reshape(-1, int(np.prod(SHAPE)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                for start in range(0, len(order), BATCH_SAMPLES):
                    connection.sendall(images[order[start : start + BATCH_SAMPLES]].data)


def send_files(folder: Path, count: int, ready: Connection) -> None:
    """The same where every image is a file: each connection gets `count` of them, 256 at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                for start in range(0, count, BATCH_SAMPLES):
                    names = range(start, min(start + BATCH_SAMPLES, count))
                    connection.sendall(b"".join((folder / f"{i}.bin").read_bytes() for i in names))


def send_grpc(path: Path, order: np.ndarray, ready: Connection) -> None:
    """The same as a stream of gRPC, of bytes that it neither packs nor unpacks."""
    images = np.load(path, mmap_mode="r").reshape(-1, int(np.prod(SHAPE)))

    def rows(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for start in range(0, len(order), BATCH_SAMPLES):
            yield images[order[start : start + BATCH_SAMPLES]].tobytes()

    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    method = {"Rows": grpc.unary_stream_rpc_method_handler(rows)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Plain", method),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ready.send(port)
    server.wait_for_termination()


def copy_grpc(port: int, target: Path) -> float:
    """Seconds until the bytes from that stream are in `target` on disk."""
    began = time.perf_counter()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, target.open("wb") as file:
        for batch in channel.unary_stream("/Plain/Rows")(b""):
            file.write(batch)
    sync(target)
    return time.perf_counter() - began


def copy_files(port: int, target: Path, count: int) -> float:
    """Seconds until `count` images from the socket are files in `target`."""
    began = time.perf_counter()
    target.mkdir()
    size = int(np.prod(SHAPE))
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as stream:
        for start in range(0, count, BATCH_SAMPLES):
            batch = min(BATCH_SAMPLES, count - start)
            data = memoryview(stream.read(batch * size))
            for i in range(batch):
                (target / f"{start + i}.bin").write_bytes(data[i * size : (i + 1) * size])
    return time.perf_counter() - began


def copy(port: int, target: Path, size: int) -> float:
    """Seconds until `size` bytes from the socket are in `target` on disk."""
    began = time.perf_counter()
    buffer = memoryview(bytearray(BATCH_SAMPLES * int(np.prod(SHAPE))))
    left = size
    with socket.create_connection(("127.0.0.1", port)) as connection, target.open("wb") as file:
        while left:
            count = connection.recv_into(buffer)
            file.write(buffer[:count])
            left -= count
    sync(target)
    return time.perf_counter() - began


def fetch(service: ServiceConfig, order: TrainOrder, cache: Path) -> float:
    """Seconds until the samples of the order are ready to train on, and on disk."""
    began = time.perf_counter()
    ServedAccess(service, DataConfig(cache_dir=str(cache))).samples(order)
    return time.perf_counter() - began


def start(target: object, *arguments: object) -> tuple[multiprocessing.Process, int]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(*arguments, theirs), daemon=True)  # type: ignore[arg-type]
    process.start()
    return process, ours.recv()  # type: ignore[return-value]


def costing(process: multiprocessing.Process, way: Callable[[], float]) -> tuple[float, float]:
    """Seconds that a way takes, and seconds that the cores work for it in this process and in `process`."""

    def worked() -> float:
        times = psutil.Process(process.pid).cpu_times()
        return time.process_time() + float(times.user + times.system)

    before = worked()
    return way(), worked() - before


def make_order(store: SampleStore, ids: np.ndarray, key: Path) -> TrainOrder:
    order = first_order(RunConfig(), store.fingerprint, ids)
    known = Description.of(store, "photo")
    return Signer(key, 3600, known, hash_samples(store, known)).signed(order)


def certified(folder: Path) -> tuple[Path, Path]:
    """Certificate and key files of localhost; the authority's certificate lies beside them."""
    certificate, key = Authority.open(folder, "benchmark").issue(["localhost"], days=1)
    (folder / "host.crt").write_bytes(certificate)
    write_private(folder / "host.key", key)
    return folder / "host.crt", folder / "host.key"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=65_536, help="samples of the order (default: 65,536)")
    parser.add_argument("--repeats", type=int, default=7, help="of each (default: 7)")
    parser.add_argument("--tls", action="store_true", help="serve with TLS")
    parser.add_argument("--folder", type=Path, help="where to work: choose a real disk (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        compare(Path(name), args.samples, args.repeats, args.tls)


def compare(folder: Path, samples: int, repeats: int, with_tls: bool) -> None:
    rng = np.random.default_rng(0)
    path = folder / "images.npy"
    np.save(path, rng.integers(0, 256, (2 * samples, *SHAPE), dtype=np.uint8))
    make_key_pair(folder)
    store = open_store(path)
    ids = np.sort(rng.permutation(2 * samples)[:samples])  # a shard of two
    order = make_order(store, ids, folder / "signing-key.pem")
    tls = Tls(*certified(folder)) if with_tls else None
    size = samples * int(np.prod(SHAPE))
    files = min(samples, FILES)
    (folder / "files").mkdir()
    for i, image in enumerate(store.pixels(ids[:files]).numpy()):
        (folder / "files" / f"{i}.bin").write_bytes(image.data)
    (server, port), (sender, stream_port) = start(serve, path, tls), start(send, path, ids)
    file_sender, file_port = start(send_files, folder / "files", files)
    grpc_sender, grpc_port = start(send_grpc, path, ids)
    service = ServiceConfig(address=f"localhost:{port}", insecure=not tls, ca=str(folder / "ca.crt") if tls else "")
    rates, work = [], []
    try:
        for i in range(repeats + 1):
            served, served_work = costing(server, lambda: fetch(service, order, folder / "cache"))
            plain, plain_work = costing(grpc_sender, lambda: copy_grpc(grpc_port, folder / "copied"))
            row = (
                size / served / 1e6,
                files * size / samples / copy_files(file_port, folder / "copies", files) / 1e6,
                size / plain / 1e6,
                size / copy(stream_port, folder / "copy", size) / 1e6,
            )
            shutil.rmtree(folder / "cache")
            shutil.rmtree(folder / "copies")
            (folder / "copied").unlink()
            (folder / "copy").unlink()
            if i:  # the first of each warms up
                rates.append(row)
                work.append((served_work / size * 1e9, plain_work / size * 1e9))
                print("  MB/s: service {:.0f}, files {:.0f}, grpc {:.0f}, stream {:.0f}".format(*row))
    finally:
        for process in (server, sender, file_sender, grpc_sender):
            process.terminate()
            process.join()
    served, filed, plain, streamed = (statistics.median(column) for column in zip(*rates, strict=True))
    kind = "TLS" if with_tls else "plain text"
    print(f"{samples:,} samples of {size // samples} bytes, batches of {BATCH_SAMPLES}, {os.cpu_count()} cores, {kind}")
    print(f"service / copying of files:    {served / filed:.2f}")
    print(f"service / a bare gRPC stream:  {served / plain:.2f}")
    print(f"bare gRPC stream / copying of a stream: {plain / streamed:.2f}")
    print(f"service / copying of a stream: {served / streamed:.2f} (bar: {BAR})")
    cores = [statistics.median(column) for column in zip(*work, strict=True)]
    print("seconds of a core for a GB, both sides: service {:.1f}, bare gRPC stream {:.1f}".format(*cores))


if __name__ == "__main__":
    main()
