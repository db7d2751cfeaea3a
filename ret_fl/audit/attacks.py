"""A model's losses on the images of an audit, and what they leak: membership, exposure, duplicates."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.generate import Denoiser
from ret_fl.audit.inputs import AuditData, Background, Options, spread_rows
from ret_fl.audit.leakage import exposure, membership, pia_scores, suspected_duplicates
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import Objective
from ret_fl.diffusion.sampling import image_shape
from ret_fl.evaluation import fixed_losses, loss_grid, timestep_grid

GRID = 10
"""Timesteps of the loss grid for membership and exposure."""
LOW_NOISE = 0.4
"""Share of the chain, from its clean end, whose losses tell repeated images from others."""
FINE_GRID = 50
"""Timesteps of the whole chain for duplicates, of which only those at low noise are measured: 20."""

Stage = Callable[[str], None]


def takes(denoiser: Denoiser, data: AuditData) -> bool:
    """Whether a model's losses can be asked for on these images; a warning says why not."""
    unet, _, fold = denoiser
    shape = image_shape(unet, fold)
    if shape != data.train.image_shape:
        own, given = ("x".join(map(str, s)) for s in (shape, data.train.image_shape))
        warnings.warn(f"leakage left out: the model works on {own}, the images are {given}", stacklevel=2)
        return False
    classes = unet.config.num_class_embeds
    unlabelled = any(s is not None and s.labels is None for s in (data.train, data.reference, data.held_out))
    if classes and (unlabelled or data.train.num_classes > classes):
        warnings.warn(f"leakage left out: the model wants the labels of its {classes} classes", stacklevel=2)
        return False
    return True


def attack(
    denoiser: Denoiser, data: AuditData, background: Background, options: Options, on_stage: Stage
) -> tuple[schema.Leakage, dict[str, np.ndarray]]:
    """Leakage, and losses of the training images by group. Samples that were dropped are no members."""
    on_stage("leakage: losses of training images")
    unet, scheduler, fold = denoiser
    objective = Objective(scheduler, torch.device(options.device), fold=fold)

    def mean_losses(store: SampleStore, ids: Tensor) -> Tensor:
        return fixed_losses(unet, objective, store, ids, timesteps=GRID, seed=options.seed)

    canary_rows = np.ascontiguousarray(data.canaries[:, 0]) if len(data.canaries) else np.empty(0, np.int64)
    (chosen,) = spread_rows([data.train], options.members)
    # of a canary whose repeats differ, only the original is a member: they would count as often as they stand
    outside = np.union1d(data.canaries[:, 1:], background.dropped).astype(np.int64)
    chosen = chosen[~torch.isin(chosen, torch.from_numpy(outside))]
    canary_rows = canary_rows[~np.isin(canary_rows, background.dropped)]
    measured = torch.unique(torch.cat([chosen, torch.from_numpy(canary_rows)]))
    scores = mean_losses(data.train, measured)
    # canaries beyond the chosen few would weigh more among them than in the data
    fair = torch.isin(measured, chosen)
    unseen = [s for s in (data.held_out, data.reference) if s is not None and len(s)]
    attacks, exposed = [], None
    if unseen:
        on_stage("leakage: losses of images never trained on")
        rows = spread_rows(unseen, options.members)
        picked = [(store, ids) for store, ids in zip(unseen, rows, strict=True) if len(ids)]
        unseen_scores = torch.cat([mean_losses(s, ids) for s, ids in picked])
        attacks.append(membership(scores[fair], unseen_scores, "loss", seed=options.seed))
        on_stage("leakage: membership by PIA")
        step = scheduler.config.num_train_timesteps // 5
        members = pia_scores(unet, objective, data.train, measured[fair], t=step)
        non_members = torch.cat([pia_scores(unet, objective, s, ids, t=step) for s, ids in picked])
        attacks.append(membership(members, non_members, "pia", seed=options.seed))
        if len(canary_rows):
            exposed = exposure(scores[torch.searchsorted(measured, torch.from_numpy(canary_rows))], unseen_scores)
    on_stage("leakage: losses at low noise, for duplicates")
    total = scheduler.config.num_train_timesteps
    t_max = round(LOW_NOISE * total)
    low = loss_grid(unet, objective, data.train, measured, timesteps=FINE_GRID, below=t_max, seed=options.seed)
    duplicates = _duplicates(data.train, measured, low, timestep_grid(total, FINE_GRID, t_max), t_max)
    groups = {
        name: scores[torch.isin(measured, torch.from_numpy(ids))].numpy() for name, ids in background.groups.items()
    }
    if not groups:
        groups = {"training": scores.numpy()} | ({"never trained on": unseen_scores.numpy()} if unseen else {})
    return schema.Leakage(membership=attacks, exposure=exposed, duplicates=duplicates), groups


def _duplicates(
    train: SampleStore, measured: Tensor, losses: Tensor, timesteps: Tensor, t_max: int
) -> schema.Duplicates:
    """`suspected_duplicates` among the images of the `measured` rows, every copy of them counted."""
    hashes = train.content_hashes
    by_content = np.argsort(hashes[measured.numpy()])
    sorted_hashes = hashes[measured.numpy()][by_content]
    place = np.searchsorted(sorted_hashes, hashes).clip(max=len(measured) - 1)
    rows = np.flatnonzero(sorted_hashes[place] == hashes)
    found = suspected_duplicates(losses[by_content[place[rows]]], timesteps, hashes[rows], t_max=t_max)
    named = [s.model_copy(update={"train": int(rows[s.train])}) for s in found.suspects]
    return found.model_copy(update={"suspects": named})
