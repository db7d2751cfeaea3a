"""Fine-tuning of a StableDiffusionPipeline folder (SD 1.x, 2.x): its U-Net, whole or by LoRA; all else is frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from ret_fl.config import ConfigError, DataConfig, RunConfig
from ret_fl.data.decode import cache_dir
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.encoders import Encoders, fingerprint, read_config, weight_files
from ret_fl.diffusion.latents import LatentObjective

LORA_FILE = "pytorch_lora_weights.safetensors"
BASE_FILE = "lora_base.json"
"""Beside `LORA_FILE`: the folder of the pipeline that the adapters belong to, and the side of the images."""
FROZEN = ("vae", "text_encoder", "tokenizer", "scheduler")


def is_stable_diffusion(init_from: str) -> bool:
    """Whether `model.init-from` names a StableDiffusionPipeline folder."""
    index = Path(init_from) / "model_index.json"
    if not init_from or not index.is_file():
        return False
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == "StableDiffusionPipeline"


CAPTIONED = ("image-folder", "hf")
"""Values of data.source that may have captions."""


def wants_captions(config: RunConfig) -> bool | None:
    """Whether a run trains text-to-image; None: the folder that says so, in model.init-from, is not on this machine."""
    folder = config.model.init_from
    if folder and not Path(folder).is_dir() and config.data.source in CAPTIONED:
        return None
    return is_stable_diffusion(folder)


def data_read(config: RunConfig) -> DataConfig:
    """What a run reads of `data.*`: captions only where a model is told them, whatever lies beside the images."""
    if is_stable_diffusion(config.model.init_from) or config.data.source not in CAPTIONED:
        return config.data
    return config.data.model_copy(update={"captions": "", "caption_column": ""})


def require_captions(config: RunConfig, train: SampleStore | None) -> None:
    """Raise `ConfigError` where model and data do not go together as text-to-image training.

    train: None where a sample service has the data.
    """
    if config.model.init_from and not Path(config.model.init_from).is_dir():
        raise ConfigError(f"model.init-from: {config.model.init_from} is no folder here: download the pipeline first")
    text = is_stable_diffusion(config.model.init_from)
    if text and config.service.address:
        raise ConfigError("service.address: a sample service serves no captions, give each node the data itself")
    if text and (train is None or train.captions is None):
        raise ConfigError(
            f"model.init-from: {config.model.init_from} draws from text, and the data has no captions: put "
            "captions.json into the image folder (data.captions), or name the column of an hf dataset in "
            "data.caption-column"
        )
    if text and not config.averages:
        raise ConfigError(
            "aggregate-every=0 keeps a whole pipeline a shard, and images cannot be drawn from several text-to-image "
            "pipelines: set aggregate-every=1 or more"
        )
    if config.lora.rank and not text:
        raise ConfigError("lora.rank: only a StableDiffusionPipeline in model.init-from gets adapters")


def frozen_part(config: RunConfig) -> str:
    """Fingerprint of what of the folder is not trained and does not travel; with LoRA the U-Net's weights, too."""
    return frozen_fingerprint(Path(config.model.init_from), lora=bool(config.lora.rank))


def frozen_fingerprint(folder: Path, *, lora: bool) -> str:
    """As `frozen_part`, of a pipeline's folder."""
    return fingerprint(folder, *FROZEN, *(["unet"] if lora else []))


class TextToImageModel:
    """The U-Net of the pipeline in `model.init-from`, and the losses of its latents.

    The noise schedule, epsilon or v, is the folder's: of `diffusion.*` only timesteps is read, and must agree.

    Raises `ConfigError` where the folder and the images or settings do not fit together.
    """

    def __init__(self, config: RunConfig, image_shape: tuple[int, int, int]) -> None:
        self.config, self.folder = config, Path(config.model.init_from)
        self.scheduler = self._scheduler()
        encoders = Encoders(self.folder, torch.device("cpu"))
        weight_files(self.folder / "unet", "model.init-from")
        self.unet = UNet2DConditionModel.from_pretrained(
            self.folder / "unet", use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
        self._fit(encoders, image_shape)
        # what a pipeline draws by default is what it was fine-tuned on
        self.unet.register_to_config(sample_size=encoders.latent_shape(image_shape)[1])
        self.image_size = image_shape[1]
        if config.lora.rank:
            self._add_adapters()

    @property
    def frozen(self) -> str:
        return frozen_part(self.config)

    def objective(self, device: torch.device, half: torch.dtype | None = None) -> LatentObjective:
        text = self.config.text
        cache = cache_dir(self.config.data) / "encodings" if text.cache else None
        return LatentObjective(self.scheduler, device, Encoders(self.folder, device), text, cache, half)

    def save(self, folder: Path) -> None:
        """A whole StableDiffusionPipeline, or the adapters alone, for `load_lora_weights`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.lora.rank:
            self._save_adapters(folder)
            return
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        shutil.copy2(self.folder / "model_index.json", folder)
        for part in index:
            if part != "unet" and (self.folder / part).is_dir():
                shutil.copytree(self.folder / part, folder / part, dirs_exist_ok=True, ignore=_not_loaded)
        self.unet.save_pretrained(folder / "unet")

    def _scheduler(self) -> DDPMScheduler:
        scheduler = DDPMScheduler.from_config(read_config(self.folder, "scheduler"))
        predicts, steps = scheduler.config.prediction_type, scheduler.config.num_train_timesteps
        if predicts not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"model.init-from: {self.folder} predicts {predicts}; only epsilon and v_prediction train"
            )
        if steps != self.config.diffusion.timesteps:
            raise ConfigError(f"model.init-from: {self.folder} has {steps} timesteps: set diffusion.timesteps={steps}")
        return scheduler

    def _fit(self, encoders: Encoders, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        config = self.unet.config
        multiple = encoders.downscale * 2 ** (len(config.block_out_channels) - 1)
        if channels != 3:
            raise ConfigError("model.init-from: the images are grey, Stable Diffusion's are not: set data.channels=rgb")
        if height != width or height % multiple:
            raise ConfigError(
                f"model.init-from: images of {height}x{width} do not fit {self.folder}: set data.image-size to a "
                f"multiple of {multiple}"
            )
        if (config.in_channels, config.out_channels) != (encoders.latent_channels,) * 2:
            raise ConfigError(
                f"model.init-from: the U-Net of {self.folder} takes {config.in_channels} channels and makes "
                f"{config.out_channels}, its VAE {encoders.latent_channels}: only plain text-to-image models train"
            )

    def _add_adapters(self) -> None:
        try:
            from peft import LoraConfig
        except ImportError:
            raise ConfigError("lora.rank needs peft: pip install 'ret-fl[text]'") from None
        settings, rank = self.config.lora, self.config.lora.rank
        self.unet.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            try:
                # alpha = rank, a scale of 1: diffusers needs to be told nothing more to load them
                self.unet.add_adapter(
                    LoraConfig(
                        r=rank,
                        lora_alpha=rank,
                        init_lora_weights="gaussian",
                        target_modules=[name.strip() for name in settings.targets.split(",")],
                    )
                )
            except ValueError as error:
                raise ConfigError(f"lora.targets={settings.targets!r}: {error}") from error

    def _save_adapters(self, folder: Path) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        adapters: dict[str, Any] = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=adapters)
        base = {"base": str(self.folder.absolute()), "fingerprint": self.frozen, "image_size": self.image_size}
        (folder / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def _not_loaded(folder: str, names: list[str]) -> set[str]:
    """Weights of other formats and variants beside those that are loaded."""
    weights = (".safetensors", ".bin", ".msgpack", ".ckpt", ".onnx")
    loaded = {name for name in names if name.endswith(".safetensors") and name.count(".") == 1}
    return {name for name in names if name.endswith(weights) and name not in loaded} if loaded else set()
