"""Image models see what their own preprocessing would show them; similarity and fidelity equal their definitions."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from ret_fl.audit.features import FeatureModel, Preprocessing, fidelity, find_inception, load_features, similarity
from ret_fl.audit.fidelity import (
    confident_share,
    frechet_distance,
    kernel_distance,
    precision_recall,
    train_classifier,
)

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
CLIP_SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
}


def pictures(count: int, channels: int = 3, height: int = 48, width: int = 40, seed: int = 0) -> Tensor:
    """uint8 images with sharp edges, gradients, some noise, and parts that are black or white."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    tilt = torch.rand(count, channels, 1, 1, generator=generator)
    smooth = tilt * x + (1 - tilt) * y + 0.1 * torch.rand(count, channels, height, width, generator=generator)
    edge = (x > torch.rand(count, 1, 1, 1, generator=generator)).float()
    return (255 * (0.8 * smooth + 0.8 * edge - 0.3).clamp(0, 1)).to(torch.uint8)


def pil_input(image: Tensor, size: tuple[int, int], crop: tuple[int, int], resample: Image.Resampling) -> Tensor:
    """The textbook way: PIL's resize to (height, width), centre crop, normalise; float32 [3, h, w]."""
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], resample)
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    cut = np.asarray(resized)[top : top + crop[0], left : left + crop[1]] / 255
    return torch.tensor((cut - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


def write_settings(folder: Path, **changes: Any) -> Path:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(CLIP_SETTINGS | changes))
    return path


# Preprocessing


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("side", [36, 90])
def test_preprocessing_equals_pil_when_shrinking_and_enlarging(
    tmp_path: Path, resample: Image.Resampling, side: int
) -> None:
    images = pictures(3)
    prepare = Preprocessing.from_file(write_settings(tmp_path, size={"shortest_edge": side}, resample=int(resample)))
    expected = torch.stack([pil_input(i, (int(side * 48 / 40), side), (32, 32), resample) for i in images])
    # PIL rounds to 8 bits after each of its two passes.
    torch.testing.assert_close(prepare(images / 255), expected, atol=1.5 / 255 / min(STD), rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"height": 50, "width": 34}},
        {"size": 36, "crop_size": 30},
        {"do_center_crop": False},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_preprocessing_equals_the_processor_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    images = pictures(3)
    prepare = Preprocessing.from_file(write_settings(tmp_path, **changes))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil", local_files_only=True)
    expected = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    scale = 255 if changes.get("do_rescale") is False else 2
    torch.testing.assert_close(prepare(images / 255), expected.float(), atol=scale * 1.5 / 255 / min(STD), rtol=1e-4)


def test_without_a_crop_an_integer_size_is_both_sides_as_in_old_vit_files(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 24, "image_mean": 0.5, "image_std": 0.5, "resample": 2}))
    inputs = Preprocessing.from_file(path)(pictures(2) / 255)
    assert inputs.shape == (2, 3, 24, 24)
    assert inputs.min() >= -1
    assert inputs.max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 1}, r"resample must be 2 \(bilinear\) or 3 \(bicubic\), got 1"),
        ({"size": {"longest_edge": 40}}, "size must be a positive integer"),
        ({"size": {"shortest_edge": 0}}, "size must be a positive integer"),
        ({"crop_size": None}, "do_center_crop is on, but crop_size is missing"),
        ({"image_std": None}, "image_std must be 3 numbers"),
        ({"image_std": [1, 1, 0]}, "above 0"),
        ({"crop_pct": 0.875}, "asks for crop_pct"),
        ({"rescale_offset": True}, "asks for rescale_offset"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_file(write_settings(tmp_path, **changes))


def test_settings_that_are_no_json_object_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="one JSON object"):
        Preprocessing.from_file(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        Preprocessing.from_file(path)


# transformers folders


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny networks with random weights, saved as the real ones are."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    clip = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    bert = transformers.BertConfig(**{k: v for k, v in text.items() if "token" not in k})
    networks = {
        "clip": transformers.CLIPModel(clip),
        "clip-vision": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
        "vit-classifier": transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        "resnet": transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "bert": transformers.BertModel(bert),
    }
    root = tmp_path_factory.mktemp("models")
    for name, network in networks.items():
        network.save_pretrained(root / name)
        write_settings(root / name)
    return {name: root / name for name in networks}


def expected_features(folder: Path, images: Tensor) -> Tensor:
    """The features by transformers' own processor and network, without ret-fl."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    inputs = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")
    kind = {
        "clip": transformers.CLIPModel,
        "clip-vision": transformers.CLIPVisionModel,
        "dinov2": transformers.Dinov2Model,
        "vit-classifier": transformers.ViTForImageClassification,
        "resnet": transformers.ResNetModel,
    }[folder.name]
    network = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        if folder.name == "clip":
            return network.get_image_features(**inputs).pooler_output
        if folder.name == "vit-classifier":
            return network.vit(**inputs).last_hidden_state[:, 0]
        return network(**inputs).pooler_output.flatten(1)


@pytest.mark.parametrize("name", ["clip", "clip-vision", "dinov2", "vit-classifier", "resnet"])
def test_features_are_those_of_the_network_behind_its_own_processor(folders: dict[str, Path], name: str) -> None:
    images = pictures(4)
    model = load_features(str(folders[name]))
    features = model.features(images)
    assert model.name == name
    assert features.dtype == torch.float32
    expected = expected_features(folders[name], images)
    assert features.shape == expected.shape
    # 8-bit rounding in PIL moves them a little; images differ far more.
    error = (features - expected).norm(dim=1)
    assert error.max() < 0.05 * torch.pdist(expected).min()


@pytest.mark.parametrize("name", ["clip", "vit-classifier"])
def test_features_depend_on_the_image_alone(folders: dict[str, Path], name: str) -> None:
    images = pictures(70)
    model = load_features(str(folders[name]))
    features = model.features(images)
    torch.testing.assert_close(features, load_features(str(folders[name])).features(images))
    torch.testing.assert_close(features[33:40], model.features(images[33:40]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features[:9], model.features((images[:9] / 255).double().numpy()), atol=1e-5, rtol=1e-5)
    grey = images[:5, :1]
    torch.testing.assert_close(model.features(grey), model.features(grey.repeat(1, 3, 1, 1)))


def test_folders_that_are_no_image_model_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no image model: it takes input_ids"):
        load_features(str(folders["bert"]))
    with pytest.raises(ValueError, match="no image model at"):
        load_features(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"no config\.json .* 0 TorchScript files"):
        load_features(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text((folders["clip"] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_features(str(tmp_path))
    write_settings(tmp_path)
    with pytest.raises(ValueError, match="transformers cannot open"):
        load_features(str(tmp_path))  # no weights
    config.write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match="transformers cannot open"):
        load_features(str(tmp_path))


def test_missing_transformers_names_the_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'ret-fl\[text\]'"):
        load_features(str(folders["clip"]))


def test_weights_that_lack_a_part_are_refused_rather_than_drawn(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["dinov2"] / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["dinov2"] / "config.json").read_text())
    write_settings(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of the network, such as layernorm\.weight"):
        load_features(str(tmp_path))


def test_inputs_of_the_wrong_size_name_the_file_to_change(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_settings(tmp_path, crop_size=24)
    with pytest.raises(ValueError, match=r"refuses inputs of shape \(2, 3, 24, 24\).*preprocessor_config\.json"):
        load_features(str(tmp_path)).features(pictures(2))
    write_settings(tmp_path, do_resize=False)
    with pytest.raises(ValueError, match="images are 20x20 before the crop to 32x32"):
        load_features(str(tmp_path)).features(pictures(2, height=20, width=20))


# TorchScript


class Moments(nn.Module):
    """Mean and deviation of every channel, and the input's size: easily computed by hand."""

    def forward(self, images: Tensor) -> Tensor:
        size = torch.tensor([float(images.shape[2]), float(images.shape[3])]).expand(len(images), 2)
        return torch.cat([images.mean((2, 3)), images.std((2, 3)), size], 1)


class InATuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moments = Moments()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.moments(images), images


class Maps(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


class Broken(nn.Module):
    """NaN for dark images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).sqrt()


class FakeInception(nn.Module):
    """Called as the real file is; fed the real file's input, its features are pixel values of 4x4 patches."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        patches = nn.functional.adaptive_avg_pool2d(img.to(torch.float32), [4, 4]).flatten(1)
        return patches if return_features else patches.softmax(1)


def save_script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.script(module).save(path)
    return path


def test_a_torchscript_file_gets_the_inputs_its_authors_recommend(tmp_path: Path) -> None:
    path = save_script(Moments(), tmp_path / "sscd_disc_mixup.torchscript.pt")
    images = pictures(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_features(str(path))
        features = model.features(images)
    assert model.name == "sscd_disc_mixup"
    resized = [
        np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((288, 345), Image.Resampling.BILINEAR))
        for i in images
    ]
    inputs = (np.stack(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(features[:, :3], inputs.mean((1, 2)), atol=0.01)
    np.testing.assert_allclose(features[:, 3:6], inputs.std((1, 2)), atol=0.01)
    assert features[:, 6:].tolist() == [[345, 288]] * 3
    assert torch.equal(load_features(str(tmp_path)).features(images), features)


def test_settings_beside_a_torchscript_file_override_the_defaults(tmp_path: Path) -> None:
    path = save_script(InATuple(), tmp_path / "model.pt")
    write_settings(tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    white = torch.ones(2, 1, 50, 50)
    expected = [1, 1, 1, 0, 0, 0, 32, 32]
    torch.testing.assert_close(load_features(str(path)).features(white), torch.tensor([expected] * 2).float())


def test_torchscript_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    images = pictures(40)
    with pytest.raises(ValueError, match=r"maps must give float \[32, F\].* got torch.float32 \(32, 3, 345, 288\)"):
        load_features(str(save_script(Maps(), tmp_path / "maps.pt"))).features(images)
    with pytest.raises(ValueError, match="broken gives NaN or infinity for 32 of 32 images"):
        load_features(str(save_script(Broken(), tmp_path / "broken.pt"))).features(0 * images)
    with pytest.raises(ValueError, match="2 TorchScript files"):
        load_features(str(tmp_path))
    conv = save_script(nn.Conv2d(1, 4, 3), tmp_path / "conv.pt")
    with pytest.raises(ValueError, match=r"conv refuses inputs of shape \(32, 3, 345, 288\): .*1 channels"):
        load_features(str(conv)).features(images)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is not a TorchScript file"):
        load_features(str(tmp_path / "weights.pt"))


def test_images_that_are_none_are_refused(tmp_path: Path) -> None:
    model = load_features(str(save_script(Moments(), tmp_path / "moments.pt")))
    with pytest.raises(ValueError, match="H and W >= 8"):
        model.features(pictures(2, height=7))
    with pytest.raises(ValueError, match="needs grey or RGB images, got 4 channels"):
        model.features(pictures(2, channels=4))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        model.features(pictures(2).float())
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2"):
        model.features(torch.stack([torch.full((3, 9, 9), torch.nan), torch.zeros(3, 9, 9)]))
    with pytest.raises(ValueError, match="non-empty"):
        model.features(torch.zeros(0, 3, 9, 9))


# Inception


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without Inception."""
    for variable in ("RET_FL_INCEPTION", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def test_inception_is_fed_8_bit_images_and_asked_for_features(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_script(FakeInception(), nowhere / "inception-2015-12-05.pt")
    monkeypatch.setenv("RET_FL_INCEPTION", str(path))
    images = pictures(40, channels=1, height=16, width=16)
    model = load_features("inception")
    features = model.features(images)
    assert model.name == "Inception-v3"
    expected = nn.functional.adaptive_avg_pool2d(images.float().expand(-1, 3, -1, -1), 4).flatten(1)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(model.features((images - 0.3).clamp(min=0) / 255), expected)
    # By its path as well, never as a TorchScript file in general.
    monkeypatch.delenv("RET_FL_INCEPTION")
    torch.testing.assert_close(load_features(str(path)).features(images), expected)


@pytest.mark.parametrize(
    "place",
    [
        "torch/hub/checkpoints/inception-2015-12-05.pt",
        ".cache/dnnlib/downloads/0123456789abcdef_https___example.org_inception-2015-12-05.pt",
    ],
)
def test_inception_is_found_where_others_keep_it(nowhere: Path, place: str) -> None:
    path = nowhere / place
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_inception() == path


def test_missing_inception_says_where_it_may_lie(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"(?s)inception-2015-12-05\.pt.*Nothing is downloaded.*never comparable") as e:
        load_features("inception")
    for place in (Path("torch/hub/checkpoints"), Path(".cache/dnnlib/downloads")):
        assert str(nowhere / place) in str(e.value)
    monkeypatch.setenv("RET_FL_INCEPTION", os.devnull + "/x")
    with pytest.raises(ValueError, match="RET_FL_INCEPTION points at"):
        load_features("inception")


# Similarity


def gauss(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_cosines(a: Tensor, b: Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return (x @ y.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))


def test_similarity_equals_a_brute_force() -> None:
    generated, train, held_out = gauss(0, 60, 5), gauss(1, 80, 5), gauss(2, 30, 5)
    scores = similarity(generated, train, held_out, name="toy")
    best = brute_cosines(generated, train).max(1)
    others = brute_cosines(train, train) - 3 * np.eye(80)
    assert scores.features == "toy"
    assert scores.mean == pytest.approx(best.mean(), abs=1e-6)
    assert scores.percentile_50 == pytest.approx(np.percentile(best, 50), abs=1e-6)
    assert scores.percentile_95 == pytest.approx(np.percentile(best, 95), abs=1e-6)
    assert scores.above_half == (best > 0.5).mean()
    assert scores.floor_percentile_95 == pytest.approx(
        np.percentile(brute_cosines(held_out, train).max(1), 95), abs=1e-6
    )
    assert scores.background_percentile_95 == pytest.approx(np.percentile(others.max(1), 95), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(2, 90), st.sampled_from([1, 3, 64, 1000, 5000]), st.data())
def test_similarity_depends_on_neither_tiles_nor_order_nor_length(
    g: int, n: int, width: int, data: st.DataObject
) -> None:
    generated, train = gauss(g, g, width), gauss(n, n, width)
    train[n // 2] = train[0]  # a copy, often in another tile
    # 1 MB holds tiles of 43 rows of 1000, of 8 rows of 5000.
    whole, tiled = similarity(generated, train, name="toy"), similarity(generated, train, name="toy", memory_mb=1)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    lengths = 10.0 ** torch.linspace(-3, 3, n)[:, None]
    moved = similarity(generated * 7, (train * lengths)[order], name="toy")
    for other in (tiled, moved):
        for field, value in whole.model_dump(exclude={"features", "above_half"}).items():
            assert getattr(other, field) == pytest.approx(value, abs=2e-6), field


def test_a_copy_has_similarity_one_and_its_opposite_minus_one() -> None:
    train = gauss(0, 50, 300)
    copies = similarity(train[10:20], train, name="toy")
    assert copies.mean == pytest.approx(1, abs=1e-6)
    assert copies.percentile_50 <= 1
    assert copies.above_half == 1
    assert copies.background_percentile_95 is not None
    assert copies.background_percentile_95 < 0.5
    assert similarity(-train[:1], train[:1], name="toy").mean == pytest.approx(-1, abs=1e-6)


def test_copies_in_the_training_set_do_not_move_its_background() -> None:
    train = gauss(0, 40, 6)
    copied = torch.cat([train, train[:3].repeat(50, 1) * (1 + 1e-6 * gauss(1, 150, 6))])
    scores = [similarity(train[:1], points, name="toy").background_percentile_95 for points in (train, copied)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    assert similarity(train[:1], train[:1].repeat(5, 1), name="toy").background_percentile_95 is None


def test_similarity_refuses_features_without_a_cosine() -> None:
    train = gauss(0, 9, 4)
    with pytest.raises(ValueError, match="toy features of generated images hold NaN or infinity in 1 of 9"):
        similarity(train.clone().index_fill_(0, torch.tensor([2]), torch.nan), train, name="toy")
    with pytest.raises(ValueError, match="toy features of training images are all zero in 9 of 9"):
        similarity(train, 0 * train, name="toy")
    with pytest.raises(ValueError, match="toy features of held-out images have 3 values each"):
        similarity(train, train, train[:, :3], name="toy")
    with pytest.raises(ValueError, match="memory_mb"):
        similarity(train, train, name="toy", memory_mb=0)


# Fidelity


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> FeatureModel:
    return train_classifier(digits[0][:900], digits[1][:900], 10, epochs=8)


def test_fidelity_equals_its_parts(classifier: Any, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0]
    train, held_out = images[:900], images[900:1300]
    generated = (images[1300:1500] + 0.1 * torch.rand(200, 1, 8, 8)).clamp(0, 1)
    with pytest.warns(UserWarning, match="200 generated samples") as caught:
        scores = fidelity(classifier, generated, held_out, train)
    assert len(caught) == 1
    real, made = classifier.features(held_out), classifier.features(generated)
    with pytest.warns(UserWarning):
        assert scores.frechet == frechet_distance(real, made)
    assert scores.kid == kernel_distance(real, made)
    assert (scores.precision, scores.recall) == precision_recall(real, made, 3)
    assert scores.confident == confident_share(classifier.probabilities(generated))
    assert (scores.features, scores.against, scores.images) == ("classifier of the data", "held-out", 400)
    # Training images in the samples' place are closer than noisy ones.
    assert scores.real_frechet is not None
    assert scores.real_frechet < scores.frechet
    assert scores.real_precision is not None
    assert scores.real_recall is not None
    assert min(scores.real_precision, scores.real_recall) > 0.85


def test_the_stand_ins_are_as_many_distinct_training_images(classifier: Any, digits: tuple[Tensor, Tensor]) -> None:
    held_out, train = digits[0][900:1300], digits[0][:120]
    copied = torch.cat([train, train[:1].repeat(300, 1, 1, 1)])
    with pytest.warns(UserWarning) as caught:
        scores = fidelity(classifier, digits[0][1300:1500], held_out, copied)
    assert any("only 120 distinct training images stand in for 200" in str(w.message) for w in caught)
    real = classifier.features(held_out)
    shuffled = classifier.features(train)
    with pytest.warns(UserWarning):
        expected = frechet_distance(real, shuffled)
    assert scores.real_frechet == pytest.approx(expected, rel=1e-6)
    assert (scores.real_precision, scores.real_recall) == precision_recall(real, shuffled, 3)


@pytest.mark.parametrize("held_out", [0, 49])
def test_few_held_out_images_leave_the_training_images(
    classifier: Any, digits: tuple[Tensor, Tensor], held_out: int
) -> None:
    images = digits[0]
    train = torch.cat([images[:100], images[:50]])
    rest = images[900 : 900 + held_out] if held_out else None
    with pytest.warns(UserWarning):
        scores = fidelity(classifier, images[1300:1400], rest, train)
    assert (scores.against, scores.images) == ("train", 100)
    assert scores.real_frechet is None
    assert scores.real_precision is None
    assert scores.real_recall is None


def test_fidelity_in_the_features_of_a_given_model(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model = load_features(str(save_script(FakeInception(), tmp_path / "inception-2015-12-05.pt")))
    images = digits[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # enough samples
        scores = fidelity(model, images[:1000], images[1000:1700], images[:1000])
    assert scores.confident is None
    assert scores.real_frechet == pytest.approx(scores.frechet, rel=1e-6)
    real, made = model.features(images[1000:1700]), model.features(images[:1000])
    assert scores.frechet == frechet_distance(real, made)
    assert (scores.precision, scores.recall) == precision_recall(real, made, 3)


def test_every_image_is_seen_once_and_there_are_as_many_stand_ins_as_samples(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0]

    class Recorder:
        name = "pixels"

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def features(self, images: Tensor) -> Tensor:
            self.seen.append(images)
            return images.flatten(1)

    model = Recorder()
    with pytest.warns(UserWarning, match="70 generated samples"):
        fidelity(model, images[:70], images[100:180], images[200:700].numpy())
    held_out, generated, stand_ins = model.seen
    assert torch.equal(held_out, images[100:180])
    assert torch.equal(generated, images[:70])
    assert len(stand_ins.unique(dim=0)) == 70
    # No first rows: data are often sorted by class.
    assert not torch.equal(stand_ins, images[200:270])
    pool = {image.numpy().tobytes() for image in images[200:700]}
    assert all(image.numpy().tobytes() in pool for image in stand_ins)


def test_fidelity_refuses_tiny_sets_and_broken_models(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images = digits[0]
    model = load_features(str(save_script(FakeInception(), tmp_path / "inception-2015-12-05.pt")))
    with pytest.raises(ValueError, match=r"at least 4 \(distinct\) images in every set, got 3"):
        fidelity(model, images[:3], images[:100], images[:100])
    with pytest.raises(ValueError, match=r"at least 4 \(distinct\) images in every set, got 1"):
        fidelity(model, images[:100], images[:100], images[:1].repeat(9, 1, 1, 1))

    class Nan:
        name = "my features"

        def features(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 3), torch.nan)

    with pytest.raises(ValueError, match="my features gives NaN or infinity for 100 of 100 images"):
        fidelity(Nan(), images[:100], images[:100], images[:100])
