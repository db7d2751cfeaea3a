"""What tests of nodes that fail, fall silent or go away have in common."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from conftest import Federation
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from ret_fl.config import RunConfig

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]

FIRST, SECOND = 2, 3
"""Node IDs of the inline grid: partitions 0 and 1."""


def states_differ(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> list[str]:
    return [name for name in left if not np.array_equal(left[name], right[name])]


def unavailable(request: Message, reply: Message) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=request)
