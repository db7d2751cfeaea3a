"""How well images fit their captions, in the joint space of a network such as CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.features import LoadedModel


def clip_score(
    model: LoadedModel, generated: Tensor, prompts: Sequence[str], train: Tensor, captions: Sequence[str] | None
) -> schema.ClipScore | None:
    """Mean cosine of images and their texts (Hessel et al. 2021, arXiv 2104.08718, without its factor and clipping).

    None for a model that knows no text, without prompts, and, with a warning, where its folder lacks a tokenizer.

    Args:
        generated: [G, C, H, W]; image i was drawn from prompt i modulo their number.
        train, captions: [N, C, H, W] real images and what they are called, to compare with; or None.
    """
    if model.text is None or not prompts:
        return None
    try:
        asked = model.text(prompts)
    except ValueError as error:
        warnings.warn(f"no CLIP score: {error}", stacklevel=2)
        return None
    own = F.cosine_similarity(model.features(generated), asked[[i % len(prompts) for i in range(len(generated))]])
    real = F.cosine_similarity(model.features(train), model.text(captions)) if captions is not None else None
    return schema.ClipScore(
        features=model.name, mean=float(own.mean()), real=None if real is None else float(real.mean())
    )
