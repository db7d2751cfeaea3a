"""Exact nearest neighbours in squared L2 distance, at the speed of a matrix product and within a memory bound."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Images = Tensor | np.ndarray

# Candidates kept beyond k, so that rounding in the float32 product seldom forces a second, wider search.
SPARE_CANDIDATES = 14
MEMORY_MB = 512
# Rows that one thread gathers for direct distances should stay in its cache: five times faster than streaming them.
CACHE_ELEMENTS = 2**18
MAX_TILE = (2048, 8192)
# BLAS writes a result whose rows start at 64-byte boundaries up to 1.5 times as fast as any other.
ALIGNED_FLOATS = 16
# Relative rounding of each factor of a float32 product, by torch.set_float32_matmul_precision (float32, TF32, bf16).
FACTOR_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-9}


@dataclass(frozen=True)
class ImageRows:
    """A view of images as float rows, converted piece by piece: uint8 images are never held as floats at once.

    values: uint8 or float [N, D]. rows: int64 [M], which of them count, in this order; None is all. columns: int64
    [D], the pixel that each pixel of a moved image comes from; None is unmoved. A view of M rows has length M.
    """

    values: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values if self.rows is None else self.rows)

    @property
    def dim(self) -> int:
        """Pixels times channels."""
        return self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What `read` gives: float64 for float64 images, else float32."""
        return torch.float64 if self.values.dtype == torch.float64 else torch.float32

    def read(self, index: slice | Tensor) -> Tensor:
        """Rows by slice or int64 [n]: float [n, D], uint8 divided by 255. May share memory where given a slice."""
        if self.rows is not None:
            index = self.rows[index]
        picked = self.values[index] if isinstance(index, slice) else self.values.index_select(0, index)
        if self.columns is not None:
            picked = picked.index_select(1, self.columns)
        return picked.float().div_(255) if picked.dtype == torch.uint8 else picked.to(self.dtype)

    def tiles(self, size: int) -> Iterator[Tensor]:
        """All rows in order, `size` of them at a time."""
        return (self.read(slice(start, start + size)) for start in range(0, len(self), size))

    def to(self, device: torch.device) -> "ImageRows":
        """The same view on another device; moves the values as they are."""
        rows, columns = (None if index is None else index.to(device) for index in (self.rows, self.columns))
        return ImageRows(self.values.to(device), rows, columns)


def image_rows(images: Images, name: str = "images") -> ImageRows:
    """Check images and view each as one row, without a copy where they are contiguous.

    Args:
        images: [N, C, H, W], or anything that flattens to [N, D]; float in [0, 1], or uint8 (divided by 255).
        name: how error messages call them.

    Raises:
        ValueError: no images, no pixels, a dtype that is neither float nor uint8, or values that are not finite.
    """
    values = torch.as_tensor(images)
    if values.ndim < 2 or values.numel() == 0:
        raise ValueError(f"{name} must be a non-empty [N, C, H, W] or [N, D] array, got shape {tuple(values.shape)}")
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise ValueError(f"{name} must be float in [0, 1] or uint8, got {values.dtype}: convert them first")
    if values.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        bad = sum(int((~torch.isfinite(part)).flatten(1).any(1).sum()) for part in values.split(MAX_TILE[0]))
        raise ValueError(f"{name} hold NaN or infinity in {bad} of {len(values)} rows: drop or clip them first")
    return ImageRows(values.detach().flatten(1))


def pixel_rows(images: Images, name: str = "images") -> Tensor:
    """All of `image_rows` as floats at once: float32 [N, D] (float64 if the input is), on the input's device."""
    return image_rows(images, name).read(slice(None))


def require_same_size(a: Tensor | ImageRows, b: Tensor | ImageRows, name_a: str, name_b: str) -> None:
    """Raise ValueError unless rows of `a` and `b` ([N, D]) have the same number of pixels."""
    dim_a, dim_b = (rows.dim if isinstance(rows, ImageRows) else rows.shape[1] for rows in (a, b))
    if dim_a != dim_b:
        raise ValueError(f"{name_a} have {dim_a} values each and {name_b} {dim_b}: bring both to one size")


def nearest(
    queries: Images | ImageRows,
    points: Images | ImageRows,
    k: int,
    *,
    device: torch.device | str | None = None,
    memory_mb: int = MEMORY_MB,
) -> tuple[Tensor, Tensor]:
    """The k nearest points of every query in squared L2 distance, exact, ties to the lower index.

    A float32 matrix product proposes candidates; their distances are then computed directly as sum((g - x)^2), summed
    in float64, so a copy has distance exactly 0. A query is settled only when the worst-case rounding of the product
    cannot hide a closer point, else it is searched again with more candidates. So the answer depends neither on the
    tile size nor on the order of the points.

    Args:
        queries: [G, ...] and
        points: [N, ...], as in `image_rows` (or made by it), with the same number of pixels.
        k: neighbours per query, 1 <= k <= N.
        device: where to compute; by default where `queries` are. The images are moved there whole, as they are.
        memory_mb: bound on the tensors held beyond inputs and outputs, as long as 30 images fit in it. BLAS buffers
            and freed memory that the C library keeps come on top: some 100 MB, whatever the sizes.

    Returns:
        Squared distances float64 [G, k], ascending, and indices int64 [G, k] into `points`, both on the CPU.

    Raises:
        ValueError: images of different sizes, k outside 1..N, memory_mb < 1, or bad images (see `image_rows`).
    """
    q = queries if isinstance(queries, ImageRows) else image_rows(queries, "queries")
    p = points if isinstance(points, ImageRows) else image_rows(points, "points")
    require_same_size(q, p, "queries", "points")
    if not 1 <= k <= len(p):
        raise ValueError(f"k must lie in 1..{len(p)}, the number of points, got {k}")
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be >= 1, got {memory_mb}")
    place = torch.device(device) if device is not None else q.values.device
    if place.type == "mps":  # has no float64
        place = torch.device("cpu")
    q, p = q.to(place), p.to(place)
    elements = memory_mb * 2**20 // 8
    # Distances do not change, but smaller norms cancel less in float32.
    centre = torch.zeros(p.dim, dtype=torch.float64, device=place)
    for tile in p.tiles(_points_tile(p, elements)):
        centre += tile.sum(0)
    centre /= len(p)

    distances = torch.empty(len(q), k, dtype=torch.float64)
    indices = torch.empty(len(q), k, dtype=torch.int64)
    open_rows, width = torch.arange(len(q)), min(len(p), k + SPARE_CANDIDATES)
    while len(open_rows):
        still_open = []
        for rows in open_rows.split(max(1, elements // (8 * max(width, q.dim)))):
            found, index, settled = _search(q.read(rows.to(place)), p, centre, k, width, elements)
            distances[rows], indices[rows] = found.cpu(), index.cpu()
            still_open.append(rows[~settled.cpu()])
        open_rows, width = torch.cat(still_open), min(len(p), 4 * width)
    return distances, indices


def _search(
    q: Tensor, p: ImageRows, centre: Tensor, k: int, width: int, elements: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [G, k], indices [G, k], and bool [G]: whether no point outside the candidates can belong to them."""
    if width == len(p):
        index = torch.arange(width, device=q.device).expand(len(q), width)
        floor = torch.full((len(q),), math.inf, dtype=torch.float64, device=q.device)
    else:
        index, floor = _candidates(q, p, centre, width, elements)
        index = index.sort(dim=1).values
    exact, order = _direct_distances(q, p, index, elements).sort(dim=1, stable=True)
    return exact[:, :k], index.gather(1, order[:, :k]), floor > exact[:, k - 1]


def _points_tile(p: ImageRows, elements: int) -> int:
    return min(len(p), MAX_TILE[1], max(1, elements // (4 * p.dim)))


def _candidates(q: Tensor, p: ImageRows, centre: Tensor, width: int, elements: int) -> tuple[Tensor, Tensor]:
    """int64 [G, width]: the points with the smallest |x|^2 - 2gx; float64 [G]: a lower bound on D to all others."""
    dim, tile_p = p.dim, _points_tile(p, elements)
    stride = -(-tile_p // ALIGNED_FLOATS) * ALIGNED_FLOATS
    tile_q = min(len(q), MAX_TILE[0], max(1, elements // (4 * max(dim, stride))))
    product = q.new_empty(tile_q, stride, dtype=torch.float32)
    centre = centre.to(torch.promote_types(q.dtype, p.dtype))
    best = q.new_full((len(q), width), math.inf, dtype=torch.float32)
    index = torch.zeros(len(q), width, dtype=torch.int64, device=q.device)
    q_norm = torch.empty(len(q), dtype=torch.float64, device=q.device)
    p_norm = torch.zeros((), dtype=torch.float64, device=q.device)
    start = 0
    for tile in p.tiles(tile_p):
        x = (tile - centre).float()
        xx = x.square().sum(1)
        p_norm = torch.maximum(p_norm, xx.max().double().sqrt())
        for row in range(0, len(q), tile_q):
            rows = slice(row, row + tile_q)
            g = (q[rows] - centre).float()
            q_norm[rows] = g.square().sum(1).double().sqrt()
            scores = torch.addmm(xx, g, x.T, alpha=-2, out=product[: len(g), : len(x)])
            near = scores.topk(min(width, len(x)), largest=False, sorted=False)
            values, seen = torch.cat([best[rows], near.values], 1), torch.cat([index[rows], near.indices + start], 1)
            best[rows], kept = values.topk(width, largest=False, sorted=False)
            index[rows] = seen.gather(1, kept)
        start += len(x)
    # Worst case of float32 sums of products in any order (Higham 2002, section 3.1), plus the rounding of centring.
    factor = FACTOR_ROUNDING[torch.get_float32_matmul_precision()]
    error = 2.0**-24 * (dim + 8) * (q_norm + p_norm) ** 2 + 4 * factor * q_norm * p_norm
    return index, best.max(1).values.double() + q_norm**2 - error


def _direct_distances(q: Tensor, p: ImageRows, index: Tensor, elements: int) -> Tensor:
    """float64 [G, M]: sum((g - x)^2) for the points of `index` [G, M]."""
    count, dim = index.shape[1], p.dim
    dtype = torch.promote_types(q.dtype, p.dtype)
    on_cpu = q.device.type == "cpu"
    scratch = min(elements // (4 * torch.get_num_threads()), CACHE_ELEMENTS) if on_cpu else elements // 2
    cols = min(count, max(1, scratch // dim))
    rows = max(1, scratch // (cols * dim))
    exact = torch.empty(index.shape, dtype=torch.float64, device=q.device)

    def fill(row: int) -> None:
        g = q[row : row + rows, None]
        for col in range(0, count, cols):
            picked = index[row : row + rows, col : col + cols]
            gap = p.read(picked.flatten()).to(dtype).view(*picked.shape, dim).sub_(g).square_()
            exact[row : row + rows, col : col + cols] = gap.sum(-1, dtype=torch.float64)

    if on_cpu:
        # Torch's own threads would meet after each of these small steps, which costs seconds on a busy machine.
        with one_thread_operations() as threads, ThreadPoolExecutor(threads) as pool:
            deque(pool.map(fill, range(0, len(q), rows)), maxlen=0)
    else:
        for row in range(0, len(q), rows):
            fill(row)
    return exact


@contextmanager
def one_thread_operations() -> Iterator[int]:
    """Torch runs each operation on the thread that calls it; yields the number of threads it was allowed before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
