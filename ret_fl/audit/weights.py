"""Where the networks behind published numbers lie: Inception, SSCD and CLIP. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Weights:
    """A network that papers measure with.

    spec: its name for `--features`. file: what its authors call the file; with `hub` a folder. what: what it is and
    where to have it from, for messages. hub: its name on Hugging Face's hub, in whose cache it may lie.
    """

    spec: str
    file: str
    what: str
    hub: str = ""

    @property
    def variable(self) -> str:
        """Of the environment, by which a user names the place."""
        return f"RET_FL_{self.spec.upper()}"

    def find(self) -> Path:
        """Where `variable` points, else what is found in `places`, else in the hub's cache.

        Raises:
            ValueError: it is in none of them; the message names them, and where to have it from.
        """
        kind = "folder" if self.hub else "file"
        if named := os.environ.get(self.variable):
            if self._is_one(Path(named)):
                return Path(named)
            raise ValueError(f"{self.variable} points at {named}, which is no {kind}: correct or unset it")
        if found := next(self._candidates(), None):
            return found
        raise ValueError(
            f"'{self.spec}' needs the {kind} {self.file}: {self.what}. Nothing is downloaded: put it into "
            f"{' or '.join(map(str, self.places()))}, or let {self.variable} name it. Features of other networks need "
            "no such file, but their numbers are never comparable with these"
        )

    def places(self) -> list[Path]:
        """Folders that are looked into: torch hub's checkpoints and dnnlib's cache."""
        return [Path(torch.hub.get_dir()) / "checkpoints", Path.home() / ".cache" / "dnnlib" / "downloads"]

    def _candidates(self) -> Iterator[Path]:
        for place in self.places():
            yield from (path for path in sorted(place.glob(f"*{self.file}")) if self._is_one(path))
        if self.hub:
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(self.hub, "config.json")
            if isinstance(config, str):
                yield Path(config).parent

    def _is_one(self, path: Path) -> bool:
        return path.is_dir() if self.hub else path.is_file()


INCEPTION = Weights(
    "inception",
    "inception-2015-12-05.pt",
    "Inception-v3 of published FIDs, 2048 features, the TorchScript file of NVIDIA's StyleGAN2-ADA",
)
SSCD = Weights(
    "sscd",
    "sscd_disc_large.torchscript.pt",
    "the copy detector of arXiv 2202.10261 behind published memorization scores of Stable Diffusion, linked on "
    "github.com/facebookresearch/sscd-copy-detection",
)
CLIP = Weights(
    "clip",
    "clip-vit-base-patch16",
    "CLIP ViT-B/16 of published CLIP scores, openai/clip-vit-base-patch16 on Hugging Face's hub (a machine with "
    "internet gets it into its cache by `hf download openai/clip-vit-base-patch16`)",
    hub="openai/clip-vit-base-patch16",
)
NAMED = {weights.spec: weights for weights in (INCEPTION, SSCD, CLIP)}
"""By the name that `--features` takes."""


def lookalike(spec: str) -> Weights | None:
    """Which of `NAMED` a path that leads nowhere was probably meant for, by its last part."""
    name = Path(spec).name.lower()
    return next((weights for key, weights in NAMED.items() if key in name), None)
