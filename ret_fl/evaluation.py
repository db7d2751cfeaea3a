"""Losses of a model on given images at fixed timesteps and noise: comparable between images, models and rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import ModelMixin
from torch import Tensor

from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import Objective

Progress = Callable[[int], None]


def timestep_grid(num_train_timesteps: int, count: int, below: int | None = None) -> Tensor:
    """`count` timesteps, the middles of equal parts of [0, num_train_timesteps): int64 [count], ascending.

    With `below`, only those below it.
    """
    if count < 1:
        raise ValueError(f"timesteps must be >= 1, got {count}")
    grid = (torch.arange(count) * 2 + 1) * num_train_timesteps // (2 * count)
    if below is None:
        return grid
    if not len(grid := grid[grid < below]):
        raise ValueError(f"no timestep of {count} in {num_train_timesteps} lies below {below}: raise it")
    return grid


def fixed_batches(
    objective: Objective,
    store: SampleStore,
    ids: Tensor,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x0 and condition of `ids` (int64 [n]), a batch at a time, as `Objective.losses` takes them.

    `on_progress` is told how many images are done.

    Raises:
        ValueError: no ids, or batch_size < 1.
        IndexError: an id that the store does not hold.
    """
    if len(ids) == 0 or batch_size < 1:
        raise ValueError(f"need at least one id and batch_size >= 1, got {len(ids)} ids and batch_size {batch_size}")
    done = 0
    for part in ids.split(batch_size):
        yield objective.fixed(store, part)
        done += len(part)
        if on_progress:
            on_progress(done)


@torch.no_grad()
def loss_grid(
    unet: ModelMixin,
    objective: Objective,
    store: SampleStore,
    ids: Tensor,
    *,
    timesteps: int = 10,
    below: int | None = None,
    noises: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> Tensor:
    """Loss of each image at the timesteps of `timestep_grid`: float32 [n, timesteps], on the CPU.

    A timestep's noise is the same for every image, so differences between images are theirs. The U-Net is moved to the
    objective's device and put into evaluation mode.

    Args:
        ids: int64 [n].
        below: leave out the timesteps of the grid that are not below; None takes all.
        noises: noise draws a timestep, averaged over.

    Raises:
        ValueError: no ids, no timestep, or noises or batch_size < 1.
        IndexError: an id that the store does not hold.
    """
    if noises < 1:
        raise ValueError(f"noises must be >= 1, got {noises}")
    device = objective.device
    unet = unet.to(device).eval()
    grid = timestep_grid(objective.scheduler.config.num_train_timesteps, timesteps, below)
    noise = objective.fixed_noise(seed, len(grid) * noises, store.image_shape)
    out = []
    for x0, condition in fixed_batches(objective, store, ids, batch_size, on_progress):
        losses = [
            objective.losses(unet, x0, torch.full((len(x0),), int(t), device=device), one.expand_as(x0), condition)
            for t, one in zip(grid.repeat_interleave(noises), noise, strict=True)
        ]
        out.append(torch.stack(losses, dim=1).unflatten(1, (len(grid), noises)).mean(dim=2).cpu())
    return torch.cat(out)


def fixed_losses(
    unet: ModelMixin,
    objective: Objective,
    store: SampleStore,
    ids: Tensor,
    *,
    timesteps: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """`loss_grid` averaged over its timesteps: float32 [n]; arguments and errors as there."""
    return loss_grid(unet, objective, store, ids, timesteps=timesteps, seed=seed, batch_size=batch_size).mean(dim=1)
