"""Where to compute: the device of a setting, and how many CPU threads."""

from __future__ import annotations

import os

import torch

from ret_fl.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU there is, else the CPU. Raises `ConfigError` for a device this machine has not."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            hint = "device=auto takes what there is"
            if name.startswith("cuda") and torch.version.cuda is None:
                hint += "; this torch is a CPU build, `make setup PYTORCH=cuda` installs one for GPUs"
            raise ConfigError(f"device={name!r} is not to be had here: {str(error).splitlines()[0]} ({hint})") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def limit_threads(threads: int) -> None:
    """Use so many CPU threads from here on; 0: what OMP_NUM_THREADS says, else one.

    Small U-Nets gain little from more, and on cores that others use they become many times slower with each thread.
    """
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)
