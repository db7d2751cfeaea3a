"""A sample service that sends anything but what the server vouches for is found out."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import ROOT
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from sample_services import Serving, pictures

from ret_fl.samples import service_pb2 as pb
from ret_fl.samples.client import SampleServiceError
from ret_fl.samples.limits import MESSAGE_BYTES
from ret_fl.samples.records import make_records
from ret_fl.samples.service_pb2_grpc import (
    SampleServiceServicer,
    add_SampleServiceServicer_to_server,
)


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path, pictures(600))


class Liar(SampleServiceServicer):
    """Answers whatever it is told to."""

    def __init__(self, batches: Callable[[pb.FetchRequest], list[pb.Batch]], description: pb.Description) -> None:
        self.batches, self.description = batches, description

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:  # noqa: N802
        return self.description

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Batch]:  # noqa: N802
        yield from self.batches(request)


def lying(serving: Serving, batches: Callable[[pb.FetchRequest], list[pb.Batch]], **described: object) -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
    known = {"fingerprint": serving.known.fingerprint, "samples": 600, "channels": 3, "height": 8, "width": 8}
    known |= {"num_classes": 4, "kind": "photo"} | described
    add_SampleServiceServicer_to_server(Liar(batches, pb.Description(**known)), server)
    serving.port = server.add_insecure_port("localhost:0")
    server.start()
    return server


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another image", "sends other samples than the server has"),
        ("another class", "sends other samples than the server has"),
        ("another order", "sends other samples than the server has"),
        ("half a sample", "sends no whole samples"),
        ("nothing", "ended early"),
        ("empty", "sends no whole samples"),
        ("more than asked", "sends no whole samples"),
        ("a bomb", "sends no whole samples"),
        ("broken zlib", "sends no whole samples"),
        ("a huge message", "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_service_that_sends_anything_else_is_found_out(serving: Serving, case: str, message: str) -> None:
    record = serving.known.record

    def batches(request: pb.FetchRequest) -> list[pb.Batch]:
        true = make_records(serving.store, np.array([7, 8]), record)
        if case == "another image":
            true["pixels"][1, 0, 0, 0] ^= 1
        elif case == "another class":
            true["label"][0] = (true["label"][0] + 1) % 4
        elif case == "another order":
            true = true[::-1].copy()
        data = true.tobytes()
        return {
            "half a sample": [pb.Batch(records=data[:-1])],
            "nothing": [],
            "empty": [pb.Batch()],
            "more than asked": [pb.Batch(records=data + data)],
            "a bomb": [pb.Batch(records=zlib.compress(bytes(200 << 20)), compression=pb.ZLIB)],
            "broken zlib": [pb.Batch(records=zlib.compress(data)[:-3], compression=pb.ZLIB)],
            "a huge message": [pb.Batch(records=bytes(MESSAGE_BYTES + 1))],
        }.get(case, [pb.Batch(records=data)])

    server = lying(serving, batches)
    try:
        with pytest.raises(SampleServiceError, match=message):
            serving.access().samples(serving.order([7, 8]))
    finally:
        server.stop(0)
    assert serving.cached_files() == []


@pytest.mark.parametrize(
    "described",
    [
        {"fingerprint": "../../etc/passwd"},
        {"samples": 0},
        {"channels": 4_000_000_000},
        {"height": 0},
        {"width": 1 << 31},
        {"kind": "shell"},
        {"num_classes": 4_000_000_000},
    ],
)
def test_an_impossible_description_is_refused(serving: Serving, described: dict[str, object]) -> None:
    server = lying(serving, lambda _: [], **described)
    try:
        with pytest.raises(SampleServiceError, match="is no sample service of ret-fl"):
            serving.access().describe()
    finally:
        server.stop(0)


def test_generated_code_is_that_of_the_proto() -> None:
    """Every message, field with its number and type, enum and method of the text is in the code, and no others."""
    text = (ROOT / "ret_fl/samples/service.proto").read_text()
    assert declared(text) == described(FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb))
    grpc_code = (ROOT / "ret_fl/samples/service_pb2_grpc.py").read_text()
    for method in ("Describe", "Fetch"):
        assert f"'/ret_fl.samples.SampleService/{method}'" in grpc_code


def declared(text: str) -> list[str]:
    lines = [re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines()]
    kept = [re.sub(r"\s+", " ", line).replace("{}", "{") for line in lines]
    return sorted(line for line in kept if re.match(r"(message|enum|rpc|[\w.]+ \w+ = \d+;|[A-Z]+ = \d+;)", line))


def described(file: FileDescriptorProto) -> list[str]:
    kinds = {9: "string", 12: "bytes", 13: "uint32"}
    found = []
    for message in file.message_type:
        found.append(f"message {message.name} {{")
        for field in message.field:
            kind = kinds.get(field.type) or field.type_name.rpartition(".")[2]
            found.append(f"{kind} {field.name} = {field.number};")
    for enum in file.enum_type:
        found.append(f"enum {enum.name} {{")
        found += [f"{value.name} = {value.number};" for value in enum.value]
    for method in file.service[0].method:
        stream = "stream " if method.server_streaming else ""
        names = (method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2])
        found.append(f"rpc {method.name}({names[0]}) returns ({stream}{names[1]});")
    return sorted(found)
