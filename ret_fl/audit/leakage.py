"""What a finished model's losses give away about its training data.

- `membership`: how well a score of an image tells training images from images never seen; the scores are the loss
  (the mean of `ret_fl.evaluation.loss_grid`, Yeom et al. 2018, arXiv 1709.01604) or `pia_scores` (Kong et al. 2023,
  arXiv 2305.18355).
- `exposure`: how far a canary's loss stands out among those of images never seen (Carlini et al. 2019, The Secret
  Sharer, arXiv 1802.08232).
- `suspected_duplicates`: training images with a suspiciously low loss at low noise.

The attacks are simple ones: a low number is no proof that a stronger attack (shadow models, LiRA) finds nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ret_fl.audit.replication import wilson_interval
from ret_fl.audit.schema import Duplicates, Exposure, Interval, Membership, SuspectedDuplicate
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.objective import Objective
from ret_fl.evaluation import Progress, fixed_batches

Values = Tensor | np.ndarray
FPR_1_PERCENT, FPR_01_PERCENT = 100, 1000
"""False-positive rates as 'one in so many': whole numbers, so that rounding admits no false positive too many."""
TAILS = (2.5, 97.5)
# Turns the median absolute deviation of a normal sample into its standard deviation.
MAD_TO_SIGMA = 1.4826


@torch.no_grad()
def pia_scores(
    unet: UNet2DModel,
    objective: Objective,
    store: SampleStore,
    ids: Tensor,
    *,
    t: int = 200,
    p: float = 4.0,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> Tensor:
    """Proximal initialization attack: float32 [n] >= 0, on the CPU, small for members (Kong et al. 2023).

    The noise that the model sees in the clean image at timestep 0 noises that image to timestep t; the score is the
    p-norm between it and the noise seen there. It draws no noise at random. The U-Net is moved to the objective's
    device and put into evaluation mode.

    Args:
        ids: int64 [n].
        t: timestep in 1..T-1; the paper's 200 is for T = 1000.
        p: which norm, > 0; 4 in the paper.

    Raises:
        ValueError: no ids, t or p out of range, batch_size < 1, or a model that predicts neither epsilon nor v.
        IndexError: an id that the store does not hold.
    """
    scheduler, device = objective.scheduler, objective.device
    total, kind = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
    if not 1 <= t < total:
        raise ValueError(f"t must lie in 1..{total - 1}, within the model's chain, got {t}")
    if not p > 0:
        raise ValueError(f"p must be > 0 (4 by default), got {p}")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"the attack needs a model that predicts epsilon or v_prediction, not {kind!r}")
    unet = unet.to(device).eval()

    def seen_noise(x: Tensor, step: int, labels: Tensor | None) -> Tensor:
        steps = torch.full((len(x),), step, device=device)
        predicted = objective.predicted(unet, x, steps, labels)
        if kind == "epsilon":
            return predicted
        signal = scheduler.alphas_cumprod[step].to(device)
        return signal.sqrt() * predicted + (1 - signal).sqrt() * x

    out = []
    for x0, labels in fixed_batches(objective, store, ids, batch_size, on_progress):
        noise = seen_noise(x0, 0, labels)
        x_t = scheduler.add_noise(x0, noise, torch.full((len(x0),), t, device=device))
        gap = noise - seen_noise(x_t, t, labels)
        out.append(torch.linalg.vector_norm(gap.flatten(1), p, dim=1).cpu())
    return torch.cat(out)


def membership(
    member_scores: Values,
    non_member_scores: Values,
    attack: Literal["loss", "pia"],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Membership:
    """How well a score tells members from non-members; a LOW score means member.

    auc is the share of pairs in which the member scores lower, ties counting half (Mann-Whitney): .5 is guessing. Its
    interval is the percentile bootstrap over both sets, or, where all resamples agree (perfect separation), Wilson's
    for as many trials as the smaller set has images.

    The true-positive rates (Carlini et al. 2022, arXiv 2112.03570) are the largest shares of members below a threshold
    with at most 1 % or .1 % of the non-members below it: none at all if there are fewer than 100 or 1000 of those.
    They hang on the few lowest non-members, and no resample holds a lower one than the lowest: where the level admits
    fewer than about four of them, bootstrap intervals miss the truth far too often. Instead, how many non-members lie
    below the true quantile is drawn from its binomial law, and the members' rate at that threshold from its beta law
    (as in Clopper-Pearson). This holds for any distribution of scores and does not collapse at rates of 0 and 1. The
    price is a low end of 0 with fewer than about 370 non-members (for 1 %) or 3700 (for .1 %): so few cannot tell.

    Args:
        member_scores: float [m], each training image once: copies of one image are not independent and would narrow
            the intervals, and canaries repeated ten times would count ten times.
        non_member_scores: float [n], images of the same source that the model never saw.
        attack: what the scores are.
        bootstrap: draws for the intervals, >= 100.

    Raises:
        ValueError: an empty set, NaN, scores that are not one number an image, or bootstrap < 100.
    """
    if bootstrap < 100:
        raise ValueError(f"bootstrap must be >= 100 (1000 by default) for 95 % intervals, got {bootstrap}")
    members = np.sort(_checked_scores(member_scores, "member_scores"))
    non_members = np.sort(_checked_scores(non_member_scores, "non_member_scores"))
    rng = np.random.default_rng(seed)
    return Membership(
        attack=attack,
        members=len(members),
        non_members=len(non_members),
        auc=_auc_interval(members, non_members, bootstrap, rng),
        tpr_at_1_percent=_tpr_interval(members, non_members, FPR_1_PERCENT, bootstrap, rng),
        tpr_at_01_percent=_tpr_interval(members, non_members, FPR_01_PERCENT, bootstrap, rng),
    )


def auc_of_lower(low: np.ndarray, high: np.ndarray) -> float:
    """Share of pairs in which one of `low` is below one of `high` (sorted, float [n]), ties counting half."""
    ranks = np.searchsorted(high, low, "left") + np.searchsorted(high, low, "right")
    return 1 - float(ranks.mean()) / (2 * len(high))


def _auc_interval(members: np.ndarray, non_members: np.ndarray, draws: int, rng: np.random.Generator) -> Interval:
    def resampled(values: np.ndarray) -> np.ndarray:
        return values[np.sort(rng.integers(len(values), size=len(values)))]

    value = auc_of_lower(members, non_members)
    drawn = [auc_of_lower(resampled(members), resampled(non_members)) for _ in range(draws)]
    low, high = np.percentile(drawn, TAILS)
    if low == high:
        trials = min(len(members), len(non_members))
        low, high = wilson_interval(round(value * trials), trials)
    return Interval(value=value, low=float(low), high=float(high))


def _tpr_interval(
    members: np.ndarray, non_members: np.ndarray, one_in: int, draws: int, rng: np.random.Generator
) -> Interval:
    """Share of members at a threshold that at most `1 / one_in` of the non-members stay below; both sets sorted."""
    m, n = len(members), len(non_members)
    # how many members score below the r-th lowest non-member, r = 0..n+1
    below = np.concatenate([[0], np.searchsorted(members, non_members, "left"), [m]])
    passed = rng.binomial(n, 1 / one_in, size=draws)
    fewest, most = below[passed], below[passed + 1]
    lows = np.where(fewest > 0, rng.beta(np.maximum(fewest, 1), m - fewest + 1), 0.0)
    highs = np.where(most < m, rng.beta(most + 1, np.maximum(m - most, 1)), 1.0)
    return Interval(
        value=float(below[n // one_in + 1] / m),
        low=float(np.percentile(lows, TAILS[0])),
        high=float(np.percentile(highs, TAILS[1])),
    )


def exposure(canary_scores: Values, unseen_scores: Values) -> Exposure:
    """Exposure of canaries (Carlini et al. 2019): log2(n) - log2(rank) of each one's loss among n unseen images.

    The rank is 1 if no unseen image has as low a loss, and n at most: exposures lie in [0, log2(n)], and `most` is
    log2(n). Ties rank the canary behind. The mean over canaries that left no trace is about 1.44 (log2 e), not 0.

    Args:
        canary_scores: float [c], losses, each canary once.
        unseen_scores: float [n], losses of images drawn as the canaries were, but never trained on.

    Raises:
        ValueError: an empty set, NaN, or scores that are not one number an image.
    """
    canaries = _checked_scores(canary_scores, "canary_scores")
    unseen = np.sort(_checked_scores(unseen_scores, "unseen_scores"))
    n = len(unseen)
    rank = np.minimum(np.searchsorted(unseen, canaries, "right") + 1, n)
    exposures = np.log2(n / rank)
    return Exposure(exposures=exposures.tolist(), mean=float(exposures.mean()), most=float(np.log2(n)))


def suspected_duplicates(
    losses: Values,
    timesteps_of_columns: Values,
    content_hashes: np.ndarray,
    *,
    t_max: int = 400,
    z: float = -3.0,
    most: int = 32,
) -> Duplicates:
    """Training images whose loss at low noise is far below that of the others, as that of repeated images is.

    An image's log-ratio is its log-loss minus the mean log-loss of all distinct images at that timestep, averaged over
    the timesteps below t_max; its z is that in robust standard deviations (1.4826 MAD) from the median. The log-ratios
    of training pool neighbouring timesteps in bins; here every image has a loss at every timestep of the grid, so each
    column is a bin of its own. Identical images count, and are listed, once.

    Precision and recall are those of all images with z below the bar, listed or not, against images that have exact
    copies; both are None if none has, and precision is None if nothing is below the bar. A suspect without exact
    copies may have near ones (or just be easy): look at it.

    Args:
        losses: float [n, columns] >= 0, `loss_grid` of the whole training set in the store's order.
        timesteps_of_columns: int [columns], its `timestep_grid`.
        content_hashes: uint64 [n], `SampleStore.content_hashes`; `train` of a suspect is the first row with its hash.
        t_max: columns below it count; 400 is for T = 1000. At higher noise all images look alike.
        z: the bar, < 0.
        most: list the `most` lowest, >= 0.

    Raises:
        ValueError: shapes that do not fit together, no image, no column below t_max, losses that are negative or not
            finite, z >= 0, or most < 0.
    """
    values, timesteps = _as_numpy(losses), _as_numpy(timesteps_of_columns)
    if not z < 0 or most < 0:
        raise ValueError(f"z must be < 0 (-3 by default) and most >= 0, got z={z} and most={most}")
    if len(values) == 0 or values.shape != (len(content_hashes), len(timesteps)):
        raise ValueError(
            f"losses must be [n, columns] with n >= 1 hashes and one timestep a column, got {values.shape} for "
            f"{len(content_hashes)} hashes and {len(timesteps)} timesteps"
        )
    if not (timesteps < t_max).any():
        raise ValueError(f"no column below t_max={t_max}: the lowest timestep is {timesteps.min()}; raise t_max")
    low_noise = values[:, timesteps < t_max]
    if not np.isfinite(low_noise).all() or (low_noise < 0).any():
        bad = int((~np.isfinite(low_noise) | (low_noise < 0)).any(1).sum())
        raise ValueError(
            f"losses are negative, NaN or infinite for {bad} of {len(values)} images: is the model broken?"
        )
    _, first, copies = np.unique(content_hashes, return_index=True, return_counts=True)
    log_loss = np.log(np.maximum(low_noise[first], 1e-30))
    log_ratio = (log_loss - log_loss.mean(0)).mean(1)
    robust_z = _robust_z(log_ratio)
    below, repeated = robust_z < z, copies > 1
    hits = int((below & repeated).sum())
    order = np.lexsort((first, robust_z))
    suspects = [
        SuspectedDuplicate(
            train=int(first[i]), log_ratio=float(log_ratio[i]), z=float(robust_z[i]), copies=int(copies[i])
        )
        for i in order[: min(most, int(below.sum()))]
    ]
    return Duplicates(
        suspects=suspects,
        examined=len(first),
        below=int(below.sum()),
        z=z,
        t_max=t_max,
        precision=hits / int(below.sum()) if below.any() and repeated.any() else None,
        recall=hits / int(repeated.sum()) if repeated.any() else None,
    )


def _robust_z(values: np.ndarray) -> np.ndarray:
    """Distances from the median in robust standard deviations; all 0 where more than half the values are equal."""
    gap = values - np.median(values)
    scale = MAD_TO_SIGMA * np.median(np.abs(gap))
    return gap / scale if scale > 0 else np.zeros_like(gap)


def _as_numpy(values: Values) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _checked_scores(scores: Values, name: str) -> np.ndarray:
    values = _as_numpy(scores)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must hold one number an image and at least one, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"{name} hold NaN for {int(np.isnan(values).sum())} of {len(values)} images: drop them first")
    return values
