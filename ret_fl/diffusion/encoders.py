"""The frozen half of a StableDiffusionPipeline folder: VAE, tokenizer and text encoder."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ret_fl.config import ConfigError

SAVE_ANEW = (
    "pickled weights are not read. Where you trust them, load them with diffusers or transformers once, and save "
    "them by save_pretrained"
)


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The config of one part of a pipeline. Raises `ConfigError`."""
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.init-from: {file} cannot be read: {error}") from None


def weight_files(folder: Path, setting: str = "") -> list[Path]:
    """The safetensors files of one network that are loaded where no variant is asked for, sorted.

    Raises `ConfigError` where there are none, or an index names files of another kind, which would be opened too. It
    begins with `setting`, where one names the folder.
    """
    about = f"{setting}: " if setting else ""
    found = sorted(file for file in folder.glob("*.safetensors") if file.name.count(".") == 1)
    if not found:
        raise ConfigError(f"{about}{folder} has no *.safetensors: {SAVE_ANEW}")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{about}{index} cannot be read: {type(error).__name__}: {error}") from None
        if other := sorted(str(name) for name in named if not str(name).endswith(".safetensors")):
            raise ConfigError(f"{about}{index} names {other[0]}, no *.safetensors: {SAVE_ANEW}")
    return found


@lru_cache(maxsize=32)
def fingerprint(folder: Path, *parts: str) -> str:
    """SHA-256 (hex) of the weights and settings of parts of a pipeline; each file is read once a process."""
    digest = hashlib.sha256()
    for part in parts:
        weights = weight_files(folder / part) if part not in ("tokenizer", "scheduler") else []
        settings = sorted(file for file in (folder / part).iterdir() if file.suffix in (".json", ".txt"))
        for file in [*settings, *weights]:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{part}/{file.name}\0{content}\n".encode())
    return digest.hexdigest()


class Encoders:
    """VAE and text encoder of the pipeline in `folder`, frozen, in float32; on `device` from when they are needed."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        vae = read_config(folder, "vae")
        self.latent_channels: int = vae["latent_channels"]
        self.scaling_factor: float = vae.get("scaling_factor", 0.18215)
        self.downscale: int = 2 ** (len(vae["block_out_channels"]) - 1)
        self.width: int = read_config(folder, "text_encoder")["hidden_size"]

    @cached_property
    def vae(self) -> AutoencoderKL:
        weight_files(self.folder / "vae")
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read: not from training's noise
            vae = AutoencoderKL.from_pretrained(
                self.folder / "vae", use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
            )
        return vae.requires_grad_(False).eval().to(self.device)

    @cached_property
    def text_encoder(self) -> Any:
        weight_files(self.folder / "text_encoder")
        with torch.random.fork_rng(devices=[]):
            encoder = _transformers().CLIPTextModel.from_pretrained(
                self.folder / "text_encoder", use_safetensors=True, local_files_only=True
            )
        return encoder.float().requires_grad_(False).eval().to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        folder = self.folder / "tokenizer"
        # without these files transformers makes up a tokenizer that knows no words
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise ConfigError(f"model.init-from: {folder} has no vocab.json or tokenizer.json: copy all its files")
        return _transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    @property
    def length(self) -> int:
        """Tokens of a caption, padding included."""
        return self.tokenizer.model_max_length

    def release(self) -> None:
        """Give back the memory of the networks until one is needed again."""
        for name in ("vae", "text_encoder"):
            self.__dict__.pop(name, None)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of (C, H, W)."""
        _, height, width = image_shape
        return self.latent_channels, height // self.downscale, width // self.downscale

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images float32 [B, 3, H, W] in [-1, 1]: [B, 2, C, h, w]."""
        latents = self.vae.encode(images.to(self.device)).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1).contiguous()

    def tokens(self, captions: list[str]) -> Tensor:
        """int64 [B, length]: captions cut or padded to it."""
        return self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What the U-Net is told of captions given as tokens (int64 [B, length]): float32 [B, length, width]."""
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = (tokens != self.tokenizer.pad_token_id).long().to(self.device)
        return self.text_encoder(tokens.to(self.device), attention_mask=mask)[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("a text-to-image model needs transformers: pip install 'ret-fl[text]'") from None
    return transformers
