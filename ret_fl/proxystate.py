"""What a client keeps of a proxy between rounds, in a local file: Adam's moments, and unaggregated weights.

Nothing here is irreplaceable: a client without the file starts from the global weights with fresh moments. Files are
keyed by run, shard and round, so a resumed run finds exactly the state of the round it goes on from.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ret_fl.packing import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """AdamW's state: updates taken, first and second moments by parameter name; step: batches seen (for warm-up)."""

    step: int
    updates: int
    first: dict[str, Tensor]
    second: dict[str, Tensor]


@dataclass(frozen=True)
class ProxyState:
    """Moments of a proxy, and its weights when they were not averaged this round."""

    moments: Moments
    weights: State | None


class ProxyFiles:
    """The state files of one run on one client: <root>/<run>/shard-0003/round-00012.safetensors."""

    def __init__(self, root: Path, run_key: str) -> None:
        self.folder = root / run_key

    def _path(self, shard: int, round: int) -> Path:
        return self.folder / f"shard-{shard:04d}" / f"round-{round:05d}.safetensors"

    def load(self, shard: int, round: int) -> ProxyState | None:
        """State after `round`, or None (said in the log) if this client has none or it cannot be read."""
        if round == 0:
            return None
        path = self._path(shard, round)
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                meta = file.metadata()
            step, updates = int(meta["step"]), int(meta["updates"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning(
                "shard %d: no usable state of round %d here (%s): Adam's moments start fresh", shard, round, error
            )
            return None

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        moments = Moments(
            step=step,
            updates=updates,
            first=part("first."),
            second=part("second."),
        )
        weights = {k: v.numpy() for k, v in part("weights.").items()}
        return ProxyState(moments, weights or None)

    def save(self, shard: int, round: int, state: ProxyState, keep: int) -> None:
        """Write atomically, and drop states more than `keep` rounds old."""
        path = self._path(shard, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = state.moments
        tensors = {f"first.{k}": v.contiguous() for k, v in moments.first.items()}
        tensors |= {f"second.{k}": v.contiguous() for k, v in moments.second.items()}
        tensors |= {f"weights.{k}": torch.from_numpy(v) for k, v in (state.weights or {}).items()}
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"step": str(moments.step), "updates": str(moments.updates)})
        temporary.replace(path)
        for old in path.parent.glob("round-*.safetensors"):
            if int(old.stem.removeprefix("round-")) < round - keep:
                old.unlink(missing_ok=True)
