"""What each preset costs: parameters, memory, FLOPs, and the time of the whole recipe at the speed of a step here.

    python -m benchmarks.recipes [PRESET ...] [--gpu A100] [--utilization 0.2] [--no-step]

Parameters, FLOPs and bytes are counted on the real model (torch's FlopCounterMode; tensors saved for the backward pass)
and need no GPU. The step is the product's own (ret_fl/proxy.py), with the recipe's batch on a GPU and with a few images
on a CPU. Hours on a GPU that is not here are an estimate: FLOPs over the GPU's peak times an assumed utilization.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.orders import first_order
from ret_fl.config import ConfigError, RunConfig
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore
from ret_fl.devices import resolve_device
from ret_fl.diffusion.models import build_unet, fold_factor
from ret_fl.presets import FOLDER
from ret_fl.proxy import ProxyTrainer, Round
from ret_fl.sections import DISK_SOURCES
from ret_fl.settings import read_preset

GPUS = {"A100": 312e12, "H100": 989e12}
"""Peak FLOP/s of dense bfloat16, as NVIDIA's data sheets have it."""
UTILIZATION = 0.2
"""Share of the peak that is assumed, not measured: small images and group norms keep a GPU far from it."""
CPU_IMAGES = 2
ADAM_COPIES = 5
"""float32 values a parameter: weight, EMA, gradient, and Adam's two moments."""


@dataclass(frozen=True)
class Facts:
    """What a recipe is told of its data: distinct training images, their shape (C, H, W), classes."""

    images: int
    shape: tuple[int, int, int]
    classes: int = 0


KNOWN = {
    "cifar10": Facts(50_000, (3, 32, 32), 10),
    "cifar100": Facts(50_000, (3, 32, 32), 100),
    "afhq-dog": Facts(4739, (3, 64, 64)),
    "fine-tune": Facts(4739, (3, 64, 64)),  # as if AFHQ-DOG were fine-tuned on
}
"""Data that a recipe is about, for where it is not on this machine."""


@dataclass(frozen=True)
class Cost:
    """Of one proxy. flops: forward and backward of one image. saved: bytes kept of one image for the backward pass."""

    parameters: int
    flops: int
    saved: int


def facts_of(name: str, config: RunConfig) -> Facts:
    """From the data, where it is here, else what is known of it. Raises `ConfigError` where neither is."""
    here = config.data.source not in DISK_SOURCES or Path(config.data.path).expanduser().exists()
    known = KNOWN.get(name.removesuffix("-central"))
    if here or known is None:
        train = load_splits(config.data).train
        return Facts(len(train), train.image_shape, train.num_classes)
    return known


def without_weights(config: RunConfig) -> RunConfig:
    """A pretrained folder that is not here is replaced by the preset's U-Net, which is as large."""
    if not config.model.init_from or Path(config.model.init_from).is_dir():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"init_from": ""})})


def cost_of(config: RunConfig, facts: Facts) -> Cost:
    """Counted on the meta device: nothing is computed."""
    config = without_weights(config)
    fold = fold_factor(config.model, facts.shape)
    channels, height, width = facts.shape
    with torch.device("meta"):
        unet = build_unet(config.model, facts.shape, facts.classes, 0).train()
        images = torch.empty(1, channels * fold**2, height // fold, width // fold)
        t, labels = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        held.append(tensor)  # so that no storage's number is given to another one
        return tensor

    held: list[Tensor] = []
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predicted = unet(
                images, t, class_labels=labels if config.model.class_conditional else None, return_dict=False
            )[0]
        predicted.square().mean().backward()
    return Cost(unet.num_parameters(), counter.get_total_flops(), sum(saved.values()))


def images_seen(config: RunConfig, facts: Facts) -> int:
    """Images all shards train on together. Two-pass TAA's re-draws are among them (ret_fl/proxy.py)."""
    return config.num_server_rounds * config.local_epochs * facts.images


def size_text(config: RunConfig, facts: Facts, cost: Cost, gpu: str = "A100", utilization: float = UTILIZATION) -> str:
    """The `Size:` of a preset's header: what is computed, and what is assumed."""
    state, kept = ADAM_COPIES * 4 * cost.parameters / 1e9, config.batch_size * cost.saved / 1e9
    seen = images_seen(config, facts)
    flops = seen * cost.flops
    return (
        f"{cost.parameters / 1e6:.1f} M parameters, {seen / 1e6:.3g} M images seen, {flops:.1e} FLOP. Estimates, not "
        f"measured: {state:.2g} GB of GPU memory for weights, EMA, gradients and Adam and {kept:.2g} GB for a batch's "
        f"activations in float32 (bf16 about half); {_duration(flops / (GPUS[gpu] * utilization))} on an {gpu} at an "
        f"assumed {100 * utilization:g} % of its {GPUS[gpu] / 1e12:.0f} TFLOP/s"
    )


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours:.1f} hours" if hours >= 0.1 else "less than 0.1 hours"


def measured_step(config: RunConfig, facts: Facts, device: torch.device, steps: int) -> tuple[float, int, float]:
    """Images a second of the product's own step, the batch it had, and the GPU memory it took at most (GB; CPU: 0)."""
    batch = config.batch_size if device.type != "cpu" else min(CPU_IMAGES, config.batch_size)
    config = without_weights(config).model_copy(update={"batch_size": batch})
    pixels = torch.randint(256, (4 * batch, *facts.shape), dtype=torch.uint8)
    labels = torch.arange(4 * batch) % facts.classes if facts.classes else None
    store = SampleStore(pixels, labels, facts.classes)
    trainer = ProxyTrainer(config, facts.shape, facts.classes, device)
    trainer.load(trainer.weights(), None)
    round_ = Round(trainer, first_order(config, store.fingerprint, np.arange(len(store))), store, "photo")

    # on a CPU the time this process worked, which other processes disturb less than the time on the wall
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def run(count: int) -> float:
        began = clock()
        for _ in range(count):
            round_.batch(torch.randint(len(store), (batch,)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    run(1 if device.type == "cpu" else 5)
    before = round_.images
    seconds = run(steps)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return (round_.images - before) / seconds, batch, memory


def report(path: Path, device: torch.device, args: argparse.Namespace) -> None:
    name, config = path.stem, RunConfig.from_flat(read_preset(path))
    try:
        facts = facts_of(name, config)
    except ConfigError as error:
        print(f"{name}: not computed: {error}\n")
        return
    cost = cost_of(config, facts)
    print(f"{name}: {facts.images:,} images of {'x'.join(map(str, facts.shape))}, batch {config.batch_size}")
    print(f"  {cost.flops / 1e9:.2f} GFLOP and {cost.saved / 1e6:.1f} MB saved an image, forward and backward")
    print(f"  Size: {size_text(config, facts, cost, args.gpu, args.utilization)}")
    if not args.no_step:
        speed, batch, memory = measured_step(config, facts, device, args.steps)
        whole = _duration(images_seen(config, facts) / speed)
        where = "one thread of this CPU" if device.type == "cpu" else str(device)
        print(f"  measured on {where}: {speed:,.1f} images/s with batches of {batch}; the whole recipe: {whole}")
        if memory:
            print(f"  measured on {device}: {memory:.1f} GB at most")
        if device.type == "cpu":
            print("  (a CPU, and so small a batch, say little of a GPU: run this on the GPU for a useful estimate)")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="names, such as cifar10; default: all")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="A100", help="for the estimate (default: A100)")
    parser.add_argument("--utilization", type=float, default=UTILIZATION, help="assumed share of its peak")
    parser.add_argument("--device", default="auto", help="where the step is measured")
    parser.add_argument("--steps", type=int, default=3, help="steps timed (default: 3)")
    parser.add_argument("--no-step", action="store_true", help="count only, train nothing")
    args = parser.parse_args()
    device = resolve_device(args.device)
    torch.set_num_threads(1)
    every = {path.stem: path for path in sorted(FOLDER.glob("*.toml"), key=lambda p: p.stem)}
    for name in args.presets or every:
        if name not in every:
            parser.error(f"no preset {name!r}: there are {', '.join(every)}")
        report(every[name], device, args)


if __name__ == "__main__":
    main()
