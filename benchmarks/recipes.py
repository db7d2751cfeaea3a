"""What each preset costs: parameters, memory, FLOPs, and the time of the whole recipe at the speed of a step here.

    python -m benchmarks.recipes [PRESET ...] [--gpu A100] [--utilization 0.2] [--no-step]

Parameters, FLOPs and bytes are counted on the real model (torch's FlopCounterMode; tensors saved for the backward pass)
and need no GPU. The step is the product's own (ret_fl/proxy.py), with the recipe's batch on a GPU and with a few images
on a CPU; of Stable Diffusion none is taken here. Hours on a GPU that is not here are an estimate: FLOPs over the GPU's
peak times an assumed utilization, the same for all recipes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.orders import first_order
from benchmarks.text_to_image import SIZES
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
ADAM_COPIES = 4
"""float32 values a parameter: weight, gradient, and Adam's two moments; an EMA is one more."""
TOKENS = 77
"""Of a caption, as Stable Diffusion's text encoder pads it."""


@dataclass(frozen=True)
class Facts:
    """What a recipe is told of its data: distinct training images, their shape (C, H, W), classes.

    text: the Stable Diffusion that is fine-tuned on them, one of `SIZES`; '': a model of pixels.
    """

    images: int
    shape: tuple[int, int, int]
    classes: int = 0
    text: str = ""


KNOWN = {
    "cifar10": Facts(50_000, (3, 32, 32), 10),
    "cifar100": Facts(50_000, (3, 32, 32), 100),
    "afhq-dog": Facts(4739, (3, 64, 64)),
    "fine-tune": Facts(4739, (3, 64, 64)),  # as if AFHQ-DOG were fine-tuned on
    "laion-10k-sd21": Facts(10_000, (3, 256, 256), text="sd21"),
}
"""Data that a recipe is about, for where it is not on this machine."""


@dataclass(frozen=True)
class Cost:
    """Of one proxy and one image.

    flops: forward and backward. saved: bytes kept for the backward pass. forward: FLOPs of it alone. encoding,
    decoding: FLOPs between pixels and latents.
    """

    parameters: int
    flops: int
    saved: int
    forward: int
    encoding: int = 0
    decoding: int = 0


def facts_of(name: str, config: RunConfig) -> Facts:
    """From the data, where it is here, else what is known of it. Raises `ConfigError` where neither is."""
    path = config.data.path
    here = config.data.source not in DISK_SOURCES or bool(path and Path(path).expanduser().exists())
    known = KNOWN.get(name.removesuffix("-central"))
    if known is None or (here and not known.text):
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
    if facts.text:
        return _cost_of_text_to_image(facts)
    config = without_weights(config)
    fold = fold_factor(config.model, facts.shape)
    channels, height, width = facts.shape
    with torch.device("meta"):
        unet = build_unet(config.model, facts.shape, facts.classes, 0).train()
        images = torch.empty(1, channels * fold**2, height // fold, width // fold)
        t, labels = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return _cost_of(unet, images, t, class_labels=labels if config.model.class_conditional else None)


def _cost_of_text_to_image(facts: Facts) -> Cost:
    """Of the U-Net that trains, and of the VAE before and behind it. The text encoder is small beside both."""
    blocks = (128, 256, 512, 512)
    width = SIZES[facts.text]["cross_attention_dim"]
    _, height, side = facts.shape
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=side // 8, **SIZES[facts.text]).train()
        vae = AutoencoderKL(
            latent_channels=4, block_out_channels=blocks, layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * len(blocks), up_block_types=("UpDecoderBlock2D",) * len(blocks),
        )  # fmt: skip
        latents, told = torch.empty(1, 4, height // 8, side // 8), torch.empty(1, TOKENS, width)
        t, pixels = torch.zeros(1, dtype=torch.int64), torch.empty(1, *facts.shape)
    cost = _cost_of(unet, latents, t, encoder_hidden_states=told)
    return replace(cost, encoding=_flops(vae.encode, pixels), decoding=_flops(vae.decode, latents))


@torch.no_grad()
def _flops(network: Callable[[Tensor], object], inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(inputs)
    return counter.get_total_flops()


def _cost_of(unet: ModelMixin, images: Tensor, t: Tensor, **condition: Tensor | None) -> Cost:
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
            predicted = unet(images, t, **condition, return_dict=False)[0]
        forward = counter.get_total_flops()
        predicted.square().mean().backward()
    return Cost(unet.num_parameters(), counter.get_total_flops(), sum(saved.values()), forward)


def images_seen(config: RunConfig, facts: Facts) -> int:
    """Images all shards train on together. Two-pass TAA's re-draws are among them (ret_fl/proxy.py)."""
    by_steps = config.shards * config.local_steps * config.batch_size
    return config.num_server_rounds * (by_steps or config.local_epochs * facts.images)


def flops_of_samples(config: RunConfig, cost: Cost) -> int:
    """To draw the samples of the end; with guidance each step is taken with and without the prompt."""
    passes = 2 if cost.decoding and config.text.guidance > 1 else 1
    return config.samples * (config.sample_steps * passes * cost.forward + cost.decoding)


def size_text(config: RunConfig, facts: Facts, cost: Cost, gpu: str = "A100", utilization: float = UTILIZATION) -> str:
    """The `Size:` of a preset's header: what is computed, and what is assumed."""
    ema = "EMA, " if config.ema.decay else ""
    state = 4 * (ADAM_COPIES + bool(ema)) * cost.parameters / 1e9
    kept = config.batch_size * cost.saved / 1e9
    seen = images_seen(config, facts)
    peak = GPUS[gpu]

    def hours(flops: float) -> str:
        return _duration(flops / (peak * utilization))

    encoding = ""
    if facts.text:
        latents = facts.images * (2 if config.data.flip else 1)
        encoding = f", {hours(latents * cost.encoding)} for {latents:,} latents"
        if config.taa.mode != "off":
            encoding += f" ({hours(seen * cost.encoding)} more if TAA augments every image)"
    return (
        f"{cost.parameters / 1e6:.1f} M parameters, {seen / 1e6:.3g} M images seen of {facts.images:,} training "
        f"images, {seen * cost.flops:.1e} FLOP. Estimates, not measured: {state:.2g} GB of GPU memory for weights, "
        f"{ema}gradients and Adam and {kept:.2g} GB for a batch's activations in float32 (bf16 about half); on an "
        f"{gpu} at an assumed {100 * utilization:g} % of its {peak / 1e12:.0f} TFLOP/s {hours(seen * cost.flops)} of "
        f"training{encoding} and {hours(flops_of_samples(config, cost))} for {config.samples:,} samples"
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
    if facts.text:
        print("  no step is measured here: set num-server-rounds and local-steps to a few, and time the run itself")
    elif not args.no_step:
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
