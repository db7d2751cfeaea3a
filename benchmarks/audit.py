"""Speed and memory of the replication audit, as ratios measured in one run on this machine.

    python -m benchmarks.audit --images 10000

Compares `nearest` (exact, k neighbours) with the machine's own rate for the bare matrix product of the same size, and
with a loop in the manner of the reference implementation (broadcast difference, Python lists, a sort per query and
chunk; METHOD.md 6.14), measured on a few queries and scaled by the number of pairs. The peak memory of whole scores is
read from the operating system, in a process of their own.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ret_fl.audit.distances import MEMORY_MB, nearest
from ret_fl.audit.replication import copy_report, neighbour_ratio

LIST_QUERIES = 8
LIST_CHUNK = 500


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def product(queries: Tensor, points: Tensor, tile: int = 4096) -> None:
    """The matrix product inside the search, in tiles so that its result stays small."""
    for start in range(0, len(points), tile):
        queries @ points[start : start + tile].T


def list_loop(queries: Tensor, points: Tensor, k: int) -> list[list[float]]:
    """The k smallest squared distances per query, kept in Python lists that are sorted after every chunk."""
    smallest: list[list[float]] = [[] for _ in range(len(queries))]
    for start in range(0, len(points), LIST_CHUNK):
        chunk = points[start : start + LIST_CHUNK]
        distances = (queries[:, None] - chunk[None]).square().sum(-1).tolist()
        for row, new in enumerate(distances):
            smallest[row] = sorted(smallest[row] + new)[:k]
    return smallest


def measure(images: int, size: int, channels: int, k: int, repeats: int) -> Table:
    """Time the three ways on random images: uniform noise has the most crowded neighbourhoods there are."""
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(images, channels * size * size, generator=generator)
    generated = torch.rand(images, channels * size * size, generator=generator)
    few = min(LIST_QUERIES, images)
    found, _ = nearest(generated[:few], train, k)
    by_lists = torch.tensor(list_loop(generated[:few], train, k), dtype=torch.float64)
    if not torch.allclose(found, by_lists, rtol=1e-5):
        raise RuntimeError("nearest and the list loop disagree: the times below would mean nothing")

    # Other users of the machine add time unevenly: ratios are taken within a round, and their median counts.
    rounds = [
        (
            seconds(lambda: product(generated, train)),
            seconds(lambda: nearest(generated, train, k)),
            seconds(lambda: list_loop(generated[:few], train, k)) * images / few,
        )
        for _ in range(repeats)
    ]
    typical = [statistics.median(times) for times in zip(*rounds, strict=True)]
    shares = [statistics.median(spent[0] / spent[way] for spent in rounds) for way in range(3)]
    faster = statistics.median(lists / ours for _, ours, lists in rounds)
    table = Table(
        title=f"{images} x {images} images of {channels}x{size}x{size}, k={k}, {torch.get_num_threads()} threads"
    )
    for column in ("way", "seconds", "GFLOP/s", "share of product rate"):
        table.add_column(column, justify="left" if column == "way" else "right")
    names = ("matrix product", "nearest", f"list loop (from {few} queries)")
    for name, spent, share in zip(names, typical, shares, strict=True):
        rate = 2 * images * images * channels * size * size / spent / 1e9
        table.add_row(name, f"{spent:.2f}", f"{rate:.1f}", f"{share:.1%}")
    table.caption = f"medians of {repeats} rounds; nearest is {faster:.0f} times as fast as the list loop"
    return table


def peak_mb() -> float:
    """Most memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_above_data(dtype: torch.dtype, images: int, size: int, channels: int, k: int, memory_mb: int) -> float:
    """MB that two scores of `images` images in each set need at their peak, beyond the three sets themselves."""
    shape = (3, images, channels, size, size)
    data = torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape)
    generated, train, reference = data
    train[-1] = train[0]
    neighbour_ratio(generated[:64], train[: 4 * k], k, memory_mb=1)  # what the libraries load once
    before = peak_mb()
    neighbour_ratio(generated, train, k, memory_mb=memory_mb)
    copy_report(generated[: images // 20], train, reference[1:], variant="shift", memory_mb=memory_mb)
    return peak_mb() - before


def measure_memory(images: int, size: int, channels: int, k: int) -> Table:
    """Peak memory for some settings, each in a fresh process."""
    table = Table(title=f"peak memory above the data, three sets of {images} images of {channels}x{size}x{size}")
    for column in ("images are", "memory_mb", "measured MB"):
        table.add_column(column, justify="left" if column == "images are" else "right")
    for dtype, memory_mb in ((torch.uint8, 64), (torch.uint8, MEMORY_MB), (torch.float32, MEMORY_MB)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            spent = pool.apply(memory_above_data, (dtype, images, size, channels, k, memory_mb))
        table.add_row(str(dtype).removeprefix("torch."), str(memory_mb), f"{spent:.0f}")
    return table


def main() -> None:
    """Read the options, measure, print the tables."""
    parser = argparse.ArgumentParser(
        description="Speed and memory of the replication audit against this machine's matrix product."
    )
    parser.add_argument("--images", type=int, default=4000, help="generated and training images each (default 4000)")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (default 32)")
    parser.add_argument("--channels", type=int, default=3, help="channels (default 3)")
    parser.add_argument("--k", type=int, default=50, help="neighbours (default 50)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    options = parser.parse_args()
    size, channels, k = options.size, options.channels, options.k
    # Memory first: a process inherits the peak of the one that starts it.
    if not options.no_memory:
        Console().print(measure_memory(options.images, size, channels, k))
    Console().print(measure(options.images, size, channels, k, options.repeats))


if __name__ == "__main__":
    main()
