"""A small classifier of real images, whose features tell how good generated ones are.

Without labels it learns which way up an image is (Gidaris et al. 2018, arXiv 1803.07728), which takes knowing what it
shows.

Inception features say little about 8x8 or 32x32 images of another domain, so the features come from a convnet trained
on the data at hand. Numbers are comparable only between runs that share the classifier, its data and its seed.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ret_fl.audit.distances import Images, one_thread_operations, pixel_rows

FEATURES = 64
MIN_SIDE = 8
MAX_SIDE = 64
"""Larger images are made smaller first: the classifier reads what they show, and its cost grows with their area."""
FINE_SIDE = 32
TURNS = 4
OF_TURNS = "classifier of the data's turns"
"""Name of a classifier that tells turned images apart, for want of classes."""
ARCHITECTURE = 1
"""Raise when the same arguments would give other weights, so that cached ones are not taken for them."""
BATCH = 64
EVAL_BATCH = 512


class FeatureClassifier(nn.Module):
    """Convnet for [N, C, H, W] images in [0, 1], sides in 8..64; its last hidden layer (64 wide) are the features."""

    name = "classifier of the data"
    recipe = ""
    """Hash of all that decided the weights."""

    def __init__(self, channels: int, num_classes: int, side: int, width: int = 32) -> None:
        super().__init__()
        # A first layer at full size makes training on 64 pixels 4.5 times as slow.
        stride = 2 if side > FINE_SIDE else 1
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.SiLU()]
        side = -(-side // stride)
        # Halve until at most 7 pixels are left: positions matter in small images, so they are not pooled away.
        while side >= MIN_SIDE:
            layers += [nn.Conv2d(width, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU()]
            side, width = (side + 1) // 2, 64
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, FEATURES), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [N, num_classes] of float32 images [N, C, H, W] in [0, 1]."""
        return self.head(self.body(2 * images - 1))

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """float32 [N, 64] features of images (float in [0, 1] or uint8, of any size from 8x8), on the CPU."""
        return torch.cat([self.body(2 * batch - 1).cpu() for batch in self._batches(images)])

    @torch.no_grad()
    def probabilities(self, images: Images) -> Tensor:
        """float32 [N, num_classes] class probabilities of images as in `features`, on the CPU."""
        return torch.cat([self(batch).softmax(1).cpu() for batch in self._batches(images)])

    def _batches(self, images: Images) -> Iterator[Tensor]:
        for batch in torch.as_tensor(images).split(EVAL_BATCH):
            yield unit_images(small_images(batch)).to(self.head.weight.device)


def train_classifier(
    images: Images,
    labels: Tensor | np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = 20,
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureClassifier:
    """Train a `FeatureClassifier`, or load the one that the same call saved before.

    The result depends on the arguments alone (on one machine; on a GPU up to rounding), never on the global random
    state.

    Args:
        images: [N, C, H, W] real images, float in [0, 1] or uint8; larger ones than 64 pixels are made smaller.
        labels: int [N] in 0..num_classes-1.
        num_classes: at least 2.
        seed: of the initial weights and the order of the batches.
        epochs: passes over the images; 20 take seconds for 1400 digits of 8x8.
        path: safetensors file that caches the weights; rewritten when it was made from other arguments.
        device: where it is trained and used.
        on_progress: told how many passes of how many are done.

    Raises:
        ValueError: labels that do not match the images or the number of classes, epochs < 1, or bad images.
    """
    unit, target = unit_images(small_images(images)), torch.as_tensor(labels).cpu()
    if num_classes < 2 or epochs < 1:
        raise ValueError(f"num_classes must be >= 2 and epochs >= 1, got {num_classes} and {epochs}")
    if target.is_floating_point() or target.shape != (len(unit),):
        raise ValueError(f"labels must be int [{len(unit)}], one per image, got {target.dtype} {tuple(target.shape)}")
    if not 0 <= int(target.min()) <= int(target.max()) < num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(target.min())}..{int(target.max())}")
    unit, target = unit.cpu(), target.long()
    place, cache = torch.device(device), Path(path) if path is not None else None
    recipe = _recipe(unit, target, num_classes, seed, epochs, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FeatureClassifier(unit.shape[1], num_classes, min(unit.shape[2:])).to(place)
    model.recipe = hashlib.sha256(recipe.encode()).hexdigest()
    if cache is not None and _load_cached(model, cache, recipe):
        return model
    # The same weights on any number of cores, and such small layers gain nothing from more.
    with one_thread_operations():
        _fit(model, unit, target, seed, epochs, on_progress)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_name(cache.name + ".part")
        save_file(model.state_dict(), part, metadata={"recipe": recipe})
        part.replace(cache)  # a reader never sees half a file
    return model


def _fit(
    model: FeatureClassifier,
    images: Tensor,
    labels: Tensor,
    seed: int,
    epochs: int,
    on_progress: Callable[[int, int], None],
) -> None:
    generator, device = torch.Generator().manual_seed(seed), model.head.weight.device
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(images[rows].to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_progress(epoch + 1, epochs)
    model.eval().requires_grad_(False)


def _recipe(images: Tensor, labels: Tensor, num_classes: int, seed: int, epochs: int, device: torch.device) -> str:
    """All that decides the weights, for the cache to be recognised as stale."""
    data = hashlib.sha256(images.contiguous().numpy().data)
    data.update(labels.numpy().data)
    settings = f"classes={num_classes} seed={seed} epochs={epochs} device={device.type} architecture={ARCHITECTURE}"
    return f"data={data.hexdigest()} shape={tuple(images.shape)} {settings}"


def _load_cached(model: FeatureClassifier, path: Path, recipe: str) -> bool:
    """Fill `model` from `path` if that file was made by `recipe`, and is whole."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("recipe") != recipe:
                return False
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError:
        return False
    # loading weights that do not fit would raise with some of them in place
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in model.state_dict().items()}:
        return False
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    return True


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image [N, C, H, W] turned four ways, [4N, C, H, W], and which way, int64 [4N].

    By quarter turns where images are square; else upside down, mirrored, and both.
    """
    if images.shape[2] == images.shape[3]:
        ways = [torch.rot90(images, k, (2, 3)) for k in range(TURNS)]
    else:
        ways = [images, images.flip(2), images.flip(3), images.flip(2, 3)]
    return torch.cat(ways), torch.arange(TURNS).repeat_interleave(len(images))


def small_images(images: Images) -> Tensor:
    """Images [N, C, H, W], made smaller where a side is above 64; uint8 ones stay uint8."""
    values = torch.as_tensor(images)
    if values.ndim != 4 or max(values.shape[2:]) <= MAX_SIDE:
        return values
    scale = MAX_SIDE / max(values.shape[2:])
    size = [min(side, max(MIN_SIDE, round(scale * side))) for side in values.shape[2:]]
    small = torch.cat(
        [F.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in values.split(BATCH)]
    )
    return small.round().to(torch.uint8) if values.dtype == torch.uint8 else small


def unit_images(images: Images) -> Tensor:
    """float32 [N, C, H, W] from float images in [0, 1] or uint8 ones.

    Raises:
        ValueError: not four axes, sides below 8, values outside [0, 1] by more than rounding, or not finite.
    """
    values = torch.as_tensor(images)
    if values.ndim != 4 or min(values.shape[2:]) < MIN_SIDE:
        raise ValueError(f"images must be [N, C, H, W] with H and W >= {MIN_SIDE}, got shape {tuple(values.shape)}")
    unit = pixel_rows(values).float().view(values.shape)
    low, high = unit.min().item(), unit.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images must lie in [0, 1], got {low:.3g}..{high:.3g}: rescale, then clip them")
    return unit
