"""How fast a node trains, measured before it gets work: what `partition.sizes = speed` deals shards by."""

from __future__ import annotations

import time

import torch

from ret_fl.proxy import Draw
from ret_fl.trainer import ProxyTrainer

STEPS = 8
WARM_UP = 2


def images_per_second(trainer: ProxyTrainer, image_shape: tuple[int, int, int]) -> float:
    """Images a second through forward, backward and optimizer, on random images of `image_shape`.

    The trainer's weights are changed by it; every order loads its own.
    """
    objective, batch = trainer.objective, trainer.config.batch_size
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    trainer.unet.train()
    with torch.random.fork_rng(devices=devices):
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                _settle(trainer.device)
                began = time.perf_counter()
            x0, condition = objective.imagined(batch, image_shape)
            every = Draw(x0, condition, *objective.draw(x0))
            for _, draw in every.parts(trainer.config.micro_batch):
                loss = objective.losses(trainer.forward, draw.x0, draw.t, draw.noise, draw.condition)
                trainer.backward(loss.sum() / batch)
            trainer.step(torch.ones((), dtype=torch.bool, device=trainer.device))
        _settle(trainer.device)
    return STEPS * batch / (time.perf_counter() - began)


def _settle(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
