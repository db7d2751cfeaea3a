"""Drawn images are kept: whatever interrupts or damages them, only what is missing is drawn again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines import assert_same, drawn, small_pipeline


class TestCache:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return small_pipeline(tmp_path / "model")

    def files(self, cache: Path) -> dict[Path, tuple[int, int]]:
        stats = {file: file.stat() for file in sorted(cache.rglob("*.npz"))}
        return {file: (stat.st_mtime_ns, stat.st_ino) for file, stat in stats.items()}

    def test_a_second_call_draws_nothing_and_more_samples_only_the_rest(self, tmp_path: Path, model: Path) -> None:
        cache, told = tmp_path / "cache", []
        first = drawn(model, 5, cache=cache, batch_size=2, on_progress=lambda *at: told.append(at))
        assert told == [(2, 5), (4, 5), (5, 5)]
        before = self.files(cache)
        assert [file.name for file in before] == ["00000000.npz", "00000002.npz", "00000004.npz"]
        assert torch.equal(drawn(model, 5, cache=cache, batch_size=64), first)
        assert torch.equal(drawn(model, 3, cache=cache), first[:3])
        assert self.files(cache) == before
        more = drawn(model, 9, cache=cache, batch_size=3)
        after = self.files(cache)
        assert before.items() <= after.items() and [file.name for file in after][3:] == ["00000005.npz", "00000008.npz"]
        assert torch.equal(more[:5], first)
        assert_same(more, drawn(model, 9))

    def test_an_interrupted_call_is_taken_up_where_it_stopped(self, tmp_path: Path, model: Path) -> None:
        def stop(done: int, total: int) -> None:
            if done >= 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            drawn(model, 6, cache=tmp_path / "cache", batch_size=2, on_progress=stop)
        before = self.files(tmp_path / "cache")
        assert len(before) == 2
        next(iter(before)).with_name("00000004.tmp").write_bytes(b"half of a batch")
        resumed = drawn(model, 6, cache=tmp_path / "cache", batch_size=2)
        assert before.items() <= self.files(tmp_path / "cache").items()
        assert_same(resumed, drawn(model, 6))

    @pytest.mark.parametrize("batch_size", [1, 2, 64])
    def test_a_lost_batch_is_drawn_again_and_no_other(self, tmp_path: Path, model: Path, batch_size: int) -> None:
        cache = tmp_path / "cache"
        whole = drawn(model, cache=cache, batch_size=3)
        before = self.files(cache)
        lost = next(file for file in before if file.name == "00000003.npz")
        lost.unlink()
        assert_same(drawn(model, cache=cache, batch_size=batch_size), whole)
        kept = {file: stat for file, stat in before.items() if file != lost}
        assert kept.items() <= self.files(cache).items()
        assert sum(len(np.load(file)["images"]) for file in self.files(cache)) == len(whole)

    def test_a_damaged_batch_is_drawn_again(
        self, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = tmp_path / "cache"
        whole = drawn(model, cache=cache, batch_size=3)
        file = list(self.files(cache))[1]
        intact = file.read_bytes()

        @settings(max_examples=40, deadline=None)
        @given(st.integers(0, len(intact) - 1), st.integers(1, 255), st.booleans())
        def damaged_at(position: int, flip: int, cut: bool) -> None:
            tail = b"" if cut else bytes([intact[position] ^ flip]) + intact[position + 1 :]
            file.write_bytes(intact[:position] + tail)
            assert_same(drawn(model, cache=cache, batch_size=3), whole)

        damaged_at()
        file.write_bytes(intact[:-100])
        with caplog.at_level(logging.WARNING):
            drawn(model, cache=cache, batch_size=3)
        assert f"{file} is damaged" in caplog.text
        assert file.stat().st_size == len(intact)

    def test_another_model_seed_or_number_of_steps_reuses_nothing(self, tmp_path: Path, model: Path) -> None:
        cache = tmp_path / "cache"
        before = drawn(model, cache=cache)
        for more in ({"seed": 1}, {"steps": 4}):
            assert_same(drawn(model, cache=cache, **more), drawn(model, **more))
        small_pipeline(model, seed=1)
        assert_same(drawn(model, cache=cache), drawn(model))
        assert not torch.allclose(drawn(model, cache=cache), before, atol=1e-3)
        assert len(list(cache.iterdir())) == 4

    def test_another_schedule_is_another_model_and_a_copy_elsewhere_is_the_same(
        self, tmp_path: Path, model: Path
    ) -> None:
        cache = tmp_path / "cache"
        drawn(model, cache=cache)
        drawn(small_pipeline(tmp_path / "copy"), cache=cache)
        assert len(list(cache.iterdir())) == 1
        schedule = model / "scheduler" / "scheduler_config.json"
        schedule.write_text(schedule.read_text().replace('"linear"', '"squaredcos_cap_v2"'))
        drawn(model, cache=cache)
        assert len(list(cache.iterdir())) == 2

    def test_the_cache_says_what_it_holds(self, tmp_path: Path, model: Path) -> None:
        drawn(model, cache=tmp_path / "cache", seed=5)
        (key,) = (tmp_path / "cache").glob("*/key.json")
        assert json.loads(key.read_text())["seed"] == 5
