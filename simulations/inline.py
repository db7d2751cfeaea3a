"""The inline engine: ServerApp and ClientApp in one process, driven through Flower's Grid interface.

The very same apps as under `flwr run`, without Ray, SuperLink or SuperNodes: for tests, sweeps and debugging. Clients
run one after the other.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from ret_fl.config import Scalar
from ret_fl.rundir import RunDir

log = logging.getLogger(__name__)

SERVER_NODE = 1


class InlineGrid(Grid):
    """A Grid whose nodes are contexts in this process; node i is partition i."""

    def __init__(self, client_app: ClientApp, num_supernodes: int, run_config: Mapping[str, Scalar]) -> None:
        self.client_app = client_app
        self.run_id = uuid4().int >> 65
        TaskIdentity.run_id = self.run_id
        TaskIdentity.node_id = SERVER_NODE
        TaskIdentity.task_id = 1
        self.contexts = {
            SERVER_NODE + 1 + i: Context(
                run_id=self.run_id,
                node_id=SERVER_NODE + 1 + i,
                node_config={"partition-id": i, "num-partitions": num_supernodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(num_supernodes)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise RuntimeError("the inline engine makes its own run")

    @property
    def run(self) -> Run:
        return Run.create_empty(self.run_id)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._replies[message.metadata.message_id] = self._handle(message)
            ids.append(message.metadata.message_id)
        return ids

    def _handle(self, message: Message) -> Message:
        try:
            return self.client_app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # an app may raise anything, and Flower answers any of it with an error reply
            log.exception("the ClientApp of node %d failed", message.metadata.dst_node_id)
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def main() -> None:
    """`python -m simulations.inline SETTINGS.toml NODES`: what `ret-fl run --engine inline` starts."""
    from clients.app import app as client_app
    from ret_fl.settings import read_preset
    from server.app import app as server_app

    run_inline(server_app, client_app, read_preset(Path(sys.argv[1])), int(sys.argv[2]))


def run_here(settings: Mapping[str, Scalar], out: str | Path | None = None) -> RunDir:
    """A whole run in this process, where a debugger stops in a plug-in: its folder. out as `ret-fl run --out`."""
    from clients.app import app as client_app
    from ret_fl.settings import new_run
    from server.app import app as server_app

    directory, config = new_run(settings, Path(out) if out is not None else None)
    run_inline(server_app, client_app, config.to_flat(), config.shards)
    return directory


def run_inline(
    server_app: ServerApp, client_app: ClientApp, run_config: Mapping[str, Scalar], num_supernodes: int
) -> None:
    """Run a Flower app to its end in this process. Raises what the ServerApp raises."""
    grid = InlineGrid(client_app, num_supernodes, run_config)
    context = Context(
        run_id=grid.run_id, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    server_app(grid, context)


if __name__ == "__main__":
    main()
