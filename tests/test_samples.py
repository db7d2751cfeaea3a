"""The sample service: the right bytes to whoever an order names, nothing to anybody else, nothing lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from conftest import ROOT, make_federation
from sample_services import Authority, Serving, changed, pictures

from ret_fl.config import ConfigError, RunConfig
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore
from ret_fl.protocol import TrainOrder
from ret_fl.samples import access as access_module
from ret_fl.samples import server as server_module
from ret_fl.samples import service_pb2 as pb
from ret_fl.samples.batches import SERVICE as SERVICE_NAME
from ret_fl.samples.client import SampleClient, SampleServiceError
from ret_fl.samples.grants import Grant, Signer, make_key_pair
from ret_fl.samples.limits import request_bytes
from ret_fl.samples.records import Description, hash_samples, make_records
from ret_fl.samples.server import Tls
from ret_fl.samples.service_pb2_grpc import (
    SampleServiceStub,
)


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path, pictures(600))


def assert_same(store: SampleStore, order: TrainOrder, samples: object, labels: bool = True) -> None:
    ids = torch.from_numpy(order.ids)
    images, classes = samples.fetch(ids)  # type: ignore[attr-defined]
    expected, expected_classes = store.fetch(ids)
    assert torch.equal(images, expected)
    assert (classes is None) == (expected_classes is None) == (not labels)
    assert classes is None or torch.equal(classes, expected_classes)


# --- the right bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zlib"])
@pytest.mark.parametrize(("shape", "classes"), [((3, 8, 8), 4), ((1, 5, 7), 0)])
def test_a_client_without_data_gets_what_its_order_names(
    tmp_path: Path, shape: tuple[int, int, int], classes: int, compression: str
) -> None:
    serving = Serving(tmp_path, pictures(600, shape, classes))
    ids = np.random.default_rng(1).permutation(600)[:300]  # more than one batch, in no order
    with serving.running():
        access = serving.access(compression=compression)
        assert access.describe() == serving.known
        order = serving.order(ids)
        samples = access.samples(order)
    assert_same(serving.store, order, samples, labels=classes > 0)
    with pytest.raises(IndexError, match="not in the order"):
        samples.fetch(torch.tensor([int(np.setdiff1d(np.arange(600), ids)[0])]))


def test_images_larger_than_a_batch_come_one_by_one(tmp_path: Path) -> None:
    serving = Serving(tmp_path, pictures(3, (3, 1300, 1300)))
    order = serving.order([2, 0])
    with serving.running():
        assert_same(serving.store, order, serving.access().samples(order))


# --- nobody else ---------------------------------------------------------------------------------------------------


def raw_fetch(serving: Serving, order: TrainOrder, ids: list[int], /, **changes: object) -> list[pb.Batch]:
    grant, signature = Grant.of(order).to_bytes(), order.signature
    packed = np.array(ids, "<u4").tobytes()
    fields = {"grant": grant, "signature": signature, "ids": packed} | changes
    with grpc.insecure_channel(f"localhost:{serving.port}") as channel:
        return list(SampleServiceStub(channel).Fetch(pb.FetchRequest(**fields), timeout=10))


def refusal(serving: Serving, order: TrainOrder, ids: list[int], /, **changes: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        raw_fetch(serving, order, ids, **changes)
    return error.value.code(), error.value.details()


def test_samples_outside_of_the_order_are_refused_all_of_the_request(serving: Serving) -> None:
    with serving.running():
        order = serving.order([1, 2, 3])
        assert raw_fetch(serving, order, [3, 1])
        code, why = refusal(serving, order, [1, 2, 4])
    assert code == grpc.StatusCode.PERMISSION_DENIED and "1 of 3 samples are not in the grant" in why


def test_forged_expired_and_foreign_grants_are_refused(serving: Serving, tmp_path: Path) -> None:
    make_key_pair(tmp_path / "other")
    order = serving.order([1, 2])
    cases = {
        "not signed by": [
            changed(order, signature=b""),
            changed(order, signature=bytes(64)),
            changed(order, ids=np.array([1, 2, 3])),
            changed(order, expires=order.expires + 1),
            changed(order, run_key="another"),
            serving.order([1, 2], key=tmp_path / "other" / "signing-key.pem"),
        ],
        "has expired": [serving.order([1, 2], seconds=-10)],
        "the grant is about data": [Serving(tmp_path, pictures(600, seed=1)).order([1, 2])],
    }
    with serving.running():
        for reason, orders in cases.items():
            for wrong in orders:
                code, why = refusal(serving, wrong, [1, 2])
                assert code == grpc.StatusCode.PERMISSION_DENIED and reason in why
        code, _ = refusal(serving, order, [1, 1, 1])
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        code, _ = refusal(serving, order, [1], ids=b"\1\0\0")
        assert code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("data", [b"", b"x", b"ret-fl sample grant 1\n", b"ret-fl sample grant 1\n[1]\n", b"\n" * 99])
def test_signed_nonsense_is_no_grant(serving: Serving, data: bytes) -> None:
    signature = Signer(serving.signing_key, 1, serving.known, np.empty((0, 16), np.uint8))._key.sign(data)
    with serving.running():
        code, why = refusal(serving, serving.order([1]), [1], grant=data, signature=signature)
    assert code == grpc.StatusCode.PERMISSION_DENIED and "this is no grant" in why


def test_the_client_says_what_the_service_refused_and_does_not_ask_again(serving: Serving) -> None:
    with serving.running():
        began = time.monotonic()
        with pytest.raises(SampleServiceError, match=r"refuses: the grant has expired: raise round-timeout"):
            serving.access().samples(serving.order([1], seconds=-10))
        assert time.monotonic() - began < 3


def test_an_unsigned_order_names_the_setting_that_signs(serving: Serving) -> None:
    order = changed(serving.order([1]), signature=b"", hashes=np.empty((0, 16), np.uint8))
    with pytest.raises(ConfigError, match=r"set service\.signing-key on the server"):
        serving.access().samples(order)


def test_a_request_beyond_the_limit_is_refused_before_it_is_read(serving: Serving) -> None:
    with serving.running():
        order = serving.order([1])
        size = request_bytes(600)
        code, why = refusal(serving, order, [1], signature=bytes(size))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in why
        assert raw_fetch(serving, order, [1])


def test_a_service_with_all_hands_full_is_asked_again(serving: Serving) -> None:
    """A service that takes one call at a time, and has one: gRPC turns the client away itself."""
    order = serving.order([5, 6])
    begun, ended = threading.Event(), threading.Event()

    def waiting(request: object, context: grpc.ServicerContext) -> bytes:
        begun.set()
        ended.wait(10)
        return b""

    busy = grpc.server(futures.ThreadPoolExecutor(2), maximum_concurrent_rpcs=1)
    handlers = {name: grpc.unary_unary_rpc_method_handler(waiting) for name in ("Describe", "Fetch")}
    busy.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    serving.port = busy.add_insecure_port("localhost:0")
    busy.start()
    try:
        channel = grpc.insecure_channel(f"localhost:{serving.port}")
        first = channel.unary_unary(f"/{SERVICE_NAME}/Describe").future(b"")
        assert begun.wait(10)
        with pytest.raises(SampleServiceError, match=r"RESOURCE_EXHAUSTED: Concurrent.*patience=1 s were waited"):
            serving.access(patience=1.0).samples(order)
        ended.set()
        first.result(10)
    finally:
        busy.stop(0)


# --- TLS -----------------------------------------------------------------------------------------------------------


def test_tls_is_needed_where_the_service_has_it(serving: Serving, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    tls = Tls(*authority.issue("host"))
    order = serving.order([5, 6])
    trusted = {"insecure": False, "ca": str(authority.path)}
    with serving.running(tls):
        assert_same(serving.store, order, serving.access(**trusted).samples(order))
        for wrong in ({}, {"insecure": False}, {"insecure": False, "ca": str(stranger.path)}):
            with pytest.raises(SampleServiceError, match=r"cannot be reached.*check service\.address"):
                serving.access("other", patience=0.5, **wrong).samples(order)


def test_a_service_can_admit_known_nodes_only(serving: Serving, tmp_path: Path) -> None:
    authority, nodes = Authority(tmp_path), Authority(tmp_path, "nodes")
    certificate, key = nodes.issue("node")
    foreign_certificate, foreign_key = authority.issue("foreign")
    order = serving.order([5, 6])
    trusted = {"insecure": False, "ca": str(authority.path)}
    with serving.running(Tls(*authority.issue("host"), client_ca=nodes.path)):
        access = serving.access(**trusted, certificate=str(certificate), key=str(key))
        assert_same(serving.store, order, access.samples(order))
        for wrong in ({}, {"certificate": str(foreign_certificate), "key": str(foreign_key)}):
            with pytest.raises(SampleServiceError, match="cannot be reached"):
                serving.access("other", patience=0.5, **trusted, **wrong).samples(order)


# --- nothing lost on the way ---------------------------------------------------------------------------------------


SERVICE = """
import sys, threading
from pathlib import Path
sys.path.insert(0, "tests")
from sample_services import Serving, pictures
with Serving(Path(sys.argv[1]), pictures(20_000, (3, 32, 32)), port=int(sys.argv[2])).running() as server:
    print(server.port, flush=True)
    threading.Event().wait()
"""


def start_process(folder: Path, port: int) -> tuple[subprocess.Popen[str], int]:
    """A service in a process of its own, and its port."""
    command = [sys.executable, "-c", SERVICE, str(folder), str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_service_that_is_killed_in_mid_stream_and_comes_back_costs_only_time(tmp_path: Path) -> None:
    serving = Serving(tmp_path, pictures(20_000, (3, 32, 32)))
    order = serving.order(np.arange(20_000))
    process, serving.port = start_process(tmp_path, 0)
    try:
        batches = SampleClient(serving.service(patience=60.0)).fetch(
            serving.known, Grant.of(order).to_bytes(), order.signature, order.ids, order.hashes
        )
        received = [next(batches), next(batches)]
        process.kill()
        process.wait()
        with futures.ThreadPoolExecutor(1) as pool:
            restarted = pool.submit(start_process, tmp_path, serving.port)
            received += list(batches)
            process, _ = restarted.result()
    finally:
        process.kill()
        process.wait()
    records = np.concatenate(received)
    assert (records == make_records(serving.store, order.ids, serving.known.record)).all()


def test_a_service_that_stays_away_is_named_after_patience(serving: Serving) -> None:
    with serving.running():
        pass
    with pytest.raises(SampleServiceError, match=r"UNAVAILABLE.*service\.patience=0\.6 s were waited"):
        serving.access(patience=0.6).describe()


def test_what_came_before_a_break_stays_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "SEGMENT_BYTES", 256 * 3088)
    serving = Serving(tmp_path, pictures(20_000, (3, 32, 32)))
    order = serving.order(np.arange(20_000))
    with serving.running() as server:
        access = serving.access(patience=0.3)
        fetched = access._client.fetch

        def broken(*arguments: object) -> Iterator[np.ndarray]:
            for i, records in enumerate(fetched(*arguments)):  # type: ignore[arg-type]
                yield records
                if i == 2:
                    server.stop(0)

        access._client.fetch = broken  # type: ignore[method-assign]
        with pytest.raises(SampleServiceError, match="cannot be reached"):
            access.samples(order)
    kept = sum(len(np.load(path)) for path in serving.cached_files())
    assert 3 * 256 <= kept < 20_000


def test_a_client_that_stops_reading_holds_back_the_service_and_more_clients_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(tmp_path, pictures(60_000, (3, 32, 32)))
    order = serving.order(np.arange(60_000))
    request = pb.FetchRequest(
        grant=Grant.of(order).to_bytes(), signature=order.signature, ids=order.ids.astype("<u4").tobytes()
    )
    produced: list[int] = []

    def counted(*arguments: object) -> np.ndarray:
        produced.append(1)
        return make_records(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(server_module, "make_records", counted)
    with serving.running(streams=1), grpc.insecure_channel(f"localhost:{serving.port}") as channel:
        stream = SampleServiceStub(channel).Fetch(request)
        next(stream)
        time.sleep(1)
        before = len(produced)
        time.sleep(0.5)
        assert len(produced) == before < 235 / 2  # of 235 batches: the others wait for the reader
        with pytest.raises(SampleServiceError, match=r"as many clients as --streams allows"):
            serving.access(patience=0.4).samples(serving.order([1]))
        stream.cancel()
        assert_same(serving.store, serving.order([1]), serving.access().samples(serving.order([1])))


# --- the run -------------------------------------------------------------------------------------------------------


def test_clients_without_data_train_bit_for_bit_the_same_model(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model.class-conditional": True, "agc.t-max": 1000}
    local = tiny(settings)
    expected = make_federation(local).run()
    data = load_splits(local.data)
    serving = Serving(tmp_path, data.train)
    serving.known = Description.of(data.train, data.kind)
    with serving.running() as server:
        remote = tiny(
            settings,
            {
                "service.signing-key": str(serving.signing_key),
                "service.address": f"localhost:{server.port}",
                "service.insecure": True,
                "data.cache-dir": str(tmp_path / "cache"),
                "state-dir": str(tmp_path / "elsewhere"),
            },
        )
        federation = make_federation(remote)
        federation.strategy.signer = Signer(
            serving.signing_key, remote.round_timeout, serving.known, hash_samples(data.train, serving.known)
        )
        monkeypatch.setattr(access_module, "load_splits", None)  # no client may read data of its own
        weights = federation.run()
    assert len(serving.cached_files()) >= 1
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
