"""Real images to find copies of: checked and hashed once, viewed without duplicates, searched in every position."""

import hashlib
import math
import warnings
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ret_fl.audit.distances import ImageRows, Images, image_rows, nearest, require_same_size

KEY_ELEMENTS = 2**16

Variant = Literal["pixels", "shift", "flip"]
Device = torch.device | str | None


def deduplicate(images: Images) -> Tensor:
    """int64 [M]: the first occurrence of every distinct image, ascending; images are equal if so in float32."""
    return _first_occurrence(image_rows(images))[0].unique()


class RealSet:
    """Real images to find copies of: checked and hashed once, viewed without duplicates, searched without a copy."""

    def __init__(self, images: Images, name: str, device: torch.device, memory_mb: int) -> None:
        rows = _unit_rows(images, name)
        self.name = name
        self.shape = tuple(images.shape[1:])
        self.first, self.keys = _first_occurrence(rows)  # int64 [N]; the distinct images' digests
        self.kept = self.first.unique()
        self.distinct = rows if len(self.kept) == len(rows) else replace(rows, rows=self.kept)
        self.distinct = self.distinct.to(device)
        self.memory_mb = memory_mb

    def __len__(self) -> int:
        """How many images are distinct."""
        return len(self.kept)

    def nearest(self, queries: ImageRows, k: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the function `nearest`; indices are rows of all images, of the first occurrence."""
        if not 1 <= k <= len(self):
            raise ValueError(
                f"k must lie in 1..{len(self)}, the number of distinct training images, got {k}: lower k or give more "
                "training images"
            )
        squared, index = nearest(queries, replace(self.distinct, columns=columns), k, memory_mb=self.memory_mb)
        return squared, self.kept[index]

    def nearest_moved(
        self, queries: ImageRows, variant: Variant, unmoved: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Squared distance float64 [G] and row int64 [G] of the nearest image in any position, ties to the lower row.

        unmoved: the answer for "pixels", if it is known.
        """
        moves = _moves(self.shape, variant, self.name)
        if unmoved is None:
            squared, row = self.nearest(queries, 1)
            unmoved = squared[:, 0], row[:, 0]
        best, index = unmoved
        for columns in moves:
            squared, row = (found[:, 0] for found in self.nearest(queries, 1, columns))
            closer = (squared < best) | ((squared == best) & (row < index))
            best, index = torch.where(closer, squared, best), torch.where(closer, row, index)
        return best, index


def _moves(shape: tuple[int, ...], variant: Variant, name: str) -> list[Tensor]:
    """For every position but the original, int64 [C*H*W]: which pixel each pixel of the moved image comes from."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    if variant == "pixels":
        return []
    if len(shape) != 3 or (variant == "flip" and shape[2] < 2):
        raise ValueError(
            f"variant {variant!r} moves images [N, C, H, W] (to mirror them, W >= 2), but {name} are [N, "
            f"{', '.join(map(str, shape))}]: give them in that shape, or take variant 'pixels'"
        )
    pixels = torch.arange(math.prod(shape)).view(shape)
    if variant == "flip":
        return [pixels.flip(2).flatten()]
    down, right = ([(torch.arange(n) - step).clamp(0, n - 1) for step in (-1, 0, 1)] for n in shape[1:])
    return [
        pixels[:, y][:, :, x].flatten() for i, y in enumerate(down) for j, x in enumerate(right) if (i, j) != (1, 1)
    ]


def queries_and_train(generated: Images, train: Images, device: Device, memory_mb: int) -> tuple[ImageRows, RealSet]:
    """Both sets, checked, on the device (by default that of the queries)."""
    queries = checked_queries(generated, "generated", device)
    real = RealSet(train, "train", queries.values.device, memory_mb)
    require_same_size(queries, real.distinct, "generated", "train")
    return queries, real


def checked_queries(images: Images, name: str, device: Device) -> ImageRows:
    """`image_rows` on the device (by default where they are)."""
    rows = _unit_rows(images, name)
    return rows if device is None else rows.to(torch.device(device))


def reference_set(reference: Images, train: RealSet, canaries: Tensor | None = None) -> RealSet:
    """The reference, checked against the training set; errors and warnings as in `calibrated_ratio`.

    canaries: rows int64 [n, repeats] of `train`, first occurrences; repeats of one that differ count as one image.
    """
    other = RealSet(reference, "reference", train.distinct.values.device, train.memory_mb)
    require_same_size(train.distinct, other.distinct, "train", "reference")
    if shared := train.keys & other.keys:
        raise ValueError(
            f"reference shares {len(shared)} images with train: use real images that were never trained on, "
            "else copies of the shared ones pass unnoticed"
        )
    distinct = len(train) - (0 if canaries is None else len(canaries.unique()) - len(canaries))
    if distinct != len(other):
        warnings.warn(
            f"train has {distinct} distinct images, reference {len(other)}: the calibrated ratio is only unbiased "
            "for sets of equal size (a smaller reference raises copy rate and floor, so give more images if you can)",
            stacklevel=3,
        )
    return other


def _unit_rows(images: Images, name: str) -> ImageRows:
    """`image_rows`, with a warning when they cannot be images in [0, 1]: mixed ranges hide every copy."""
    rows = image_rows(images, name)
    if rows.values.dtype != torch.uint8:
        low, high = (bound.item() for bound in torch.aminmax(rows.values))
        if low < -0.5 or high > 1.5:
            warnings.warn(
                f"{name} range over {low:.3g}..{high:.3g}, expected [0, 1]: rescale all sets alike", stacklevel=4
            )
    return rows


def _first_occurrence(rows: ImageRows) -> tuple[Tensor, Set[bytes]]:
    """int64 [N]: for every row, the first row with the same float32 values; and the distinct rows' digests."""
    seen: dict[bytes, int] = {}
    first = [seen.setdefault(key, row) for row, key in enumerate(content_keys(rows))]
    return torch.tensor(first), seen.keys()


def content_keys(rows: ImageRows) -> Iterator[bytes]:
    """A digest of every row's float32 values; adding 0 makes -0.0 and 0.0 the same image."""
    for tile in rows.tiles(max(1, KEY_ELEMENTS // rows.dim)):
        yield from (hashlib.sha256(row).digest() for row in (tile.float() + 0.0).cpu().numpy())
