"""What a client keeps of a proxy between rounds, in a local file: Adam's moments, and unaggregated weights.

Nothing here is irreplaceable: a client without the file starts from the global weights with fresh moments. Files are
keyed by run, shard and round, so a resumed run finds exactly the state of the round it goes on from. Those of other
runs are deleted `FORGET_DAYS` after they were last written to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ret_fl.packing import State

log = logging.getLogger(__name__)

NAMES, EIGHT_BIT_NAMES = ("exp_avg", "exp_avg_sq"), ("state1", "state2")
"""What torch and bitsandbytes call the moments."""
FORGET_DAYS = 14
"""A run that was not trained here for so long is taken for ended: resumed all the same, its moments start fresh."""
_FILES = "shard-[0-9]*/round-[0-9]*.*"


@dataclass(frozen=True)
class Moments:
    """AdamW's state: updates taken, first and second moments by parameter name; step: batches seen (for warm-up).

    scales: by parameter name, what 8-bit AdamW needs beside its moments to read them; None for AdamW in float32.
    """

    step: int
    updates: int
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    scales: dict[str, dict[str, Tensor]] | None = None

    @classmethod
    def gathered(cls, step: int, state: Mapping[str, Mapping[str, Any]]) -> Moments:
        """From an optimizer's state by parameter name: torch's, or that of bitsandbytes."""
        one = next(iter(state.values()), None)
        first, second = EIGHT_BIT_NAMES if one and EIGHT_BIT_NAMES[0] in one else NAMES
        eight_bit = first == EIGHT_BIT_NAMES[0]

        def others(own: Mapping[str, Any]) -> dict[str, Tensor]:
            return {key: value.cpu() for key, value in own.items() if key not in (first, second, "step")}

        return cls(
            step=step,
            updates=int(one["step"]) if one else 0,
            first={name: own[first].cpu() for name, own in state.items()},
            second={name: own[second].cpu() for name, own in state.items()},
            scales={name: others(own) for name, own in state.items()} if eight_bit else None,
        )

    def of(self, name: str, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's state for one parameter, on its device."""
        device = parameter.device

        def placed(moment: Tensor) -> Tensor:
            # as the parameter lies in memory: kernels pair up elements by address, whatever the strides say
            return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment).detach()

        moments = placed(self.first[name]), placed(self.second[name])
        if self.scales is None:
            updates = torch.tensor(float(self.updates), device=device)
            return {"step": updates, **dict(zip(NAMES, moments, strict=True))}
        others = {key: value.to(device) for key, value in self.scales.get(name, {}).items()}
        return {"step": self.updates, **dict(zip(EIGHT_BIT_NAMES, moments, strict=True)), **others}


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
            scales=_nested(part("scales.")) if meta.get("eight-bit") else None,
        )
        weights = {k: v.numpy() for k, v in part("weights.").items()}
        return ProxyState(moments, weights or None)

    def save(self, shard: int, round: int, state: ProxyState, keep: int) -> None:
        """Write atomically; drop states more than `keep` rounds old, and runs of `FORGET_DAYS` ago.

        Raises `OSError` if it cannot be written (a full disk); no part is left.
        """
        self._forget_old_runs()
        path = self._path(shard, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = state.moments
        tensors = {f"first.{k}": v.contiguous() for k, v in moments.first.items()}
        tensors |= {f"second.{k}": v.contiguous() for k, v in moments.second.items()}
        for name, own in (moments.scales or {}).items():
            tensors |= {f"scales.{name}/{key}": value.contiguous() for key, value in own.items()}
        tensors |= {f"weights.{k}": torch.from_numpy(v) for k, v in (state.weights or {}).items()}
        temporary = path.with_suffix(".tmp")
        meta = {"step": str(moments.step), "updates": str(moments.updates)}
        meta |= {"eight-bit": "yes"} if moments.scales is not None else {}
        try:
            save_file(tensors, temporary, metadata=meta)
            temporary.replace(path)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        for old in path.parent.glob("round-*.safetensors"):
            if int(old.stem.removeprefix("round-")) < round - keep:
                old.unlink(missing_ok=True)

    def _forget_old_runs(self) -> None:
        """Delete the files of other runs that were not written to for `FORGET_DAYS`, and nothing else."""
        oldest = time.time() - FORGET_DAYS * 86400
        try:
            for other in self.folder.parent.glob("*"):
                files = list(other.glob(_FILES)) if other != self.folder else []
                if files and max(file.stat().st_mtime for file in files) < oldest:
                    log.info("%s: the state of a run of more than %d days ago, deleted", other, FORGET_DAYS)
                    for file in files:
                        file.unlink()
                    for folder in (*{file.parent for file in files}, other):
                        folder.rmdir()
        except OSError as error:  # another process may be at it
            log.warning("states of old runs in %s are not deleted: %s", self.folder.parent, error)


def _nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """'<parameter>/<key>' -> {parameter: {key: value}}."""
    nested: dict[str, dict[str, Tensor]] = {}
    for path, value in flat.items():
        name, _, key = path.rpartition("/")
        nested.setdefault(name, {})[key] = value
    return nested
