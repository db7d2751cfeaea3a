"""The images of report.html, inlined: samples, pairs of a sample and its nearest training image, suspects."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ret_fl.audit.counterparts import headline
from ret_fl.audit.schema import Audit
from ret_fl.audit.words import number
from ret_fl.pictures import Pairs, image_grid

SHOWN_SAMPLES = 64
SHOWN_SUSPECTS = 24
TILE_SIDE = 160
"""Images above this side are shown smaller, to keep the page light."""
GRID_TILE_SIDE = 96


@dataclass(frozen=True)
class Tile:
    """An image as a data: URI, and what stands in its place for those who cannot see it."""

    src: str
    alt: str


@dataclass(frozen=True)
class Pair:
    generated: Tile
    original: Tile
    copied: bool | None
    facts: list[str]


@dataclass(frozen=True)
class Suspect:
    image: Tile | None
    facts: list[str]


def sample_sheet(samples: Tensor | None) -> Tile | None:
    """The first samples on one sheet, or None without any."""
    if samples is None or not len(samples):
        return None
    shown = samples[:SHOWN_SAMPLES].detach().float().cpu()
    factor = max(1, math.ceil(shown.shape[-1] / GRID_TILE_SIDE))
    small = F.avg_pool2d(shown, factor) if factor > 1 else shown
    return Tile(_data_uri(image_grid(small)), f"The first {len(shown)} samples")


def worst_pairs(audit: Audit, worst: Pairs | None) -> list[Pair]:
    """The samples closest to a training image beside it, with what is known of each."""
    if worst is None:
        return []
    named = audit.replication.worst if len(audit.replication.worst) == len(worst.ratio) else None
    rate = headline(audit)
    pairs = []
    for i, (generated, original, r) in enumerate(
        zip(worst.generated, worst.originals, worst.ratio.tolist(), strict=True)
    ):
        if named is not None and audit.replication.worst_variant is not None:
            distance = named[i].distance
        else:
            distance = float((generated.double() - original.double()).square().sum())
        facts = [f"ratio {number(r)}"] if math.isfinite(r) else []
        facts.append(f"distance {number(distance)}")
        if named is not None:
            facts.append(f"sample {named[i].sample}, training image {named[i].train}")
        copied = r < rate.threshold if rate is not None and math.isfinite(r) else None
        left, right = _tile(generated, f"Generated image {i + 1}"), _tile(original, "Its nearest training image")
        pairs.append(Pair(left, right, copied, facts))
    return pairs


def suspect_tiles(audit: Audit, images: Tensor | None) -> list[Suspect]:
    """Suspected duplicates, with their images where there are any."""
    duplicates = audit.leakage.duplicates if audit.leakage else None
    shown = []
    for i, suspect in enumerate(duplicates.suspects[:SHOWN_SUSPECTS] if duplicates else []):
        known = images is not None and i < len(images)
        image = _tile(images[i], f"Training image {suspect.train}") if known and images is not None else None
        copies = "in the data once" if suspect.copies == 1 else f"in the data {suspect.copies:,} times"
        shown.append(
            Suspect(
                image, [f"image {suspect.train}", f"log-ratio {suspect.log_ratio:+.2f}, z {suspect.z:+.1f}", copies]
            )
        )
    return shown


def _tile(image: Tensor, alt: str) -> Tile:
    """A float [C, H, W] image in [0, 1] at its own size; the page enlarges small ones with sharp pixels."""
    return Tile(_data_uri(_image(image, TILE_SIDE)), alt)


def _image(image: Tensor, side: int) -> Image.Image:
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.thumbnail((side, side))
    return picture


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
