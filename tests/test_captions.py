"""Captions reach the samples they belong to, and the caption defences do to them what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import captioned_folder, text_config, text_settings, training_set
from conftest import opened_model, run_server
from torch import Tensor

from ret_fl.config import ConfigError, DataConfig, RunConfig, Scalar
from ret_fl.data.sources import load_images, load_splits
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.latents import LatentObjective
from ret_fl.diffusion.text_to_image import data_read

pytest.importorskip("transformers")


def folder_config(path: Path, **more: object) -> DataConfig:
    settings = {
        "source": "image-folder",
        "path": str(path),
        "reference": False,
        "cache_dir": str(path.parent / "cache"),
    }
    return DataConfig.model_validate(settings | more)


def hf_config(path: Path, **more: object) -> DataConfig:
    return folder_config(path, source="hf", **more)


# --- where they come from ---------------------------------------------------------------------------------------


def test_every_sample_keeps_its_captions_through_split_repeats_and_cache(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "images")
    (folder / "0" / "04.png").write_bytes(b"no image")
    for _ in range(2):  # decoded, then from the cache
        load_splits.cache_clear()
        data = load_splits(folder_config(folder, held_out=0.3, canaries=2, canary_repeats=3))
        assert data.unreadable == ("0/04.png",)
        told = json.loads((folder / "captions.json").read_text())
        by_pixels = {}
        for name, captions in told.items():
            if name != "0/04.png":
                i = int(name[2:4])
                by_pixels[np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8).tobytes()] = captions
        for store in (data.train, data.held_out):
            assert store.captions is not None and len(store.captions) == len(store)
            for pixels, own in zip(store.pixels(), store.captions, strict=True):
                assert list(own) == by_pixels[pixels.permute(1, 2, 0).contiguous().numpy().tobytes()]
        assert len(data.train) == 8 + 2 * 2


def test_held_out_images_of_another_folder_have_the_captions_of_their_own_file(tmp_path: Path) -> None:
    training, beside = captioned_folder(tmp_path / "images"), captioned_folder(tmp_path / "beside")
    told = json.loads((beside / "captions.json").read_text())
    (beside / "captions.json").write_text(json.dumps({name: f"beside {name}" for name in told}))
    config = folder_config(training, held_out_path=str(beside), held_out=0)
    found = load_images(config)
    assert found.captions is not None and found.outside is not None
    assert [own[0].startswith("beside") for own in found.captions] == found.outside.tolist()
    (beside / "captions.json").unlink()
    with pytest.raises(ConfigError, match=r"beside.captions\.json cannot be read.*data\.captions='' reads none"):
        load_images(config)
    assert load_images(config.model_copy(update={"captions": ""})).captions is None


def test_captions_belong_to_the_fingerprint_and_images_without_keep_theirs() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    plain, one, other = (
        SampleStore(pixels, captions=captions) for captions in (None, (("a",), ("b",)), (("a",), ("c",)))
    )
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    # what it was before stores had captions: checkpoints and caches made then stay valid
    assert plain.fingerprint == "fe6b3ac1448659a8197dfeda335b237517f7bea3e78fa8dda7c1a71022afd268"
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        SampleStore(pixels, captions=(("a",),))


@pytest.mark.parametrize("key", ["0/00.png", "./data/laion_10k/images/0/00.png", "C:\\data\\0\\00.png"])
def test_paths_in_captions_may_begin_elsewhere(tmp_path: Path, key: str) -> None:
    folder = captioned_folder(tmp_path / "images", 1, captions={key: "one", "elsewhere/9.png": ["unused"]})
    assert load_images(folder_config(folder)).captions == (("one",),)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"0/00.png": "a"}, r"gives 1/01\.png no caption"),
        ({"0/00.png": [], "1/01.png": "b"}, r"gives 0/00\.png no caption"),
        ({"0/00.png": [3], "1/01.png": "b"}, r"gives 0/00\.png no caption"),
        (["a", "b"], "must hold one object"),
    ],
)
def test_captions_that_are_not_those_of_the_images_are_told(tmp_path: Path, captions: object, message: str) -> None:
    folder = captioned_folder(tmp_path / "images", 2, captions=captions)
    with pytest.raises(ConfigError, match=rf"data\.captions: .*{message}"):
        load_images(folder_config(folder))
    assert load_images(folder_config(folder, captions="")).captions is None


@pytest.mark.parametrize(
    ("captions", "named"),
    [
        ({"/data/0/00.png": "a", "1/01.png": "b"}, ["/data/0/00.png", "00.png", "0/00.png"]),
        ({"a/0/00.png": "x", "b/0/00.png": "y", "1/01.png": "b", "00.png": "c"}, ["a/0/00.png", "b/0/00.png"]),
    ],
)
def test_a_path_that_may_be_several_files_is_refused_by_name(
    tmp_path: Path, captions: object, named: list[str]
) -> None:
    folder = captioned_folder(tmp_path / "images", 2, captions=captions)
    (folder / "00.png").write_bytes((folder / "1" / "01.png").read_bytes())
    with pytest.raises(ConfigError) as error:
        load_images(folder_config(folder))
    assert all(name in str(error.value) for name in named)


def test_the_very_path_counts_before_an_end_and_two_paths_may_say_the_same(tmp_path: Path) -> None:
    told = {"x/0/00.png": "other", "0/00.png": "own", "a/1/01.png": "same", "b/1/01.png": "same"}
    folder = captioned_folder(tmp_path / "images", 2, captions=told)
    assert load_images(folder_config(folder)).captions == (("own",), ("same",))


def test_a_run_that_is_told_no_text_does_not_look_at_captions(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "images", 12, captions={"no": "caption of any image"})
    changes: dict[str, Scalar] = {"data.source": "image-folder", "data.path": str(folder), "data.limit": 0}
    config = tiny(changes, {"data.image-size": 8, "data.cache-dir": str(tmp_path / "cache"), "num-server-rounds": 1})
    run = run_server(config, tmp_path / "run")
    assert run.summary.is_file()
    with pytest.raises(ConfigError, match="no caption"):
        load_splits(config.data)
    assert load_splits(data_read(config)).train.captions is None


def test_captions_in_another_file_are_found_by_name(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "images", 2)
    (folder / "blip.json").write_text(json.dumps({"0/00.png": "x", "1/01.png": "y"}))
    assert load_images(folder_config(folder, captions="blip.json")).captions == (("x",), ("y",))
    (folder / "blip.json").write_text(json.dumps({"0/00.png": "xx", "1/01.png": "y"}))
    assert load_images(folder_config(folder, captions="blip.json")).captions == (("xx",), ("y",))


@pytest.mark.parametrize("several", [False, True])
def test_an_hf_column_holds_captions(tmp_path: Path, several: bool) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    images = [Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(4)]
    texts = [["a", "b"], ["c"], ["d", "e"], ["f"]] if several else ["a", "b", "c", "d"]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "TEXT": datasets.List(datasets.Value("string")) if several else datasets.Value("string"),
        }
    )
    datasets.Dataset.from_dict({"image": images, "TEXT": texts}, features).save_to_disk(tmp_path / "saved")
    found = load_images(hf_config(tmp_path / "saved", caption_column="TEXT"))
    assert found.captions == tuple(tuple(text) for text in texts)
    assert load_images(hf_config(tmp_path / "saved")).captions is None
    datasets.Dataset.from_dict({"image": images, "TEXT": ["a", None, "c", "d"]}).save_to_disk(tmp_path / "holes")
    with pytest.raises(ConfigError, match=r"data\.caption-column: row 1 of 'TEXT' has no caption"):
        load_images(hf_config(tmp_path / "holes", caption_column="TEXT"))


# --- the defences -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    text_settings(folder)
    return folder


def objective_of(place: Path, **changes: Scalar) -> LatentObjective:
    objective = opened_model(text_config(place, **changes)).objective(torch.device("cpu"))
    assert isinstance(objective, LatentObjective)
    return objective


def told(place: Path, ids: list[int], seed: int = 0, **changes: Scalar) -> Tensor:
    torch.manual_seed(seed)
    return objective_of(place, **changes).batch(training_set(text_config(place)), torch.tensor(ids))[1]


def embedded(place: Path, captions: list[str]) -> Tensor:
    encoders = objective_of(place).encoders
    return encoders.embed(encoders.tokens(captions))


def test_the_first_caption_is_read_unless_one_is_drawn(place: Path) -> None:
    captions = training_set(text_config(place)).captions
    assert captions is not None and len(captions[2]) == 2
    both = embedded(place, list(captions[2]))
    torch.testing.assert_close(told(place, [2] * 20), both[:1].expand(20, -1, -1), atol=1e-5, rtol=0)
    drawn = told(place, [2] * 20, **{"text.captions": "random"})
    nearest = (drawn[:, None] - both).square().sum(dim=(2, 3)).argmin(dim=1)
    torch.testing.assert_close(drawn, both[nearest], atol=1e-5, rtol=0)
    assert 4 <= int(nearest.sum()) <= 16


def test_noise_on_embeddings_has_the_deviation_asked_for(place: Path) -> None:
    plain, noisy = told(place, [0, 1, 2]), told(place, [0, 1, 2], **{"text.noise": 0.3})
    assert 0.27 < float((noisy - plain).std()) < 0.33
    assert not torch.equal(noisy, told(place, [0, 1, 2], seed=1, **{"text.noise": 0.3}))


def rewritten(place: Path, captions: list[str], **changes: Scalar) -> list[list[int]]:
    """Tokens without padding."""
    objective = objective_of(place, **changes)
    tokens = objective._rewritten(captions)
    assert tokens.shape == (len(captions), 16)
    end = objective.encoders.tokenizer.eos_token_id
    return [row[: row.index(end) + 1] for row in tokens.tolist()]


def test_inserted_tokens_leave_the_others_in_their_order(place: Path) -> None:
    (plain,) = rewritten(place, ["c blue"])
    for row in rewritten(place, ["c blue"] * 30, **{"text.insert-tokens": 2}):
        assert len(row) == len(plain) + 2
        assert (row[0], row[-1]) == (plain[0], plain[-1])
        rest = iter(row)
        assert all(token in rest for token in plain)
    (cut,) = rewritten(place, ["c blue"], **{"text.insert-tokens": 40})
    assert len(cut) == 16 and cut[-1] == plain[-1]


def test_as_many_tokens_are_replaced_as_asked(place: Path) -> None:
    (plain,) = rewritten(place, ["c blue"])
    changed = [
        sum(a != b for a, b in zip(row, plain, strict=True))
        for row in rewritten(place, ["c blue"] * 40, **{"text.replace-tokens": 2})
    ]
    assert max(changed) == 2 and sum(changed) > 60  # now and then a token is replaced by itself
    specials = {plain[0], plain[-1]}
    for row in rewritten(place, ["c blue"] * 40, **{"text.replace-tokens": 9}):
        assert len(row) == len(plain) and not specials & set(row[1:-1])


def test_rewritten_captions_are_new_at_every_visit_and_repeat_with_the_seed(place: Path) -> None:
    changes: dict[str, Scalar] = {"text.insert-tokens": 1, "text.replace-tokens": 1}
    first, other = (told(place, [0, 1], seed=seed, **changes) for seed in (0, 1))
    assert not torch.equal(first, other)
    assert torch.equal(first, told(place, [0, 1], **changes))


def test_no_defence_touches_what_losses_are_measured_on(place: Path) -> None:
    store, ids = training_set(text_config(place)), torch.tensor([0, 4])
    changes: dict[str, Scalar] = {
        "text.insert-tokens": 3, "text.replace-tokens": 3, "text.noise": 2.0, "text.captions": "random",
    }  # fmt: skip
    plain, disturbed = (objective_of(place, **c).fixed(store, ids) for c in ({}, changes))
    for left, right in zip(plain, disturbed, strict=True):
        assert torch.equal(left, right)
