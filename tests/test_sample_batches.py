"""Batches as bytes: protobuf's own, without its copies; and the segments they are written to."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from sample_services import Serving, pictures

from ret_fl.samples import service_pb2 as pb
from ret_fl.samples.batches import Batch, from_message, to_message
from ret_fl.samples.cache import SegmentCache
from ret_fl.samples.client import SampleServiceError
from ret_fl.samples.records import Description, make_records

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([16_383, 16_384, 2_097_151, 2_097_152]))


@given(SIZES, st.sampled_from([pb.NONE, pb.ZLIB]), st.binary(min_size=1, max_size=5))
def test_a_batch_is_what_protobuf_makes_of_it_and_comes_back(size: int, compression: int, word: bytes) -> None:
    records = (word * (size // len(word) + 1))[:size]
    message = to_message(Batch(memoryview(records), compression))
    assert message == pb.Batch(records=records, compression=compression).SerializeToString()
    back = from_message(message)
    assert bytes(back.records) == records and back.compression == compression


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_protobuf_reads_them(message: bytes) -> None:
    try:
        expected = pb.Batch.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            from_message(message)
        return
    back = from_message(message)
    assert (bytes(back.records), back.compression) == (expected.records, expected.compression)


@pytest.mark.parametrize(
    "message",
    [
        b"\x10\x01\x0a\x02ab",  # the fields in the other order
        b"\x0a\x02ab\x10\x00",  # a default that is written
        b"\x0a\x82\x80\x00ab",  # a length with more bytes than it needs
        b"\x0a\x01a\x0a\x02bc",  # a field twice: the last one counts
        b"\x0a\x02ab\x18\x05",  # a field of later versions
    ],
)
def test_other_ways_to_write_a_batch_are_understood(message: bytes) -> None:
    expected = pb.Batch.FromString(message)
    back = from_message(message)
    assert (bytes(back.records), back.compression) == (expected.records, expected.compression)


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\xffab", b"\x0a\x02ab\x10"])
def test_a_cut_batch_is_none(message: bytes) -> None:
    with pytest.raises(DecodeError):
        from_message(message)


def test_records_may_be_made_in_memory_of_their_own() -> None:
    store = pictures(20)
    record = Description.of(store, "photo").record
    room = np.empty(8, record)
    whole = store.subset(np.arange(19, -1, -1))
    for part in (store, whole):
        for ids in (np.array([3, 1, 19]), np.arange(8)):
            made = make_records(part, ids, record, room)
            assert np.shares_memory(made, room)
            assert (made == make_records(part, ids, record)).all()
            assert (made["pixels"] == part.pixels(ids).numpy()).all()


def test_a_segment_is_written_in_parts_and_seen_when_it_is_whole(tmp_path: Path) -> None:
    store = pictures(30)
    known = Description.of(store, "photo")
    records = make_records(store, np.arange(30), known.record)
    writer = SegmentCache(tmp_path, 1_000_000).begin(known)
    for first in (0, 7, 21):
        writer.append(records[first : {0: 7, 7: 21, 21: 30}[first]])
        assert list(tmp_path.glob("*.npy")) == []
    segment = writer.finish()
    assert (segment.records == records).all()
    assert segment.ids.tolist() == segment.rows.tolist() == list(range(30))
    assert (np.load(segment.path) == records).all() and list(tmp_path.iterdir()) == [segment.path]


def test_nothing_remains_of_what_does_not_fit_on_the_disk_and_the_fetch_says_so(tmp_path: Path) -> None:
    serving = Serving(tmp_path, pictures(600, (3, 32, 32)))
    order = serving.order(np.arange(600))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving.running():
        access = serving.access()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # no file may be larger: as full as a disk can be
        try:
            with pytest.raises(OSError, match="File too large"):
                access.samples(order)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in (tmp_path / "cache" / "samples").iterdir()] == ["lock"]
        access.samples(order)
    assert len(serving.cached_files()) == 1


def test_a_disk_that_is_full_is_told_of_where_the_fetch_fails_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serving = Serving(tmp_path, pictures(600, (3, 32, 32)))
    order = serving.order(np.arange(600))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving.running():
        access = serving.access()
        fetched = access._client.fetch

        def broken(*arguments: object) -> Iterator[np.ndarray]:
            yield from fetched(*arguments)  # type: ignore[arg-type]
            raise SampleServiceError("away")

        access._client.fetch = broken  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(SampleServiceError, match="away"):
                access.samples(order)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be kept: [Errno 27] File too large" in caplog.text
