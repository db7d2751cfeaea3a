"""The cache of fetched samples: no network for what is there, never above its limit, never wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sample_services import Serving, pictures

from ret_fl.protocol import TrainOrder
from ret_fl.samples import access as access_module
from ret_fl.samples import cache as cache_module
from ret_fl.samples.access import ServedAccess
from ret_fl.samples.cache import CacheFullError
from ret_fl.samples.client import SampleServiceError

RECORD = 16 + 3 * 32 * 32
SHAPE = (3, 32, 32)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """1,500 images; a segment holds 100."""
    monkeypatch.setattr(access_module, "SEGMENT_BYTES", 100 * RECORD)
    monkeypatch.setattr(cache_module, "SEGMENT_BYTES", 100 * RECORD)
    return Serving(tmp_path, pictures(1500, SHAPE))


def assert_right(serving: Serving, access: ServedAccess, order: TrainOrder) -> None:
    ids = torch.from_numpy(order.ids)
    images, labels = access.samples(order).fetch(ids)
    expected_images, expected_labels = serving.store.fetch(ids)
    assert torch.equal(images, expected_images)
    assert labels is not None and expected_labels is not None and torch.equal(labels, expected_labels)


def held_bytes(serving: Serving) -> int:
    return sum(path.stat().st_size for path in serving.cached_files())


def fetched(access: ServedAccess) -> list[int]:
    """Every ID that is asked of the service from now on."""
    asked: list[int] = []
    fetch = access._client.fetch

    def counting(known: object, grant: object, signature: object, ids: np.ndarray, hashes: object) -> object:
        asked.extend(ids.tolist())
        return fetch(known, grant, signature, ids, hashes)  # type: ignore[arg-type]

    access._client.fetch = counting  # type: ignore[method-assign, assignment]
    return asked


def test_what_is_cached_needs_no_service_not_even_in_a_new_process(serving: Serving) -> None:
    order = serving.order(np.arange(0, 900, 3))
    with serving.running():
        assert_right(serving, serving.access(), order)
    fresh = serving.access(patience=0.2)
    assert fresh.describe(order) == serving.known
    assert_right(serving, fresh, order)
    assert_right(serving, fresh, serving.order([897, 3]))
    with pytest.raises(SampleServiceError):
        fresh.samples(serving.order([3, 4]))


def test_only_what_is_missing_is_fetched(serving: Serving) -> None:
    with serving.running():
        access = serving.access()
        access.samples(serving.order([5, 7, 9]))
        asked = fetched(access)
        assert_right(serving, access, serving.order([9, 8, 7, 6, 5]))
    assert asked == [6, 8]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "another id"])
def test_a_damaged_entry_is_fetched_again(serving: Serving, damage: str) -> None:
    order = serving.order(np.arange(50))
    with serving.running():
        serving.access().samples(order)
        (path,) = serving.cached_files()
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) - 43 * RECORD + 40] ^= 1
        elif damage == "another id":
            data[len(data) - 43 * RECORD] = 8
        else:
            data = data[: len(data) // 2 if damage == "truncate" else 0]
        path.write_bytes(data)
        access = serving.access()
        asked = fetched(access)
        assert_right(serving, access, order)
    assert asked == ([7] if damage in ("flip", "another id") else list(range(50)))


def test_the_limit_holds_and_what_was_used_last_stays(serving: Serving) -> None:
    limit = 2_000_000
    with serving.running():
        access = serving.access(cache_mb=2)
        for first in (0, 300, 600, 900):
            assert_right(serving, access, serving.order(np.arange(first, first + 300)))
            assert held_bytes(serving) <= limit
            time.sleep(0.02)  # file times tell which was used last
        asked = fetched(access)
        assert_right(serving, access, serving.order(np.arange(900, 1200)))
        assert asked == []
        assert_right(serving, access, serving.order(np.arange(0, 300)))
        assert asked == list(range(300))


def test_orders_that_take_a_little_of_many_segments_still_fit(serving: Serving) -> None:
    rng = np.random.default_rng(0)
    with serving.running():
        access = serving.access(cache_mb=2)
        for _ in range(6):
            assert_right(serving, access, serving.order(np.sort(rng.permutation(1500)[:600])))
            assert held_bytes(serving) <= 2_000_000


def test_an_order_beyond_the_limit_names_the_setting(serving: Serving) -> None:
    with serving.running(), pytest.raises(CacheFullError, match=r"raise service\.cache-mb"):
        serving.access(cache_mb=1).samples(serving.order(np.arange(1000)))


def test_a_segment_that_another_process_drops_stays_readable(serving: Serving) -> None:
    order = serving.order(np.arange(100))
    with serving.running():
        samples = serving.access().samples(order)
        for path in serving.cached_files():
            path.unlink()
        images, _ = samples.fetch(torch.arange(100))
        assert torch.equal(images, serving.store.fetch(torch.arange(100))[0])
        assert_right(serving, serving.access(), order)


def test_half_written_files_of_dead_processes_go(serving: Serving) -> None:
    with serving.running():
        access = serving.access()
        stale, fresh = (serving.folder / "cache" / "samples" / name for name in ("a.tmp", "b.tmp"))
        stale.write_bytes(b"x")
        fresh.write_bytes(b"x")
        os.utime(stale, (1, 1))
        access.samples(serving.order([1]))
    assert fresh.exists() and not stale.exists()


CLIENT = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import numpy as np, torch
from sample_services import Serving, pictures
serving = Serving(Path(sys.argv[1]), pictures(1500, (3, 32, 32)), port=int(sys.argv[2]))
access = serving.access(cache_mb=3, patience=60.0)
rng = np.random.default_rng(int(sys.argv[3]))
for _ in range(12):
    ids = np.sort(rng.permutation(1500)[:500])
    images, _ = access.samples(serving.order(ids)).fetch(torch.from_numpy(ids))
    assert torch.equal(images, serving.store.fetch(torch.from_numpy(ids))[0])
print("right")
"""


def test_two_processes_share_a_cache(serving: Serving) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with serving.running() as server:
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", CLIENT, str(serving.folder), str(server.port), str(seed)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for seed in (1, 2)
        ]
        assert [client.communicate(timeout=120)[0].strip() for client in clients] == ["right", "right"]
    assert held_bytes(serving) <= 3_000_000
