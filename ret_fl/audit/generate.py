"""Images to audit: drawn from a run or a diffusers pipeline, or read from a folder or a .npy file.

Image i of a seed has noise of its own (`ret_fl.diffusion.sampling.start_noise`), so it does not depend on the batch
size, and drawing can stop and go on: every batch goes to disk, and only what is missing is drawn.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.folder import load_folder
from ret_fl.diffusion.sampling import FOLD_FILE, draw_images, load_pipeline, noise_shape, start_noise
from ret_fl.files import sync, write_atomically

logger = logging.getLogger(__name__)

Kind = Literal["run", "pipeline", "images"]
Channels = Literal["auto", "grey", "rgb"]
Denoiser = tuple[UNet2DModel, DDPMScheduler, int]
"""A U-Net, its noise schedule and fold factor (`ret_fl.diffusion.models.fold_factor`)."""
Draw = Callable[[int, int], Tensor]
"""draw(first, count) -> images first..first+count-1, float32 [count, C, H, W] in [0, 1] on the CPU."""

# Raise when the same settings would draw other images, so that cached ones are not taken for them.
DRAWING_VERSION = 1
# What reading a damaged .npz raises, by where the damage is.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
TEXT_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in ret_fl.data.images


@dataclass(frozen=True)
class Generated:
    """Images to audit and where they come from.

    images: float32 [N, C, H, W] in [0, 1], on the CPU.
    kind: a ret-fl run, a diffusers pipeline, or images that were ready.
    name: the folder's or file's name.
    seed, steps, parameters: of the model; None for ready images.
    """

    images: Tensor
    kind: Kind
    name: str
    seed: int | None
    steps: int | None
    parameters: int | None


def generate(
    model: Path,
    *,
    samples: int = 1000,
    seed: int = 0,
    steps: int = 50,
    prompts: Sequence[str] = (),
    batch_size: int = 64,
    guidance: float = 7.5,
    image_size: int = 0,
    channels: Channels = "auto",
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Images of `model`: a run's folder, a diffusers pipeline folder, a folder of images, or a .npy file.

    Pixel U-Nets (UNet2DModel) are sampled with DDIM (Song et al. 2021), eta 0, and all their classes in turn;
    text-to-image pipelines with their own scheduler. Images kept by a run are not used: they are drawn anew.

    Args:
        samples: how many images; of ready images the first so many, or all if there are fewer.
        seed: image i of a seed starts from the same noise for every model, batch size and device.
        steps: denoising steps.
        prompts: for text-to-image; image i gets prompt i modulo their number.
        batch_size: images drawn at once; it changes them by rounding only.
        guidance: scale of classifier-free guidance, for text-to-image.
        image_size: side to which images are resized and centre-cropped; 0 keeps their size.
        channels: 'grey' or 'rgb' converts the images.
        cache: folder that keeps drawn images (float32), by the model's content, seed, steps, prompts and guidance.
            A later call with the same of these draws only what is missing. None keeps nothing.
        on_progress: told how many images of how many are there.

    Raises:
        FileNotFoundError: nothing at `model`, or it is half of a run or pipeline.
        ValueError: the model is none that can be drawn from, text-to-image without prompts, a number out of range,
            or as in `read_images`.
    """
    settings = {"samples": (samples, 1), "seed": (seed, 0), "steps": (steps, 1), "batch_size": (batch_size, 1)}
    for setting, (value, least) in settings.items():
        if value < least:
            raise ValueError(f"{setting} must be >= {least}, got {value}")
    kind, folder = _locate(model)
    name = model.resolve().name
    if kind == "images":
        with _stored_images(model, image_size, channels, cache) as stored:
            images = _unit(stored[:samples], model)
        return Generated(_recoloured(_fitted(images, image_size), channels), kind, name, None, None, None)
    key: dict[str, Any] = {"version": DRAWING_VERSION, "seed": seed, "steps": steps}
    if _is_text_to_image(folder):
        draw, parameters = _text_sampler(folder, prompts, guidance, seed, steps, device)
        key |= {"prompts": list(prompts), "guidance": guidance}
    else:
        draw, parameters = _pixel_sampler(folder, seed, steps, device)
    shelf = _open_cache(cache, folder, key) if cache else None
    images = _draw_missing(draw, samples, batch_size, shelf, on_progress)
    return Generated(_recoloured(_fitted(images, image_size), channels), kind, name, seed, steps, parameters)


def load_denoiser(model: Path, device: torch.device | str) -> Denoiser | None:
    """U-Net (on `device`, in eval mode), noise schedule and fold factor, for attacks that need losses.

    None for ready images, text-to-image, and models that predict neither the noise nor the velocity. Raises as
    `generate`.
    """
    kind, folder = _locate(model)
    if kind == "images" or _is_text_to_image(folder):
        return None
    unet, scheduler, fold = _load_pixels(folder)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        return None
    return unet.to(device).eval(), scheduler, fold


def read_images(path: Path, image_size: int = 0, channels: Channels = "auto") -> Tensor:
    """Images of a folder (PNG, JPEG, WebP, BMP; below it too, in the order of their paths) or of a .npy file.

    A .npy holds uint8, or float in [0, 1]: [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, or grey [N, H, W].

    Returns:
        float32 [N, C, H, W] in [0, 1].

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no images, sizes that differ while image_size is 0, a file that cannot be read, another shape or
            dtype, NaN, or values outside [0, 1]; the message names the file.
    """
    with _stored_images(path, image_size, channels, None) as stored:
        images = _unit(stored, path)
    return _recoloured(_fitted(images, image_size), channels)


# --- What a path holds ------------------------------------------------------------------------------------------


def _locate(model: Path) -> tuple[Kind, Path]:
    """What `model` is, and the pipeline's folder (or `model` itself, for images)."""
    if not model.exists():
        raise FileNotFoundError(f"{model} does not exist: give a run, a diffusers pipeline, or images")
    if (model / "model_index.json").is_file():
        return "pipeline", model
    if (model / "final" / "model_index.json").is_file():
        return "run", model / "final"
    if (model / "config.json").is_file():
        config = _read_json(model / "config.json")
        if "num-server-rounds" in config:
            raise FileNotFoundError(f"{model} is a run without final/: let it finish, or resume it")
        if "_class_name" in config or "architectures" in config:
            raise FileNotFoundError(
                f"{model} holds one model and no model_index.json: give the whole pipeline's folder"
            )
    if (model / "unet").is_dir():
        raise FileNotFoundError(f"{model} is not a whole diffusers pipeline: it has no model_index.json")
    return "images", model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return found


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that are there, by name: (library, class)."""
    index = _read_json(folder / "model_index.json")
    found = {name: part for name, part in index.items() if isinstance(part, list) and not name.startswith("_")}
    return {name: (part[0], part[1]) for name, part in found.items() if len(part) == 2 and part[1]}


def _is_text_to_image(folder: Path) -> bool:
    """False for a pipeline of a UNet2DModel in pixels. Raises `ValueError` if the pipeline is neither."""
    parts = _parts(folder)
    if set(parts) == {"unet", "scheduler"} and parts["unet"][1] == "UNet2DModel":
        return False
    if set(TEXT_PARTS) <= set(parts) and parts["unet"][1] == "UNet2DConditionModel":
        return True
    name = _read_json(folder / "model_index.json").get("_class_name")
    held = ", ".join(f"{part} ({kind})" for part, (_, kind) in parts.items()) or "nothing"
    raise ValueError(
        f"{folder}: cannot draw from a {name} of {held}. Supported are a UNet2DModel with its scheduler (DDPM, DDIM) "
        "and text-to-image with a unet, vae, text_encoder and tokenizer; of any other, give the images themselves"
    )


@contextmanager
def _loading(folder: Path, *libraries: ModuleType) -> Iterator[None]:
    """Damaged or missing files become a `ValueError` naming the folder; the libraries show no progress bars."""
    logs = [library.utils.logging for library in libraries]
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    finally:
        for log in shown:
            log.enable_progress_bar()


# --- Drawing ----------------------------------------------------------------------------------------------------


def _load_pixels(folder: Path) -> tuple[UNet2DModel, DDPMScheduler, int]:
    with _loading(folder, diffusers):
        unet, scheduler, fold = load_pipeline(folder)
        noise_shape(unet)
    schedule = _read_json(folder / "scheduler" / "scheduler_config.json")
    if not {"num_train_timesteps", "beta_schedule"} <= set(schedule):
        raise ValueError(
            f"{folder}: a {schedule.get('_class_name')} has no noise schedule that DDIM could follow: give images that "
            "its own pipeline drew"
        )
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"{folder}: the U-Net makes {unet.config.out_channels} channels from {unet.config.in_channels}. One that "
            "predicts its variance too is not supported: give images that its own pipeline drew"
        )
    return unet, scheduler, fold


def _pixel_sampler(folder: Path, seed: int, steps: int, device: torch.device | str) -> tuple[Draw, int]:
    unet, scheduler, fold = _load_pixels(folder)

    def draw(first: int, count: int) -> Tensor:
        return draw_images(
            unet, scheduler, count, first=first, seed=seed, steps=steps, fold=fold, batch_size=count, device=device
        )

    return draw, unet.num_parameters()


def _text_sampler(
    folder: Path, prompts: Sequence[str], guidance: float, seed: int, steps: int, device: torch.device | str
) -> tuple[Draw, int]:
    if not prompts:
        raise ValueError(f"{folder} draws images from text: give it --prompts")
    pipeline = _load_text_to_image(folder).to(device)
    shape = noise_shape(pipeline.unet)

    def draw(first: int, count: int) -> Tensor:
        ids = range(first, first + count)
        # Schedulers that add noise at every step take it from these, so it too is the image's own.
        streams = [int(np.random.SeedSequence((seed, i)).generate_state(1)[0]) for i in ids]
        drawn = pipeline(
            prompt=[prompts[i % len(prompts)] for i in ids],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=start_noise(seed, first, count, shape).to(device),
            generator=[torch.Generator("cpu").manual_seed(stream) for stream in streams],
            output_type="np",
        ).images
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()

    modules = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    return draw, sum(parameter.numel() for module in modules for parameter in module.parameters())


def _load_text_to_image(folder: Path) -> diffusers.DiffusionPipeline:
    """The pipeline in float32, without safety checker and bars, decoding image by image. Runs no code of the folder."""
    name = _read_json(folder / "model_index.json").get("_class_name")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{folder}: a {name} needs transformers: pip install transformers") from error
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{folder}: diffusers {diffusers.__version__} knows no pipeline {name}")
    takes = set(inspect.signature(kind.__call__).parameters)
    if "image" in takes or not {"prompt", "latents", "generator", "guidance_scale"} <= takes:
        raise ValueError(f"{folder}: a {name} does not draw from a prompt alone: give the images themselves")
    for part, (library, _) in _parts(folder).items():
        if library not in ("diffusers", "transformers") and part != "safety_checker":
            raise ValueError(f"{folder}: its {part} is code of its own ({library}), which the audit does not run")
    checked = "requires_safety_checker" in inspect.signature(kind.__init__).parameters
    unchecked: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if checked else {}
    with _loading(folder, diffusers, transformers):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, **unchecked
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    return pipeline


def _draw_missing(
    draw: Draw, samples: int, batch_size: int, shelf: Path | None, on_progress: Callable[[int, int], None] | None
) -> Tensor:
    """Images 0..samples-1: from the shelf where it has them, else drawn and put there, a file a batch."""
    starts = sorted(int(file.stem) for file in shelf.glob("*.npz") if file.stem.isdigit()) if shelf else []
    batches: list[Tensor] = []
    done = 0
    while done < samples:
        images = _load_batch(shelf, done) if shelf else None
        if images is None:
            following = next((start for start in starts if start > done), samples)
            images = draw(done, min(batch_size, samples - done, following - done))
            if shelf:
                _save_batch(shelf, done, images)
        batches.append(images)
        done += len(images)
        if on_progress:
            on_progress(min(done, samples), samples)
    return torch.cat(batches)[:samples]


# --- The cache of drawn images ----------------------------------------------------------------------------------


def _open_cache(cache: Path, folder: Path, key: dict[str, Any]) -> Path:
    """The folder inside `cache` of what `key` and the model's content describe; key.json in it says what they are."""
    described = json.dumps({"model": _content_digest(folder), **key}, indent=2, sort_keys=True)
    shelf = cache / hashlib.sha256(described.encode()).hexdigest()[:32]
    shelf.mkdir(parents=True, exist_ok=True)
    write_atomically(shelf / "key.json", described + "\n")
    return shelf


def _content_digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of the files that make up a pipeline."""
    digest = hashlib.sha256()
    inside = [file for part in _parts(folder) if part != "safety_checker" for file in (folder / part).rglob("*")]
    for file in sorted([folder / "model_index.json", folder / FOLD_FILE, *inside]):
        if file.is_file():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _batch_file(shelf: Path, first: int) -> Path:
    return shelf / f"{first:08d}.npz"


def _save_batch(shelf: Path, first: int, images: Tensor) -> None:
    path = _batch_file(shelf, first)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, images=images.numpy())
    sync(temporary)
    temporary.replace(path)


def _load_batch(shelf: Path, first: int) -> Tensor | None:
    """The batch that starts with image `first`, or None if it is not there or damaged (npz keeps a checksum)."""
    path = _batch_file(shelf, first)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as held:
            return torch.from_numpy(held["images"])
    except DAMAGED as error:
        logger.warning("%s is damaged (%s): its images are drawn again", path, error)
        return None


# --- Ready images -----------------------------------------------------------------------------------------------


@contextmanager
def _stored_images(path: Path, image_size: int, channels: Channels, cache: Path | None) -> Iterator[np.ndarray]:
    """The images as they are stored, [N, C, H, W] or grey [N, H, W], memory-mapped."""
    if path.is_dir():
        with TemporaryDirectory() as scratch:
            yield _decoded(path, image_size, channels, cache / "decoded" if cache else Path(scratch))
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images or a .npy file")
    else:
        yield _array(path)


def _decoded(folder: Path, image_size: int, channels: Channels, cache: Path) -> np.ndarray:
    config = DataConfig(
        source="image-folder",
        path=str(folder),
        image_size=image_size,
        channels=channels,
        on_corrupt="refuse",
        cache_dir=str(cache),
    )
    try:
        return load_folder(config).images
    except ConfigError as error:
        told, _, _ = str(error).removeprefix("data.path: ").partition("; data.on-corrupt")
        raise ValueError(f"{folder}: {told.replace('data.image-size', '--image-size')}") from error


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path} is neither a folder nor a .npy file")
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {error}") from error
    if stored.ndim not in (3, 4) or stored.size == 0:
        raise ValueError(f"{path} must hold images [N, C, H, W], [N, H, W, C] or [N, H, W], not {stored.shape}")
    if stored.dtype != np.uint8 and stored.dtype.kind != "f":
        raise ValueError(f"{path} holds {stored.dtype}: save it as uint8, or as float in [0, 1]")
    if stored.ndim == 3:
        return stored[:, None]
    if stored.shape[1] in (1, 3):
        return stored
    if stored.shape[3] in (1, 3):
        return stored.transpose(0, 3, 1, 2)
    raise ValueError(f"{path} must hold images of 1 or 3 channels, not {stored.shape}")


def _unit(stored: np.ndarray, path: Path) -> Tensor:
    """uint8 or float [N, C, H, W] -> float32 in [0, 1], in memory. Raises `ValueError` on NaN and other ranges."""
    images = torch.from_numpy(stored.astype(np.float32, order="C"))
    if stored.dtype == np.uint8:
        return images.div_(255)
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        bad = int((~((images >= 0) & (images <= 1))).flatten(1).any(1).sum())
        raise ValueError(f"{path}: {bad} of {len(images)} images hold NaN or values outside [0, 1]: scale or drop them")
    return images


def _fitted(images: Tensor, side: int) -> Tensor:
    """Shorter side to `side` and centre crop, in one Lanczos resampling; `side` 0 changes nothing."""
    if not side or images.shape[2:] == (side, side):
        return images
    planes = (Image.fromarray(plane) for plane in images.flatten(0, 1).numpy())
    fitted = [np.asarray(ImageOps.fit(plane, (side, side), method=Image.Resampling.LANCZOS)) for plane in planes]
    return torch.from_numpy(np.stack(fitted)).view(*images.shape[:2], side, side).clamp_(0, 1)


def _recoloured(images: Tensor, channels: Channels) -> Tensor:
    if channels == "grey" and images.shape[1] == 3:
        return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA))[:, None].clamp_(0, 1)
    if channels == "rgb" and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1).contiguous()
    return images
