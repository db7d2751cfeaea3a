"""What a proxy's training step costs over a bare loop: forward, backward, fused AdamW, EMA on the same batch.

    python -m benchmarks.step [--preset tiny] [--batch-size 32] [--side 8] [--precision fp32] [--compile]

Both loops are timed in turn, in blocks, in this one process and thread; the ratio of the medians counts. Ours does
more: it fetches images by ID, draws timesteps and noise, clips, gates by AGC, updates the bank and logs losses.
Precision is the bare loop's, too; `--compile` is ours alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.orders import first_order
from ret_fl.config import RunConfig
from ret_fl.data.store import SampleStore
from ret_fl.devices import resolve_device
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.objective import Objective, make_scheduler
from ret_fl.proxy import ProxyTrainer, Round
from ret_fl.trainer import half_precision


def bare_loop(config: RunConfig, store: SampleStore, device: torch.device) -> Callable[[int], None]:
    """The least that trains this model: the batch is on the device already."""
    unet = build_unet(config.model, store.image_shape, 0, 0).to(device, memory_format=torch.channels_last)
    objective = Objective(make_scheduler(config.diffusion), device, half=half_precision(config, device))
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema.decay))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.optimizer.lr, fused=device.type in ("cpu", "cuda"))
    images = objective.folded(store.fetch(torch.arange(config.batch_size), device)[0])

    def steps(count: int) -> None:
        for _ in range(count):
            t, noise = objective.draw(images)
            objective.losses(unet, images, t, noise, None).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(unet)

    return steps


def our_loop(config: RunConfig, store: SampleStore, device: torch.device) -> Callable[[int], None]:
    """The product's own step."""
    n = len(store)
    trainer = ProxyTrainer(config, store.image_shape, 0, device)
    trainer.load(trainer.weights(), None)
    order = first_order(config, store.fingerprint, np.arange(n))
    round_ = Round(trainer, order, store, "glyph")

    def steps(count: int) -> None:
        for _ in range(count):
            round_.batch(torch.randint(n, (config.batch_size,)))

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="model.preset (default: tiny)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--side", type=int, default=8, help="image side in pixels (default: 8)")
    parser.add_argument("--blocks", type=int, default=15, help="timed blocks of each loop (default: 15)")
    parser.add_argument("--steps", type=int, default=20, help="steps a block (default: 20)")
    parser.add_argument("--channels", type=int, default=1, help="of an image (default: 1)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    parser.add_argument("--compile", action="store_true", help="compile our U-Net first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve_device("auto")
    flat = {
        "model.preset": args.preset,
        "batch-size": args.batch_size,
        "model.pixel-unshuffle": 1,
        "precision": args.precision,
        "compile": args.compile,
    }
    config = RunConfig.from_flat(flat)
    shape = (4 * args.batch_size, args.channels, args.side, args.side)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    store = SampleStore(pixels)
    loops = {"bare": bare_loop(config, store, device), "proxy": our_loop(config, store, device)}
    # on a CPU the time this process worked, which other processes disturb less than the time on the wall
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in loops}
    for steps in loops.values():
        steps(5)
    for _ in range(args.blocks):
        for name, steps in loops.items():
            began = clock()
            steps(args.steps)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((clock() - began) / args.steps)
    pairs = [ours / bare for bare, ours in zip(times["bare"], times["proxy"], strict=True)]
    for name, seconds in times.items():
        step = statistics.median(seconds)
        speed = args.batch_size / step
        print(f"{name:>6}: {step * 1e3:8.2f} ms a step, {speed:,.0f} images/s (median of {args.blocks} blocks)")
    print(f" ratio: {statistics.median(pairs):8.3f} (median of pairs; {min(pairs):.3f} to {max(pairs):.3f})")


if __name__ == "__main__":
    main()
