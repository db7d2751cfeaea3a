"""Images as features of a network.

`load_features` opens an image model that lies on this machine; nothing is downloaded. The `FeatureClassifier` of
ret_fl.audit.classifier, trained on the data at hand, is a `FeatureModel` too. Numbers in the features of one model are
never comparable with those in another's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ret_fl.audit.classifier import unit_images
from ret_fl.audit.distances import Images
from ret_fl.audit.preprocessing import SETTINGS_FILE, Preprocessing
from ret_fl.audit.weights import CLIP, INCEPTION, NAMED, SSCD, lookalike
from ret_fl.diffusion.encoders import weight_files

BATCH = 32
NAMES = " or ".join(f"'{name}'" for name in NAMED)


class FeatureModel(Protocol):
    """Anything that turns images into features."""

    @property
    def name(self) -> str:
        """How the audit calls these features."""
        ...

    def features(self, images: Images) -> Tensor:
        """float32 [N, F], on the CPU, of images [N, C, H, W], float in [0, 1] or uint8."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A `FeatureModel` made of two steps on `device`.

    `prepare` takes float32 [n, 3, H, W] in [0, 1]; `embed` takes its result and gives [n, F], or a tuple that starts
    with it. `classify` gives class probabilities [n, classes] instead, as the Inception Score wants them; None: the
    network has no such classes. `text` gives features of captions, float32 [n, F] on the CPU, comparable with those of
    images, or raises `ValueError`; None: the network knows no text.
    """

    name: str
    prepare: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Any]
    device: torch.device
    classify: Callable[[Tensor], Any] | None = None
    text: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """float32 [N, F], on the CPU, of images [N, C, H, W], float in [0, 1] or uint8; grey ones become RGB.

        Raises:
            ValueError: images that are not grey or RGB, too small or not in [0, 1], inputs that the network refuses,
                or features that are not finite or not [N, F].
        """
        return torch.cat([self._batch(part, self.embed) for part in torch.as_tensor(images).split(BATCH)])

    @torch.no_grad()
    def class_probabilities(self, images: Images) -> Tensor | None:
        """float32 [N, classes], on the CPU, of images as in `features`; None where `classify` is. Raises as there."""
        if self.classify is None:
            return None
        return torch.cat([self._batch(part, self.classify) for part in torch.as_tensor(images).split(BATCH)])

    def _batch(self, images: Tensor, network: Callable[[Tensor], Any]) -> Tensor:
        unit = unit_images(images).to(self.device)
        if unit.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} needs grey or RGB images, got {unit.shape[1]} channels: convert them first")
        inputs = self.prepare(unit.expand(-1, 3, -1, -1))
        try:
            features = network(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise ValueError(
                f"{self.name} refuses inputs of shape {tuple(inputs.shape)}: {''.join(reason)}. "
                f"Name the size it wants in {SETTINGS_FILE}"
            ) from error
        return checked_features(features, self.name, len(images))


def checked_features(features: Any, name: str, count: int) -> Tensor:
    """Features as float32 [count, F] on the CPU, or ValueError."""
    first = features[0] if isinstance(features, tuple | list) and len(features) else features
    if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != count or not first.is_floating_point():
        got = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"{name} must give float [{count}, F] for {count} images, got {got}: wrap the network")
    if bad := int((~torch.isfinite(first)).any(1).sum()):
        raise ValueError(f"{name} gives NaN or infinity for {bad} of {count} images: use other weights or float32")
    return first.float().cpu()


def load_features(spec: str, *, device: torch.device | str = "cpu") -> FeatureModel:
    """Open an image model.

    Args:
        spec: one of
            - a transformers folder (config.json, weights, preprocessor_config.json), such as CLIP or DINOv2. Features
              are `get_image_features` where the model has it (CLIP's joint space), else its pooler_output, else the
              first token of last_hidden_state (the mean over pixels for convnets). A pooler without weights in the
              folder is not used: transformers fills it with random numbers.
            - a TorchScript file (*.pt, *.torchscript), or a folder with one, such as SSCD's. It is called with float32
              [n, 3, h, w]. A preprocessor_config.json beside it tells the input size and normalisation; without one,
              the shorter side becomes 288 and ImageNet's mean and deviation are used (SSCD's recommendation).
            - 'inception', 'sscd' or 'clip': the networks of published FIDs, memorization scores and CLIP scores, looked
              for as `ret_fl.audit.weights` tells. Inception-v3 as NVIDIA's StyleGAN2-ADA ships it is recognised by
              its file's name in any place, too.
        device: where the network runs.

    Raises:
        ValueError: nothing usable there, or transformers is missing; the message says what to change.
    """
    place = torch.device(device)
    if spec == INCEPTION.spec:
        return _load_inception(INCEPTION.find(), place)
    if spec == CLIP.spec:
        folder = CLIP.find()
        model = _load_transformers(folder, place)
        return replace(model, name=CLIP.file) if folder.parent.name == "snapshots" else model  # of the hub's cache
    path = SSCD.find() if spec == SSCD.spec else Path(spec).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _load_transformers(path, place)
    if path.is_dir():
        path = _only_script(path)
    if not path.is_file():
        meant = lookalike(spec)
        hint = f". Or name '{meant.spec}': that is {meant.what}" if meant else ""
        raise ValueError(f"no image model at {spec}: name a transformers folder, a TorchScript file, or {NAMES}{hint}")
    if path.name.endswith(INCEPTION.file):
        return _load_inception(path, place)
    return _load_script(path, place)


def _only_script(folder: Path) -> Path:
    scripts = sorted([*folder.glob("*.pt"), *folder.glob("*.torchscript")])
    if len(scripts) != 1:
        raise ValueError(
            f"{folder} is no image model: it has no config.json (transformers), and {len(scripts)} TorchScript files, "
            "not one"
        )
    return scripts[0]


def _load_script(path: Path, device: torch.device) -> LoadedModel:
    settings = path.parent / SETTINGS_FILE
    prepare = Preprocessing.from_file(settings) if settings.is_file() else Preprocessing()
    name = path.name.removesuffix(".pt").removesuffix(".torchscript")
    if prepare != Preprocessing():  # numbers are compared by name, and these are others
        name += f" (inputs {prepare.digest})"
    return LoadedModel(name, prepare, _open_script(path, device), device)


def _open_script(path: Path, device: torch.device) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch.jit as a whole
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a TorchScript file (weights alone do not suffice): name one, a transformers folder, or "
            f"{NAMES}"
        ) from error


def _load_inception(path: Path, device: torch.device) -> LoadedModel:
    network = _open_script(path, device)

    def embed(images: Tensor) -> Any:
        return network(images, return_features=True)

    def classify(images: Tensor) -> Any:
        # as the score's authors computed it: no bias before the softmax
        return network(images, no_output_bias=True)

    return LoadedModel("Inception-v3", _eight_bit, embed, device, classify=classify)


def _eight_bit(images: Tensor) -> Tensor:
    """uint8 in 0..255, as the network of the published FIDs was fed; it resizes to 299x299 itself."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8)


def _load_transformers(folder: Path, device: torch.device) -> LoadedModel:
    try:
        from transformers import AutoModel
    except ImportError:
        raise ValueError(f"{folder} needs transformers: pip install 'ret-fl[text]'") from None
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} has no {SETTINGS_FILE}, which tells the input size and normalisation: add it")
    prepare = Preprocessing.from_file(folder / SETTINGS_FILE)
    try:
        weight_files(folder)
        network, report = AutoModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"transformers cannot open {folder}: {error}") from error
    missing = {str(key) for key in report["missing_keys"]}
    poolers = {key for key in missing if key.startswith("pooler.")}
    if missing - poolers:
        raise ValueError(f"{folder} lacks weights of the network, such as {min(missing - poolers)}: copy all its files")
    if not hasattr(network, "get_image_features") and network.main_input_name != "pixel_values":
        raise ValueError(f"{folder} is no image model: it takes {network.main_input_name}, not pixel_values")
    embed = _Embedding(network.float().eval().to(device), trained_pooler=not poolers)
    text = _TextFeatures(folder, network, device) if hasattr(network, "get_text_features") else None
    return LoadedModel(folder.resolve().name, prepare, embed, device, text=text)


@dataclass(frozen=True)
class _TextFeatures:
    """Features of captions by a network such as CLIP; see `LoadedModel.text`."""

    folder: Path
    network: Any
    device: torch.device

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Raises `ValueError` where the folder has no tokenizer."""
        from transformers import AutoTokenizer

        # without these files transformers makes up a tokenizer that knows no words
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise ValueError(f"{self.folder} has no tokenizer: copy all its files")
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        longest = self.network.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(captions), BATCH):
            batch = list(captions[start : start + BATCH])
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            output = self.network.get_text_features(**inputs.to(self.device))
            parts.append((output if isinstance(output, Tensor) else output.pooler_output).float().cpu())
        return torch.cat(parts)


@dataclass(frozen=True)
class _Embedding:
    """The features of a transformers network, as `load_features` tells."""

    network: Any
    trained_pooler: bool

    def __call__(self, inputs: Tensor) -> Tensor:
        if hasattr(self.network, "get_image_features"):
            output = self.network.get_image_features(pixel_values=inputs)
            # A tensor before transformers 5.
            return output if isinstance(output, Tensor) else output.pooler_output
        output = self.network(pixel_values=inputs)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.trained_pooler:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden[:, 0] if hidden.ndim == 3 else hidden.flatten(2).mean(2)
