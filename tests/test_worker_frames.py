"""What goes between a client process and its SuperNode's worker, over real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from test_worker import order

from ret_fl.worker import frames

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

shapes = st.lists(st.integers(0, 3), max_size=3)
arrays = shapes.map(lambda shape: Array(np.arange(np.prod(shape or [1]), dtype=np.float32).reshape(shape)))
keys = st.text(max_size=4)
records = st.one_of(
    st.dictionaries(keys, arrays, max_size=3).map(ArrayRecord),
    st.dictionaries(keys, st.floats(allow_nan=False), max_size=3).map(MetricRecord),
    st.dictionaries(keys, st.one_of(st.text(), st.binary(), st.integers(0, 9)), max_size=3).map(ConfigRecord),
)


@given(st.dictionaries(st.text(max_size=4), records, max_size=4))
def test_a_message_arrives_as_it_was(content: dict[str, ArrayRecord | MetricRecord | ConfigRecord]) -> None:
    sent = order(content=RecordDict({**content}) if content else RecordDict({"": ConfigRecord()}))
    before = frames.message_to_proto(sent).SerializeToString(deterministic=True)
    left, right = socket.socketpair()
    with left, right:
        frames.send_frames(left, *frames.pack_message(sent))
        left.shutdown(socket.SHUT_WR)
        got = frames.receive_message(right)
        assert not right.recv(1)
    assert frames.message_to_proto(got).SerializeToString(deterministic=True) == before
    assert frames.message_to_proto(sent).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ((1 << 62).to_bytes(8, "big"), "a frame of 4,611,686,018,427,387,904 bytes"),
        ((9).to_bytes(8, "big") + b"short", "ended the connection"),
        (b"", "ended the connection"),
        ((4).to_bytes(8, "big") + b"nope", "not JSON"),
        ((2).to_bytes(8, "big") + b"[]", "no JSON object"),
    ],
)
def test_what_is_no_frame_is_refused(sent: bytes, message: str) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(sent)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(frames.FrameError, match=message):
            frames.receive_told(right)


def test_what_is_no_message_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right:
        frames.send_frames(left, b"\xff\xff")
        with pytest.raises(frames.FrameError, match="no Message of Flower's"):
            frames.receive_message(right)


@pytest.mark.skipif(os.getuid() != 0, reason="takes root to be another user")
def test_another_users_process_is_told_apart() -> None:
    path = f"/tmp/ret-fl-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            Path(path).chmod(0o777)
            listener.listen()
            code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r}); s.recv(1)"
            found = []
            for user in (0, 65534):
                process = subprocess.Popen(["/usr/bin/env", "python3", "-c", code], user=user)
                connection, _ = listener.accept()
                with connection:
                    found.append(frames.is_own(connection))
                process.wait()
            assert found == [True, False]
        finally:
            Path(path).unlink()
