"""Encodings are computed once, shared, and never taken for those of other data or other weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import captioned_folder, text_config, text_settings, training_set
from conftest import ROOT, opened_model
from diffusers import AutoencoderKL
from torch import Tensor

from ret_fl.config import ConfigError, RunConfig
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.encoders import Encoders, fingerprint
from ret_fl.diffusion.encodings import EncodingFile, encoding_file
from ret_fl.diffusion.latents import LatentObjective

transformers = pytest.importorskip("transformers")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    text_settings(tmp_path)
    return tmp_path


class Counting:
    """Counts the images and captions that are really encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.captions = 0
        posterior, embed = Encoders.posterior, Encoders.embed

        def counted_posterior(encoders: Encoders, images: Tensor) -> Tensor:
            self.images += len(images)
            return posterior(encoders, images)

        def counted_embed(encoders: Encoders, tokens: Tensor) -> Tensor:
            self.captions += len(tokens)
            return embed(encoders, tokens)

        monkeypatch.setattr(Encoders, "posterior", counted_posterior)
        monkeypatch.setattr(Encoders, "embed", counted_embed)

    def since(self) -> tuple[int, int]:
        counted = (self.images, self.captions)
        self.images = self.captions = 0
        return counted


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def objective_of(config: RunConfig) -> LatentObjective:
    """As a process that starts anew has it."""
    fingerprint.cache_clear()
    load_splits.cache_clear()
    objective = opened_model(config).objective(torch.device("cpu"))
    assert isinstance(objective, LatentObjective)
    return objective


def batch(config: RunConfig, ids: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    objective = objective_of(config)
    torch.manual_seed(seed)
    return objective.batch(training_set(config), torch.tensor(ids))


def test_a_latent_is_drawn_anew_at_every_visit_from_what_is_kept(place: Path, counting: Counting) -> None:
    config = text_config(place)
    first, told = batch(config, [0, 3, 5])
    assert counting.since() == (3, 3)
    again, told_again = batch(config, [0, 3, 5])
    other, _ = batch(config, [0, 3, 5], seed=1)
    assert counting.since() == (0, 0)
    assert torch.equal(first, again) and torch.equal(told, told_again)
    assert not torch.equal(first, other)
    encoders = Encoders(place / "model", torch.device("cpu"))
    store = training_set(config)
    torch.manual_seed(0)
    images, _ = store.fetch(torch.tensor([0, 3, 5]))
    with torch.no_grad():
        plain = encoders.vae.encode(images).latent_dist.sample() * encoders.vae.config.scaling_factor
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=0)
    uncached, told_uncached = batch(text_config(place, **{"text.cache": False}), [0, 3, 5])
    torch.testing.assert_close(first, uncached, atol=1e-5, rtol=0)
    torch.testing.assert_close(told, told_uncached, atol=1e-5, rtol=0)


def test_runs_shards_and_seeds_share_what_was_encoded(place: Path, counting: Counting) -> None:
    store = training_set(text_config(place))
    objective_of(text_config(place)).prepare(store, torch.arange(len(store)))
    first, every = ({text for own in store.captions or () for text in own[:n]} for n in (1, 2))
    assert counting.since() == (len(store), len(first))
    objective_of(text_config(place, **{"text.captions": "random"})).prepare(store, torch.arange(len(store)))
    assert counting.since() == (0, len(every) - len(first))
    for changes in ({"seed": 7}, {"shards": 5}, {"lora.rank": 2}, {"text.captions": "random"}, {"text.noise": 1.0}):
        config = text_config(place, **changes)
        objective_of(config).prepare(training_set(config), torch.arange(len(store)))
    assert counting.since() == (0, 0)


def test_what_was_encoded_from_other_images_or_captions_is_not_used(place: Path, counting: Counting) -> None:
    config = text_config(place)
    batch(config, [0, 1])
    counting.since()
    batch(text_config(place, **{"data.image-size": 8}), [0, 1])
    assert counting.images == 2
    counting.since()
    told = {f"{i % 2}/{i:02}.png": f"x {chr(97 + i)}" for i in range(12)}
    captioned_folder(place / "images", captions=told)
    batch(config, [0, 1])
    assert counting.since() == (2, 2)


def test_other_weights_of_the_vae_or_the_text_encoder_encode_anew(place: Path, counting: Counting) -> None:
    config = text_config(place)
    latents, told = batch(config, [0, 1])
    vae = AutoencoderKL.from_pretrained(place / "model" / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias += 0.5
    vae.save_pretrained(place / "model" / "vae")
    counting.since()
    other, same = batch(config, [0, 1])
    assert counting.since() == (2, 0)
    assert not torch.allclose(latents, other, atol=1e-3) and torch.equal(told, same)
    encoder = transformers.CLIPTextModel.from_pretrained(place / "model" / "text_encoder")
    with torch.no_grad():
        next(encoder.parameters()).add_(torch.randn(16))
    encoder.save_pretrained(place / "model" / "text_encoder")
    counting.since()
    same_latents, changed = batch(config, [0, 1])
    assert counting.since() == (0, 2)
    assert torch.equal(other, same_latents) and not torch.allclose(told, changed, atol=1e-3)


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "emptied"])
def test_a_damaged_cache_is_made_good(place: Path, counting: Counting, damage: str) -> None:
    config = text_config(place)
    whole = batch(config, [0, 1, 2])
    counting.since()
    for file in (place / "cache" / "encodings").glob("*.rows"):
        content = bytearray(file.read_bytes())
        content[100] ^= 1  # in row 0 of both files
        file.write_bytes({"flipped byte": content, "cut short": content[:-7], "emptied": b""}[damage])
    again = batch(config, [0, 1, 2])
    assert counting.since() == ((1, 1) if damage == "flipped byte" else (3, 3))
    for left, right in zip(whole, again, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_changed_images_are_encoded_as_they_are(place: Path, counting: Counting) -> None:
    """Augmentation is of images: what is kept of the unchanged ones says nothing of them."""
    config = text_config(place)
    store, objective = training_set(config), objective_of(config)
    objective.prepare(store, torch.arange(4))
    counting.since()
    torch.manual_seed(0)
    changed, told = objective.batch(store, torch.tensor([0, 1]), lambda images: -images)
    assert counting.since() == (2, 0)
    mirrored = SampleStore(255 - store.pixels(), captions=store.captions)
    torch.manual_seed(0)
    expected, _ = (
        opened_model(text_config(place, **{"text.cache": False}))
        .objective(torch.device("cpu"))
        .batch(mirrored, torch.tensor([0, 1]))
    )
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)
    assert torch.equal(told, objective.batch(store, torch.tensor([0, 1]))[1])


def test_mirrored_images_are_encoded_once_too(place: Path, counting: Counting) -> None:
    config, turned = text_config(place), torch.tensor([True, False, True])
    store, objective, ids = training_set(config), objective_of(config), torch.tensor([0, 3, 5])
    objective.prepare(store, torch.arange(len(store)), mirrored=True)
    assert counting.since()[0] == 2 * len(store)
    torch.manual_seed(0)
    kept, told = objective.batch(store, ids, mirrored=turned)
    assert counting.since() == (0, 0)
    torch.manual_seed(0)
    uncached = objective_of(text_config(place, **{"text.cache": False})).batch(store, ids, mirrored=turned)
    torch.testing.assert_close((kept, told), uncached, atol=1e-5, rtol=0)
    assert counting.since() == (3, 3)
    torch.manual_seed(0)
    plain, _ = objective.batch(store, ids)
    changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(kept, plain, strict=True)]
    assert changed == turned.tolist()
    objective_of(config).prepare(store, torch.arange(len(store)))
    assert counting.since() == (0, 0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_encoders_take_no_memory_while_everything_is_known(place: Path, mirrored: bool) -> None:
    config = text_config(place)
    objective = objective_of(config)
    objective.prepare(training_set(config), torch.arange(4), mirrored=mirrored)
    objective.batch(training_set(config), torch.arange(4), mirrored=torch.tensor([False, mirrored] * 2))
    assert not {"vae", "text_encoder"} & vars(objective.encoders).keys()


# --- the file ---------------------------------------------------------------------------------------------------


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_two_processes_encode_every_row_once(tmp_path: Path) -> None:
    """Both want the same rows at the same time; each row is written by one, and read right by both."""
    code = (
        "import sys, time, numpy as np, torch\nfrom pathlib import Path\n"
        "from ret_fl.diffusion.encodings import EncodingFile\n"
        "file, count = EncodingFile(Path(sys.argv[1]), 64, (3,)), 0\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "def encode(rows):\n"
        "    global count; count += len(rows); time.sleep(.02)\n"
        "    return torch.from_numpy(rows)[:, None].float() * torch.tensor([1., 2., 3.])\n"
        "for start in range(0, 64, 16): file.fill(np.arange(start, start + 16), encode)\n"
        "read = file.read(np.arange(64))\n"
        "assert torch.equal(read[:, 1], 2. * torch.arange(64))\n"
        "print(count)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "shared.rows")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        ) for _ in range(2)
    ]  # fmt: skip
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=60)[0]) for process in both]
    assert sum(counts) == 64
    assert not list(tmp_path.glob("*.tmp"))


def test_a_row_that_was_never_written_is_missing_whatever_its_values(tmp_path: Path) -> None:
    file = EncodingFile(tmp_path / "some.rows", 5, (2,))
    file.fill(rows(3, 1, 3), lambda part: torch.zeros(len(part), 2))
    assert EncodingFile(tmp_path / "some.rows", 5, (2,)).missing(np.arange(5)).tolist() == [0, 2, 4]
    assert torch.equal(file.read(rows(1, 3)), torch.zeros(2, 2))


def test_rows_written_before_an_interruption_stay(tmp_path: Path) -> None:
    def dying(part: np.ndarray) -> Tensor:
        if 8 in part:
            raise KeyboardInterrupt
        return torch.ones(len(part), 2)

    with pytest.raises(KeyboardInterrupt):
        EncodingFile(tmp_path / "some.rows", 20, (2,)).fill(np.arange(20), dying)
    assert EncodingFile(tmp_path / "some.rows", 20, (2,)).missing(np.arange(20)).tolist() == list(range(8, 20))


def test_a_full_disk_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = EncodingFile(tmp_path / "some.rows", 5, (2,))
    shutil.rmtree(tmp_path, ignore_errors=True)
    with pytest.raises(ConfigError, match=r"make room, set data\.cache-dir to another disk, or text\.cache=false"):
        file._write(rows(0), torch.zeros(1, 2))
    (tmp_path.parent / "a file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot create the cache .*set data\.cache-dir"):
        encoding_file(tmp_path.parent / "a file" / "cache", "x", 1, (1,))
