"""Images as features of a network: how similar samples are to training images, and how good they are.

`load_features` opens an image model that lies on this machine; nothing is downloaded. The `FeatureClassifier` of
ret_fl.audit.fidelity, trained on the data at hand, is a `FeatureModel` too. Numbers in the features of one model are
never comparable with those in another's.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ret_fl.audit import schema
from ret_fl.audit.distances import Images, pixel_rows, require_same_size
from ret_fl.audit.fidelity import (
    FeatureClassifier,
    confident_share,
    frechet_distance,
    kernel_distance,
    precision_recall,
    unit_images,
)
from ret_fl.audit.realset import deduplicate

BATCH = 32
SETTINGS_FILE = "preprocessor_config.json"
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_VARIABLE = "RET_FL_INCEPTION"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# PIL's numbers, as preprocessor_config.json has them.
RESAMPLING = {2: "bilinear", 3: "bicubic"}
UNKNOWN_STEPS = ("crop_pct", "rescale_offset", "do_pad", "do_flip_channel_order", "size_divisor")
# Features of one image differ by rounding between batches, and float32 cosines by 1e-6: above this they are one image.
# Distinct digits reach .9991 in the features of their classifier.
TWIN = 1 - 1e-5
MAX_TILE = (2048, 8192)
NEIGHBOUR = 3
ENOUGH_HELD_OUT = 50


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
class Preprocessing:
    """From images to a network's input: resize, centre crop, normalise, as in a preprocessor_config.json.

    The defaults are the recipe that the authors of SSCD (arXiv 2202.10261) recommend for their descriptors.
    """

    size: int | tuple[int, int] | None = 288  # shorter side, or (height, width); None: not resized
    crop: tuple[int, int] | None = None  # (height, width)
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    scale: float = 1.0  # what 1.0 becomes before mean and std
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [N, 3, h, w] of float32 [N, 3, H, W] in [0, 1]; differs from PIL's by its rounding to 8 bits only.

        Raises:
            ValueError: images smaller than the crop.
        """
        if self.size is not None:
            height, width = _target_size(self.size, images.shape[2], images.shape[3])
            # As PIL: width first, and what bicubic filters overshoot is cut after each axis.
            for size in ((images.shape[2], width), (height, width)):
                images = F.interpolate(images, size, mode=self.resample, antialias=True).clamp(0, 1)
        if self.crop is not None:
            images = _centre_crop(images, *self.crop)
        mean, std = images.new_tensor(self.mean)[:, None, None], images.new_tensor(self.std)[:, None, None]
        return (self.scale * images - mean) / std

    @classmethod
    def from_file(cls, path: Path) -> Preprocessing:
        """Read a preprocessor_config.json as transformers writes it.

        An integer size is the shorter side where a crop follows, else both sides.

        Raises:
            ValueError: no JSON object, a value that makes no sense, or a step that is not known here.
        """
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold one JSON object")
        if unknown := [key for key in UNKNOWN_STEPS if values.get(key)]:
            raise ValueError(f"{path} asks for {', '.join(unknown)}, which is not supported: give size and crop_size")
        try:
            return cls(**_settings(values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing`."""
    crop = _pair(values["crop_size"], "crop_size") if _does(values, "do_center_crop", "crop_size") else None
    size = None
    if _does(values, "do_resize", "size"):
        size = _size(values["size"], shorter=crop is not None)
    resample = values.get("resample", 2)
    if size is not None and resample not in RESAMPLING:
        raise ValueError(f"resample must be 2 (bilinear) or 3 (bicubic), got {resample!r}")
    normalise = _does(values, "do_normalize", "image_mean")
    return {
        "size": size,
        "crop": crop,
        "resample": RESAMPLING.get(resample, "bilinear"),
        "scale": 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0,
        "mean": _channels(values, "image_mean") if normalise else (0.0,) * 3,
        "std": _channels(values, "image_std") if normalise else (1.0,) * 3,
    }


def _does(values: dict[str, Any], flag: str, setting: str) -> bool:
    does = values.get(flag, values.get(setting) is not None)
    if does and values.get(setting) is None:
        raise ValueError(f"{flag} is on, but {setting} is missing: give it")
    return bool(does)


def _size(value: Any, shorter: bool) -> int | tuple[int, int]:
    """Size as in `Preprocessing`; `shorter`: an integer means the shorter side."""
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        value, shorter = value["shortest_edge"], True
    pair = _pair(value, "size")
    return pair[0] if shorter and isinstance(value, int) else pair


def _pair(value: Any, name: str) -> tuple[int, int]:
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        value = (value["height"], value["width"])
    elif isinstance(value, int):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise ValueError(f"{name} must be a positive integer, height and width, or a shortest_edge, got {value!r}")
    return value[0], value[1]


def _channels(values: dict[str, Any], name: str) -> tuple[float, ...]:
    value = values.get(name)
    numbers = (value,) * 3 if isinstance(value, int | float) else tuple(value or ())
    if len(numbers) != 3 or (name == "image_std" and min(numbers) <= 0):
        raise ValueError(f"{name} must be 3 numbers (above 0 for image_std), got {value!r}")
    return numbers


def _target_size(size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    if isinstance(size, tuple):
        return size
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def _centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    if min(top, left) < 0:
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]} before the crop to {height}x{width}: "
            f"resize them, or turn do_resize on in {SETTINGS_FILE}"
        )
    return images[:, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class LoadedModel:
    """A `FeatureModel` made of two steps on `device`.

    `prepare` takes float32 [n, 3, H, W] in [0, 1]; `embed` takes its result and gives [n, F], or a tuple that starts
    with it.
    """

    name: str
    prepare: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Any]
    device: torch.device

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """float32 [N, F], on the CPU, of images [N, C, H, W], float in [0, 1] or uint8; grey ones become RGB.

        Raises:
            ValueError: images that are not grey or RGB, too small or not in [0, 1], inputs that the network refuses,
                or features that are not finite or not [N, F].
        """
        return torch.cat([self._batch(part) for part in torch.as_tensor(images).split(BATCH)])

    def _batch(self, images: Tensor) -> Tensor:
        unit = unit_images(images).to(self.device)
        if unit.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} needs grey or RGB images, got {unit.shape[1]} channels: convert them first")
        inputs = self.prepare(unit.expand(-1, 3, -1, -1))
        try:
            features = self.embed(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise ValueError(
                f"{self.name} refuses inputs of shape {tuple(inputs.shape)}: {''.join(reason)}. "
                f"Name the size it wants in {SETTINGS_FILE}"
            ) from error
        return _checked(features, self.name, len(images))


def _checked(features: Any, name: str, count: int) -> Tensor:
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
            - 'inception': the Inception-v3 of TensorFlow's FID as NVIDIA's StyleGAN2-ADA ships it; see
              `find_inception`. A file of that name is recognised in any place.
        device: where the network runs.

    Raises:
        ValueError: nothing usable there, or transformers is missing; the message says what to change.
    """
    place = torch.device(device)
    if spec == "inception":
        return _load_inception(find_inception(), place)
    path = Path(spec).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _load_transformers(path, place)
    if path.is_dir():
        path = _only_script(path)
    if not path.is_file():
        raise ValueError(f"no image model at {spec}: name a transformers folder, a TorchScript file, or 'inception'")
    if path.name.endswith(INCEPTION_FILE):
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
    return LoadedModel(name, prepare, _open_script(path, device), device)


def _open_script(path: Path, device: torch.device) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch.jit as a whole
            return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a TorchScript file (weights alone do not suffice): {str(error).splitlines()[0]}"
        ) from error


def find_inception() -> Path:
    """The file inception-2015-12-05.pt: where RET_FL_INCEPTION points, in torch.hub's checkpoints, in StyleGAN's cache.

    It is the TorchScript form of the network behind published FIDs (2048 features). It is not downloaded.

    Raises:
        ValueError: it is in none of the places, which the message names.
    """
    named = os.environ.get(INCEPTION_VARIABLE)
    if named:
        if Path(named).is_file():
            return Path(named)
        raise ValueError(f"{INCEPTION_VARIABLE} points at {named}, which is no file: correct or unset it")
    folders = [Path(torch.hub.get_dir()) / "checkpoints", Path.home() / ".cache" / "dnnlib" / "downloads"]
    for folder in folders:
        if found := sorted(folder.glob(f"*{INCEPTION_FILE}")):
            return found[0]
    raise ValueError(
        f"Inception features need the file {INCEPTION_FILE} (the TorchScript one of NVIDIA's StyleGAN2-ADA, 2048 "
        f"features). Nothing is downloaded: put it into {folders[0]} or {folders[1]}, or let {INCEPTION_VARIABLE} "
        "name it. The classifier's features need no file, but their numbers are never comparable with Inception's"
    )


def _load_inception(path: Path, device: torch.device) -> LoadedModel:
    network = _open_script(path, device)

    def embed(images: Tensor) -> Any:
        return network(images, return_features=True)

    return LoadedModel("Inception-v3", _eight_bit, embed, device)


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
        network, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"transformers cannot open {folder}: {error}") from error
    missing = {str(key) for key in report["missing_keys"]}
    poolers = {key for key in missing if key.startswith("pooler.")}
    if missing - poolers:
        raise ValueError(f"{folder} lacks weights of the network, such as {min(missing - poolers)}: copy all its files")
    if not hasattr(network, "get_image_features") and network.main_input_name != "pixel_values":
        raise ValueError(f"{folder} is no image model: it takes {network.main_input_name}, not pixel_values")
    embed = _Embedding(network.float().eval().to(device), trained_pooler=not poolers)
    return LoadedModel(folder.resolve().name, prepare, embed, device)


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


def similarity(
    generated_features: Images,
    train_features: Images,
    held_out_features: Images | None = None,
    *,
    name: str,
    memory_mb: int = 1024,
) -> schema.Similarity:
    """Cosine similarity of generated images to the most similar training image.

    percentile_95 of SSCD features is the memorization score of the Stable Diffusion papers (Somepalli et al. 2023,
    arXiv 2305.20086; IET-AGC), above_half their replication rate. The floor is percentile_95 of held-out images, the
    background that of training images against the *other* ones. There, a cosine above 1 - 1e-5 counts as the same
    image and every image counts once: copies in the training set would otherwise make the background 1. None where
    all training images are one.

    Args:
        generated_features, train_features, held_out_features: float [G, F], [N, F] and [H, F] of one `FeatureModel`;
            any length, they are normalised here.
        name: of that model.
        memory_mb: bound on the tensors held beyond inputs and outputs; the result does not depend on it.

    Raises:
        ValueError: different F, values that are not finite, rows that are all zero, or memory_mb < 1.
    """
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be >= 1, got {memory_mb}")
    train = _feature_rows(train_features, f"{name} features of training images")
    generated = _feature_rows(generated_features, f"{name} features of generated images", like=train)
    best = _most_similar(generated, train, memory_mb)
    floor = None
    if held_out_features is not None:
        held_out = _feature_rows(held_out_features, f"{name} features of held-out images", like=train)
        floor = _percentile(_most_similar(held_out, train, memory_mb), 95)
    background = _background(train, memory_mb)
    return schema.Similarity(
        features=name,
        mean=float(best.mean()),
        percentile_50=_percentile(best, 50),
        percentile_95=_percentile(best, 95),
        above_half=float((best > 0.5).double().mean()),
        floor_percentile_95=floor,
        background_percentile_95=_percentile(background, 95) if len(background) else None,
    )


def _feature_rows(features: Images, name: str, like: Tensor | None = None) -> Tensor:
    rows = pixel_rows(features, name).float()
    if like is not None:
        require_same_size(rows, like, name, "those of training images")
        rows = rows.to(like.device)
    if zero := int((rows == 0).all(1).sum()):
        raise ValueError(
            f"{name} are all zero in {zero} of {len(rows)} rows, so they have no cosine: use other features"
        )
    return rows


def _percentile(values: Tensor, percent: float) -> float:
    return float(values.quantile(percent / 100))


def _most_similar(queries: Tensor, points: Tensor, memory_mb: int) -> Tensor:
    """float64 [G]: the largest cosine of every query ([G, F]) to the points ([N, F])."""
    best = queries.new_full((len(queries),), -1.0)
    for row, _, cosine in _cosine_tiles(queries, points, memory_mb):
        rows = slice(row, row + len(cosine))
        best[rows] = torch.maximum(best[rows], cosine.amax(1))
    return best.clamp(max=1).double().cpu()


def _background(points: Tensor, memory_mb: int) -> Tensor:
    """float64 [M]: the largest cosine of every distinct point ([N, F]) to a distinct other one."""
    best = points.new_full((len(points),), -torch.inf)
    repeated = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for row, col, cosine in _cosine_tiles(points, points, memory_mb):
        rows = slice(row, row + len(cosine))
        twins = cosine > TWIN
        # Below the diagonal are the earlier images; of twins only the first counts.
        repeated[rows] |= twins.tril(row - col - 1).any(1)
        best[rows] = torch.maximum(best[rows], cosine.masked_fill_(twins, -torch.inf).amax(1))
    return best[~repeated & best.isfinite()].double().cpu()


def _cosine_tiles(queries: Tensor, points: Tensor, memory_mb: int) -> Iterator[tuple[int, int, Tensor]]:
    """Tiles of the cosines of rows, float32, each with its first row and column."""
    elements, width = memory_mb * 2**20 // 4, points.shape[1]
    tile_p = min(len(points), MAX_TILE[1], max(1, elements // (6 * width)))
    tile_q = min(len(queries), MAX_TILE[0], max(1, elements // (6 * max(width, tile_p))))
    for col in range(0, len(points), tile_p):
        unit_points = _unit(points[col : col + tile_p])
        for row in range(0, len(queries), tile_q):
            yield row, col, _unit(queries[row : row + tile_q]) @ unit_points.T


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).float()


def fidelity(
    model: FeatureModel, generated: Images, held_out: Images | None, train: Images, *, seed: int = 0
) -> schema.Fidelity:
    """Quality and diversity of generated images in the features of `model`.

    They are compared with the held-out images, or with the distinct training images where fewer than 50 are held out.
    Frechet distances fall with the number of images on either side: compare only audits of equal numbers.
    real_*: a random choice of as many distinct training images as there are generated ones (all, if fewer) in their
    place; None where the training images are what is compared with. `confident` is given for a `FeatureClassifier`.

    Args:
        model: a `FeatureClassifier`, a `load_features` result, or any `FeatureModel`.
        generated, train: [G, C, H, W] and [N, C, H, W], float in [0, 1] or uint8.
        held_out: real images never trained on, or None.
        seed: of the random choice.

    Returns:
        The numbers; `images` counts the real images compared with.

    Raises:
        ValueError: fewer than 4 images in a set (the precision's radius is that of the 3rd neighbour), images that
            the model refuses, or features that are not finite.

    Warns:
        UserWarning: fewer than 1000 generated images, or fewer distinct training images than generated ones.
    """
    generated, train = torch.as_tensor(generated), torch.as_tensor(train)
    distinct = train[deduplicate(train).to(train.device)]
    real, against = distinct, "train"
    if held_out is not None and len(held_out) >= ENOUGH_HELD_OUT:
        real, against = torch.as_tensor(held_out), "held-out"
    fewest = min(len(generated), len(real), len(distinct))
    if fewest <= NEIGHBOUR:
        raise ValueError(f"fidelity needs at least {NEIGHBOUR + 1} (distinct) images in every set, got {fewest}")

    real_features, features = _features(model, real), _features(model, generated)
    precision, recall = precision_recall(real_features, features, NEIGHBOUR)
    scores = _stand_in_scores(model, real_features, distinct, len(generated), seed) if against == "held-out" else None
    return schema.Fidelity(
        features=model.name,
        against=against,
        images=len(real),
        frechet=frechet_distance(real_features, features),
        kid=kernel_distance(real_features, features),
        precision=precision,
        recall=recall,
        confident=confident_share(model.probabilities(generated)) if isinstance(model, FeatureClassifier) else None,
        real_frechet=scores[0] if scores else None,
        real_precision=scores[1] if scores else None,
        real_recall=scores[2] if scores else None,
    )


def _stand_in_scores(
    model: FeatureModel, real_features: Tensor, distinct: Tensor, count: int, seed: int
) -> tuple[float, float, float]:
    """Frechet distance, precision and recall of `count` distinct training images in the generated ones' place."""
    if len(distinct) < count:
        warnings.warn(
            f"{model.name}: only {len(distinct)} distinct training images stand in for {count} generated ones, so "
            "their Frechet distance is biased upwards",
            stacklevel=3,
        )
    chosen = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:count]
    features = _features(model, distinct[chosen.to(distinct.device)])
    precision, recall = precision_recall(real_features, features, NEIGHBOUR)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # few samples: said once, of the generated
        return frechet_distance(real_features, features), precision, recall


def _features(model: FeatureModel, images: Tensor) -> Tensor:
    return _checked(model.features(images), model.name, len(images))
