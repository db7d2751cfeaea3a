"""Atomic checkpoints of a run, one folder a round: checkpoints/round-00012/{weights.safetensors,ledger.npz,...}.

Where proxies are never averaged, weights.safetensors is their common start, and shard-0.safetensors and so on are they.

A checkpoint is written beside its place, flushed to disk and then renamed, so a folder that is there is whole.
SHA256SUMS (as `sha256sum --check` reads it) tells whether it still is what was written; if the newest one is not, or
cannot be read, the one before it is used. Checkpoints of earlier versions have no sums and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ret_fl.files import sync
from ret_fl.ledger import ShardLedger
from ret_fl.packing import State, pack_state, unpack_state
from ret_fl.rounds import ShardState
from ret_fl.rundir import is_deployed, resume_command

log = logging.getLogger(__name__)

BASE, SUMS = "base.safetensors", "SHA256SUMS"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or there is none to go on from."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything the server needs to go on after `round`. frozen: as in `TrainOrder`.

    base: the aggregating strategy (`aggregation.strategy`) and base_state, what it keeps from round to round. home: as
    in `Roster`.
    """

    round: int
    run_key: str
    fingerprint: str
    weights: State
    ledger: ShardLedger
    shards: list[ShardState]
    frozen: str = ""
    base: str = ""
    base_state: Mapping[str, NDArray] = field(default_factory=dict)
    home: Mapping[int, int] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write into `folder` (checkpoints/), drop all but the last `keep`, and return the new checkpoint's path.

    Raises `CheckpointError` if it cannot be written (a full disk); those that were there stay, and no part is left.
    """
    final = folder / f"round-{checkpoint.round:05d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        _write(temporary, checkpoint)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        proxies = sum(shard.weights is not None for shard in checkpoint.shards)
        size = sum(value.nbytes for value in checkpoint.weights.values()) * (1 + proxies)
        raise CheckpointError(
            f"the checkpoint of round {checkpoint.round} cannot be written to {folder}: {error}. It takes about "
            f"{size / 1e6:.0f} MB; earlier ones are kept (keep-checkpoints={keep}). Make room, then "
            f"`{resume_command(folder.parent, deployed=is_deployed())}` goes on after the last"
        ) from error
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """All files of a checkpoint, flushed to disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _save_weights(checkpoint.weights, folder / "weights.safetensors")
    if checkpoint.base_state:
        save_file({k: np.ascontiguousarray(v) for k, v in checkpoint.base_state.items()}, folder / BASE)
    own = {k: shard.weights for k, shard in enumerate(checkpoint.shards) if shard.weights is not None}
    for k, weights in own.items():
        _save_weights(unpack_state(weights), _proxy_file(folder, k))
    checkpoint.ledger.save(folder / "ledger.npz")
    np.savez(
        folder / "banks.npz",
        values=np.stack([s.bank_values for s in checkpoint.shards]),
        visits=np.stack([s.bank_visits for s in checkpoint.shards]),
        proxy_round=np.array([s.proxy_round for s in checkpoint.shards]),
    )
    state = {name: getattr(checkpoint, name) for name in ("round", "run_key", "fingerprint", "frozen", "base", "home")}
    state["proxies"] = list(own)
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (folder / SUMS).write_text(_sums(folder))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _sums(folder: Path) -> str:
    """What SHA256SUMS says of the other files of a checkpoint."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != SUMS and not path.name.startswith("."):  # hidden ones are a file manager's
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


def _save_weights(weights: State, path: Path) -> None:
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, path)


def _proxy_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard}.safetensors"


def _folders(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    return sorted(folder.glob("round-*"), reverse=True)


def any_checkpoint(folder: Path) -> bool:
    """Whether a run ever saved one, readable or not."""
    return bool(_folders(folder))


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Every checkpoint, oldest first. Raises `CheckpointError` for a damaged one."""
    for path in reversed(_folders(folder)):
        try:
            checkpoint = _load(path)
        except Exception as error:  # readers of damaged files raise anything
            raise CheckpointError(f"{path} cannot be read: {_told(error)}") from error
        yield checkpoint


def load_latest(folder: Path) -> Checkpoint:
    """The newest readable checkpoint. Raises `CheckpointError` naming what was wrong with each if none is."""
    problems = []
    for path in _folders(folder):
        try:
            return _load(path)
        except Exception as error:  # readers of damaged files raise anything
            log.warning("checkpoint %s cannot be read (%s): trying the one before it", path.name, _told(error))
            problems.append(f"{path.name}: {_told(error)}")
    raise CheckpointError(f"no checkpoint in {folder} to go on from. {'; '.join(problems)}".rstrip())


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _refuse_damaged(path: Path) -> None:
    """Raise `CheckpointError` if a checkpoint's files are not those that were written; without sums none can tell."""
    if not (path / SUMS).exists():
        return
    written, there = (path / SUMS).read_bytes(), _sums(path).encode()
    if written != there:
        differ = set(written.splitlines()) ^ set(there.splitlines())
        names = ", ".join(sorted({line.rpartition(b" ")[2].decode(errors="replace") for line in differ}))
        raise CheckpointError(f"not what was written (SHA-256): {names or SUMS}")


def _load(path: Path) -> Checkpoint:
    _refuse_damaged(path)
    state: Mapping[str, Any] = json.loads((path / "state.json").read_text())
    with np.load(path / "banks.npz", allow_pickle=False) as banks:
        shards = [
            ShardState(values, visits, int(round))
            for values, visits, round in zip(banks["values"], banks["visits"], banks["proxy_round"], strict=True)
        ]
    for k in state.get("proxies", ()):
        shards[k].weights = pack_state(load_file(_proxy_file(path, k)))
    return Checkpoint(
        round=int(state["round"]),
        run_key=state["run_key"],
        fingerprint=state["fingerprint"],
        weights=load_file(path / "weights.safetensors"),
        ledger=ShardLedger.load(path / "ledger.npz"),
        shards=shards,
        frozen=state.get("frozen", ""),
        base=state.get("base", ""),
        base_state=load_file(path / BASE) if (path / BASE).exists() else {},
        home={int(shard): int(partition) for shard, partition in state.get("home", {}).items()},
    )
