"""Image models give the features that they give without us."""

import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from image_models import FakeInception, pictures, save_script, write_settings
from PIL import Image
from torch import Tensor, nn

from ret_fl.audit.features import load_features
from ret_fl.audit.weights import INCEPTION, NAMED, SSCD, Weights

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


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without the networks of papers."""
    for variable in ("RET_FL_INCEPTION", "RET_FL_SSCD", "RET_FL_CLIP", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
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
    patches = expected / 50  # the softmax of the score is without the output's bias
    torch.testing.assert_close(model.class_probabilities(images), patches.softmax(1))
    # By its path as well, never as a TorchScript file in general.
    monkeypatch.delenv("RET_FL_INCEPTION")
    torch.testing.assert_close(load_features(str(path)).features(images), expected)


@pytest.mark.parametrize(
    ("weights", "place"),
    [
        (INCEPTION, "torch/hub/checkpoints/inception-2015-12-05.pt"),
        (INCEPTION, ".cache/dnnlib/downloads/0123456789abcdef_https___example.org_inception-2015-12-05.pt"),
        (SSCD, "torch/hub/checkpoints/sscd_disc_large.torchscript.pt"),
    ],
)
def test_weights_are_found_where_others_keep_them(nowhere: Path, weights: Weights, place: str) -> None:
    path = nowhere / place
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="needs the file"):  # a folder is none
        weights.find()
    path.rmdir()
    path.touch()
    assert weights.find() == path


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("inception", "inception-2015-12-05.pt"),
        ("sscd", "github.com/facebookresearch/sscd-copy-detection"),
        ("clip", "hf download openai/clip-vit-base-patch16"),
    ],
)
def test_missing_weights_say_where_they_come_from_and_may_lie(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, spec: str, told: str
) -> None:
    with pytest.raises(ValueError, match=r"(?s)Nothing is downloaded.*never comparable") as e:
        load_features(spec)
    assert told in str(e.value)
    for place in (Path("torch/hub/checkpoints"), Path(".cache/dnnlib/downloads")):
        assert str(nowhere / place) in str(e.value)
    monkeypatch.setenv(f"RET_FL_{spec.upper()}", os.devnull + "/x")
    with pytest.raises(ValueError, match=f"RET_FL_{spec.upper()} points at"):
        load_features(spec)


@pytest.mark.parametrize(
    ("path", "spec"),
    [("sscd_disc_large.torchscript.pt", "sscd"), ("models/clip-vit-base-patch16", "clip"), ("a/dinov2", None)],
)
def test_a_path_that_leads_nowhere_is_answered_with_the_name_that_was_meant(path: str, spec: str | None) -> None:
    with pytest.raises(ValueError, match="no image model at") as e:
        load_features(path)
    assert all(f"'{name}'" in str(e.value) for name in NAMED)
    hints = [f"Or name '{name}': that is {weights.what}" for name, weights in NAMED.items()]
    assert [hint in str(e.value) for hint in hints] == [name == spec for name in NAMED]


def test_sscd_is_prepared_as_the_papers_do_by_the_settings_the_docs_give(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nowhere / "sscd").mkdir()
    path = save_script(Moments(), nowhere / "sscd" / "sscd_disc_large.torchscript.pt")
    images = pictures(3)
    monkeypatch.setenv("RET_FL_SSCD", str(path))
    usual = load_features("sscd")
    assert usual.name == "sscd_disc_large" and usual.features(images)[:, 6:].tolist() == [[345, 288]] * 3
    page = (ROOT / "docs" / "text-to-image.md").read_text()
    (settings,) = re.findall(r'^ *(\{"size": .*\})$', page, re.MULTILINE)
    (path.parent / "preprocessor_config.json").write_text(settings)
    model = load_features("sscd")
    features = model.features(images)
    write_settings(path.parent)
    assert load_features("sscd").name not in (usual.name, model.name)  # never set beside the others' numbers
    assert re.fullmatch(r"sscd_disc_large \(inputs [0-9a-f]{6}\)", model.name)
    resized = [
        Image.fromarray(i.permute(1, 2, 0).numpy())
        .resize((256, 307), Image.Resampling.BILINEAR)
        .crop((16, 41, 240, 265))
        for i in images
    ]
    inputs = np.stack([np.asarray(image) for image in resized]) / 127.5 - 1
    np.testing.assert_allclose(features[:, :3], inputs.mean((1, 2)), atol=0.01)
    np.testing.assert_allclose(features[:, 3:6], inputs.std((1, 2)), atol=0.01)
    assert features[:, 6:].tolist() == [[224, 224]] * 3


def test_clip_is_found_in_the_hubs_cache_and_where_it_is_put(
    folders: dict[str, Path], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(3)
    expected = load_features(str(folders["clip"])).features(images)
    repository = nowhere / "hub" / "models--openai--clip-vit-base-patch16"
    shutil.copytree(folders["clip"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    model = load_features("clip")
    assert model.name == "clip-vit-base-patch16"
    assert torch.equal(model.features(images), expected)
    place = nowhere / "torch/hub/checkpoints/clip-vit-base-patch16"
    place.parent.mkdir(parents=True)
    (repository / "snapshots" / ("0" * 40)).rename(place)
    assert torch.equal(load_features("clip").features(images), expected)
    monkeypatch.setenv("RET_FL_CLIP", str(folders["clip"]))
    shutil.rmtree(place)
    assert torch.equal(load_features("clip").features(images), expected)
    assert load_features("clip").name == "clip"  # its folder's own
