"""What finding near-duplicates finds on the built-in data, and what it costs: python -m benchmarks.near_duplicates

First, for each source: the share of its distinct images that have another one alike at a threshold (they are false
alarms, but for glyphs of related fonts and neighbouring patches of one photograph), and the share of noisy copies that
are found to be like another noisy copy of the same image. Then seconds and peak memory for many images of 3x32x32.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time

import numpy as np
import torch

from ret_fl.config import DataConfig
from ret_fl.data.clusters import find_clusters
from ret_fl.data.near import perceptual_hashes, pixel_features
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore

SOURCES = ("digits", "mnist", "glyphs", "patches", "faces")
COSINES = (0.95, 0.98, 0.99)
BITS = (0, 2, 4)
JITTER = (4, 8, 16)


def noisy(pixels: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 of the same shape, with noise in grey levels."""
    return np.rint(pixels + rng.normal(0, deviation, pixels.shape)).clip(0, 255).astype(np.uint8)


def unit(pixels: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(pixel_features(torch.from_numpy(pixels)), dim=1)


def told(title: str, shares: list[float]) -> str:
    return f"{title:<34}" + "".join(f"{share:>9.1%}" for share in shares)


def report(source: str, rng: np.random.Generator) -> None:
    """Print what is alike in a source, and how many noisy copies are found."""
    config = DataConfig.model_validate({"source": source, "held_out": 0, "reference": False})
    store = load_splits(config).train
    pixels = store.pixels(np.sort(np.unique(store.content_hashes, return_index=True)[1])).numpy()
    print(f"{source}: {len(pixels):,} distinct images; cosine of pixels >= {COSINES}, pHash bits <= {BITS}")
    rows, hashes = unit(pixels), torch.from_numpy(perceptual_hashes(pixels)).float() * 2 - 1
    cosine, agreement = rows @ rows.T, hashes @ hashes.T
    cosine.fill_diagonal_(-1)
    agreement.fill_diagonal_(-64)
    nearest, bits = cosine.amax(1), (64 - agreement.amax(1)) / 2
    alike = [float((nearest >= c).double().mean()) for c in COSINES]
    print(told("  have another one alike", alike + [float((bits <= b).double().mean()) for b in BITS]))
    for deviation in JITTER:
        pair = [noisy(pixels, deviation, rng) for _ in range(2)]
        product = (unit(pair[0]) * unit(pair[1])).sum(1)
        differ = (perceptual_hashes(pair[0]) != perceptual_hashes(pair[1])).sum(1)
        found = [float((product >= c).double().mean()) for c in COSINES]
        print(told(f"  copies with noise {deviation} found", found + [float((differ <= b).mean()) for b in BITS]))


def timed(count: int, rng: np.random.Generator) -> None:
    """Print what clusters of `count` random images cost, one in ten of them a noisy copy."""
    pixels = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    pixels[: count // 10] = noisy(pixels[-(count // 10) :], 8, rng)
    for how in ("cosine", "phash"):
        began = time.monotonic()
        store = SampleStore(pixels)
        with tempfile.TemporaryDirectory() as cache:
            found = find_clusters(store, DataConfig.model_validate({"near_duplicates": how, "cache_dir": cache}))
        seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        clusters = len(np.unique(found))
        print(f"{how}: {count:,} images in {clusters:,} clusters: {seconds:.0f} s, at most {peak:.1f} GB so far")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="images of the timing (default: 50000); 0: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for source in SOURCES:
        report(source, rng)
    if args.count:
        timed(args.count, rng)


if __name__ == "__main__":
    main()
