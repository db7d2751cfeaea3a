"""Diffusers pipelines in a folder: what they are, and how images are drawn from them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor

from ret_fl.data.folder import IMAGE_SUFFIXES
from ret_fl.diffusion.encoders import weight_files
from ret_fl.diffusion.ensemble import AveragedUNet, Ensemble, How, is_ensemble, read_ensemble
from ret_fl.diffusion.sampling import draw_ids, draw_images, image_shape, load_pipeline, noise_shape, start_noise
from ret_fl.diffusion.text_to_image import BASE_FILE, LORA_FILE, frozen_fingerprint

Kind = Literal["run", "pipeline", "images"]
Draw = Callable[[int, int], Tensor]
"""draw(first, count) -> images first..first+count-1, float32 [count, C, H, W] in [0, 1] on the CPU."""
AT_ONCE = 64
"""Images that one model draws at once."""
TEXT_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def locate(model: Path) -> tuple[Kind, Path]:
    """What `model` is, and the pipeline's folder (or `model` itself, for images)."""
    if not model.exists():
        raise FileNotFoundError(f"{model} does not exist: give a run, a diffusers pipeline, or images")
    if (model / "model_index.json").is_file():
        return "pipeline", model
    if is_adapters(model):
        return "pipeline", model
    if is_ensemble(model):
        return "pipeline", model
    final = model / "final"
    if (final / "model_index.json").is_file() or is_adapters(final) or is_ensemble(final):
        return "run", final
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
    if model.is_dir() and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in model.rglob("*")):
        raise ValueError(
            f"{model} is nothing to audit: it holds no model_index.json of a diffusers pipeline, and no PNG, JPEG, "
            "WebP or BMP images"
        )
    return "images", model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return found


def is_adapters(folder: Path) -> bool:
    """Whether a folder holds what ret-fl trained by LoRA: adapters, and where the pipeline is that they belong to."""
    return (folder / LORA_FILE).is_file() and (folder / BASE_FILE).is_file()


def pipeline_of(folder: Path) -> Path:
    """The pipeline's folder: `folder` itself, or the one that the adapters in it belong to.

    Raises `ValueError` if that is no longer there.
    """
    if not is_adapters(folder):
        return folder
    base = Path(str(_read_json(folder / BASE_FILE).get("base")))
    if not (base / "model_index.json").is_file():
        raise ValueError(f"{folder} holds adapters of {base}, which is gone: correct 'base' in {BASE_FILE}")
    return base


def _require_base(folder: Path) -> None:
    """Raise `ValueError` if the pipeline that adapters name is no longer the one they were trained on."""
    base = pipeline_of(folder)
    if frozen_fingerprint(base, lora=True) != _read_json(folder / BASE_FILE).get("fingerprint"):
        raise ValueError(
            f"its adapters were trained on another pipeline than the one that now lies in {base}: bring that one back, "
            f"or correct 'base' in {BASE_FILE}"
        )


def parts_of(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that are there, by name: (library, class)."""
    index = _read_json(folder / "model_index.json")
    found = {name: part for name, part in index.items() if isinstance(part, list) and not name.startswith("_")}
    return {name: (part[0], part[1]) for name, part in found.items() if len(part) == 2 and part[1]}


def is_text_to_image(folder: Path) -> bool:
    """False for a pipeline of a UNet2DModel in pixels, or K. Raises `ValueError` if the pipeline is neither."""
    if is_ensemble(folder):
        return False
    folder = pipeline_of(folder)
    parts = parts_of(folder)
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


def load_pixels(folder: Path) -> tuple[UNet2DModel, DDPMScheduler, int]:
    """U-Net, noise schedule and fold factor; of an ensemble the one that averages the predictions of all, in memory.

    Raises `ValueError` where DDIM cannot follow them.
    """
    if not is_ensemble(folder):
        return _load_pixels(folder)
    ensemble = read_ensemble(folder)
    loaded = [_load_pixels(member) for member in ensemble.members]
    kinds = {(noise_shape(unet), unet.config.num_class_embeds, fold, repr(s.config)) for unet, s, fold in loaded}
    if len(kinds) > 1:
        raise ValueError(f"{folder} is no ensemble: its proxies differ in size, classes or noise schedule")
    _, scheduler, fold = loaded[0]
    return AveragedUNet([unet for unet, _, _ in loaded], ensemble.shares.tolist()), scheduler, fold


def pixel_shape(folder: Path) -> tuple[int, int, int]:
    """(C, H, W) of the images of a U-Net in pixels, or of an ensemble, of which one proxy is loaded to see."""
    unet, _, fold = _load_pixels(read_ensemble(folder).members[0] if is_ensemble(folder) else folder)
    return image_shape(unet, fold)


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


def pixel_sampler(
    folder: Path,
    seed: int,
    steps: int,
    device: torch.device | str,
    label: int | None = None,
    how: How | None = None,
) -> tuple[Draw, int]:
    """How to draw from a U-Net in pixels, and its number of parameters. label: the only class to draw, None: all.

    how: in place of what an ensemble's folder says, which must be one then.
    """
    if is_ensemble(folder) and (how or read_ensemble(folder).how) == "choose":
        return _choosing_sampler(read_ensemble(folder), seed, steps, device, label)
    unet, scheduler, fold = load_pixels(folder)

    def draw(first: int, count: int) -> Tensor:
        return draw_images(
            unet, scheduler, count, first=first, seed=seed, steps=steps, fold=fold, label=label, batch_size=count,
            device=device,
        )  # fmt: skip

    return draw, unet.num_parameters()


def _choosing_sampler(
    ensemble: Ensemble, seed: int, steps: int, device: torch.device | str, label: int | None
) -> tuple[Draw, int]:
    """Each image from one proxy of an ensemble, of which one is in memory at a time; parameters: of all of them."""
    unet, _, fold = _load_pixels(ensemble.members[0])
    parameters, shape = unet.num_parameters() * len(ensemble.members), image_shape(unet, fold)
    del unet

    def draw(first: int, count: int) -> Tensor:
        which = ensemble.chosen(seed, range(first, first + count))
        images = torch.empty(count, *shape)
        for shard in np.unique(which):
            mine = np.flatnonzero(which == shard)
            unet, scheduler, fold = _load_pixels(ensemble.members[shard])
            images[torch.from_numpy(mine)] = draw_ids(
                unet, scheduler, (first + mine).tolist(), seed=seed, steps=steps, fold=fold, label=label,
                batch_size=AT_ONCE, device=device,
            )  # fmt: skip
            del unet
        return images

    return draw, parameters


def asked_at_once(folder: Path, size: int, how: How | None = None) -> int:
    """Images to ask `pixel_sampler` for where a model is to draw `size` at once: of each proxy, where they take turns.

    The more are asked for at once, the fewer times a proxy is loaded.
    """
    if not is_ensemble(folder) or (how or read_ensemble(folder).how) != "choose":
        return size
    return size * len(read_ensemble(folder).members)


def text_sampler(
    folder: Path, prompts: Sequence[str], guidance: float, seed: int, steps: int, device: torch.device | str
) -> tuple[Draw, int]:
    """How to draw from a text-to-image pipeline, and its number of parameters."""
    kind = require_text_to_image(folder, prompts)
    pipeline = _load_text_to_image(folder, kind).to(device)
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


def require_text_to_image(folder: Path, prompts: Sequence[str]) -> type:
    """The pipeline's class. Raises `ValueError` if it draws from no such prompts, or would run code of the folder."""
    if not prompts:
        raise ValueError(f"{folder} draws images from text: give it --prompts (`ret-fl sample`: --prompt)")
    folder = pipeline_of(folder)
    name = _read_json(folder / "model_index.json").get("_class_name")
    try:
        import transformers  # noqa: F401, whether it is there
    except ImportError as error:
        raise ValueError(f"{folder}: a {name} needs transformers: pip install transformers") from error
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{folder}: diffusers {diffusers.__version__} knows no pipeline {name}")
    takes = set(inspect.signature(kind.__call__).parameters)
    if "image" in takes or not {"prompt", "latents", "generator", "guidance_scale"} <= takes:
        raise ValueError(f"{folder}: a {name} does not draw from a prompt alone: give the images themselves")
    for part, (library, _) in parts_of(folder).items():
        if library not in ("diffusers", "transformers") and part != "safety_checker":
            raise ValueError(f"{folder}: its {part} is code of its own ({library}), which the audit does not run")
    return kind


def _load_text_to_image(folder: Path, kind: type) -> diffusers.DiffusionPipeline:
    """The pipeline in float32, without safety checker and bars, decoding image by image."""
    import transformers

    checked = "requires_safety_checker" in inspect.signature(kind).parameters
    unchecked: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if checked else {}
    base = pipeline_of(folder)
    with _loading(folder, diffusers, transformers):
        for part in [base / name for name in parts_of(base) if name not in unchecked]:
            if (part / "config.json").is_file():  # a network
                weight_files(part)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            base, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, **unchecked
        )
        if is_adapters(folder):
            _require_base(folder)
            pipeline.unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA_FILE, local_files_only=True)
            side = _read_json(folder / BASE_FILE)["image_size"] // pipeline.vae_scale_factor
            pipeline.unet.register_to_config(sample_size=side)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    return pipeline
