"""A proxy's U-Net, its EMA and its optimizer on one device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ret_fl.config import ConfigError, RunConfig
from ret_fl.diffusion.proxymodel import load_trained, open_model, trained_parameters
from ret_fl.packing import State
from ret_fl.proxystate import Moments


def half_precision(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None: float32 throughout."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" or (config.precision == "auto" and native):
        return torch.bfloat16
    return torch.float16 if config.precision == "fp16" else None


def state_of(raw: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None) -> State:
    """Raw and EMA weights as they travel: float32 copies on the CPU; without an EMA the raw ones are the result."""
    parts = {"raw.": raw} | ({"ema.": ema} if ema is not None else {})
    return {
        # a copy: on the CPU the tensor is the model itself, which trains on
        prefix + name: value.detach().cpu().contiguous().numpy().copy()
        for prefix, part in parts.items()
        for name, value in part.items()
    }


def part_of(state: State, prefix: str) -> dict[str, Tensor]:
    """The weights of a state under 'raw.' or 'ema.', by name; with ema.decay=0 there are raw ones only."""
    held = prefix if any(name.startswith(prefix) for name in state) else "raw."
    return {name.removeprefix(held): torch.from_numpy(v) for name, v in state.items() if name.startswith(held)}


class ProxyTrainer:
    """The model of a run on one device, used again for every order.

    Raises `ConfigError` where the model does not fit the images, or the optimizer the device.
    """

    def __init__(
        self, config: RunConfig, image_shape: tuple[int, int, int], num_classes: int, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.model = open_model(config, image_shape, num_classes)
        half = half_precision(config, device)
        self.objective = self.model.objective(device, half)
        unet = self.model.unet.to(device)
        self.unet = unet.to(memory_format=torch.channels_last) if self.objective.channels_last else unet
        if config.model.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.forward: nn.Module = torch.compile(self.unet) if config.compile else self.unet  # type: ignore[assignment]
        self.parameters = trained_parameters(self.unet)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema.decay else None
        self.optimizer = make_optimizer(config, list(self.parameters.values()), device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
        self.step_count = 0
        self.rate = config.optimizer.lr
        self.anchor: list[Tensor] | None = None

    @torch.no_grad()
    def _update_ema(self, took_step: Tensor) -> None:
        # not torch's AveragedModel: its counter on the CPU costs a wait for the GPU at every step. The weight is a
        # tensor, so that a skipped batch leaves the EMA alone without asking the GPU either
        if self.ema is None:
            return
        ema, current = list(self.ema.values()), [p.detach() for p in self.parameters.values()]
        weight = (1 - self.config.ema.decay) * took_step
        difference = torch._foreach_sub(current, ema)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(ema, difference)

    def load(self, weights: State, moments: Moments | None) -> None:
        """Take over weights ('raw.*' and 'ema.*') and Adam's moments; without moments the warm-up starts anew."""
        load_trained(self.unet, part_of(weights, "raw."))
        if self.ema is not None:
            for name, value in part_of(weights, "ema.").items():
                self.ema[name].copy_(value)
        self.optimizer.state.clear()
        # what an order comes to does not hang on the orders before it
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.step_count = moments.step if moments else 0
        if moments:
            for name, parameter in self.parameters.items():
                self.optimizer.state[parameter] = moments.of(name, parameter)

    def stay_near(self, weights: State) -> None:
        """FedProx: pull steps towards the raw weights of a state by `optimizer.proximal-mu`; at 0 nothing is done."""
        if self.config.optimizer.proximal_mu:
            near = part_of(weights, "raw.")
            self.anchor = [near[name].to(self.device) for name in self.parameters]

    @torch.no_grad()
    def _add_proximal_gradient(self) -> None:
        """grad += mu (w - w_global), of the term mu / 2 |w - w_global|^2 that FedProx adds to the loss."""
        if self.anchor is None:
            return
        for parameter, near in zip(self.parameters.values(), self.anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - near, alpha=self.config.optimizer.proximal_mu)

    def weights(self) -> State:
        """The raw and EMA weights as float32 arrays."""
        return state_of(self.parameters, self.ema)

    def moments(self) -> Moments:
        state = self.optimizer.state
        return Moments.gathered(self.step_count, {name: state[p] for name, p in self.parameters.items() if p in state})

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss (scalar) to those of the step to come."""
        self.scaler.scale(loss).backward()

    def step(self, any_kept: Tensor, divisor: Tensor | None = None) -> None:
        """Proximal term, clip, AdamW, EMA. Where nothing was kept (bool scalar) weights, moments and EMA stay.

        divisor: what gradients are divided by first, where losses were summed up rather than averaged.
        """
        settings = self.config.optimizer
        self.step_count += 1
        warm = min(1.0, self.step_count / settings.warmup_steps) if settings.warmup_steps else 1.0
        self.optimizer.param_groups[0]["lr"] = self.rate * warm
        took_step = any_kept.float()
        self.scaler.unscale_(self.optimizer)
        if divisor is not None:
            torch._foreach_div_([p.grad for p in self.parameters.values() if p.grad is not None], divisor)
        self._add_proximal_gradient()
        if settings.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.parameters.values(), settings.grad_clip)
        if self.scaler.is_enabled():
            took_step = took_step * self._scaled_step(any_kept)
        elif self.optimizer.defaults.get("fused"):
            # the hook GradScaler uses: the fused kernel itself passes over the step, without a host sync
            self.optimizer.found_inf = 1 - took_step  # type: ignore[attr-defined]
            self.optimizer.step()
        elif any_kept:
            self.optimizer.step()
        self._update_ema(took_step)
        self.optimizer.zero_grad()

    def _scaled_step(self, any_kept: Tensor) -> float:
        """A step under fp16: 0 where the gradients overflowed, so that it was left out and the scale lowered."""
        scale = self.scaler.get_scale()
        if any_kept:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(self.scaler.get_scale() >= scale)


def make_optimizer(config: RunConfig, parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.kind` names. Raises `ConfigError` where it cannot run here."""
    settings = config.optimizer
    if settings.kind == "adamw":
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    if device.type != "cuda":
        raise ConfigError(f"optimizer.kind=adamw-8bit needs a CUDA GPU, this is {device}: set optimizer.kind=adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer.kind=adamw-8bit needs bitsandbytes: pip install 'ret-fl[eight-bit]', or set optimizer.kind=adamw"
        ) from None
    return AdamW8bit(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
