"""A SuperLink in this process: Flower's own state, on SQLite, and its own handlers, asked over HTTP by its own client.

What it fails at is told, and what its nodes do with an order that they are handed.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.proto import message_pb2, runtime_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers as handlers

PATHS = "/v1/runtime/"


@contextmanager
def served(answer: Callable[[str, bytes], bytes | None], run_id: int) -> Iterator[HttpGrid]:
    """Flower's grid on what answers a request, by its path and body; None: HTTP 500."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize, disable_nagle_algorithm = -1, True

        def do_POST(self) -> None:
            body = answer(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(500 if body is None else 200)
            self.send_header("content-length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        grid = HttpGrid(f"127.0.0.1:{server.server_port}", insecure=True, token="none")
        grid.set_run(Run.create_empty(run_id))
        yield grid
        grid.close()
        server.shutdown()


class SuperLink:
    """nodes: IDs of the SuperNodes. handed: messages that they took up; works: what one then does. asked: how often
    each thing was. fails: whether such a request does, by how often it was made: a part of a message finds the database
    locked, the others are answered with HTTP 500. A node takes up what it can when replies are asked for."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.database = folder / "state.db"
        self.state = LinkStateFactory(
            str(self.database), NoOpFederationManager(), ObjectStoreFactory(str(self.database))
        ).state()
        self.run_id = self.state.create_run(
            "ret-fl", "1", "hash", {}, "@none/default", None, "somebody", TaskType.SERVER_APP
        )
        self.nodes = [self.join() for _ in range(nodes)]
        self.handed: list[Message] = []
        self.works: Callable[[Message], object] = lambda order: None
        self.taking = threading.Lock()
        self.asked = Counter[str]()
        self.fails: Callable[[str, int], bool] = lambda what, tried: False

    def join(self) -> int:
        """A SuperNode more: its ID."""
        node = self.state.create_node("somebody", "one", secrets.token_bytes(32), 1e3)
        self.state.activate_node(node, 1e3)
        return node

    def leave(self, node: int) -> None:
        """Flower no longer hears from it."""
        self.nodes.remove(node)
        self.state.deactivate_node(node)

    def answer(self, path: str, body: bytes) -> bytes | None:
        what = path.removeprefix(PATHS)
        self.asked[what] += 1
        if what == "pull-messages":
            self._take_up()
        if not self.fails(what, self.asked[what]):
            return self._handle(what, body)
        if what == "push-object":
            with self.locked():
                return self._handle(what, body)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Another one writes to the database, so that who would is told so after 5 s."""
        other = sqlite3.connect(self.database, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
        other.close()

    def _handle(self, what: str, body: bytes) -> bytes | None:
        task = Task(run_id=self.run_id)
        if what == "get-nodes":
            return handlers.get_nodes(runtime_pb2.GetNodesRequest(), self.state, task).SerializeToString()
        handle, kind = {
            "push-messages": (handlers.push_messages, runtime_pb2.PushAppMessagesRequest),
            "pull-messages": (handlers.pull_messages, runtime_pb2.PullAppMessagesRequest),
            "push-object": (handlers.push_object, message_pb2.PushObjectRequest),
            "pull-object": (handlers.pull_object, message_pb2.PullObjectRequest),
            "confirm-message-received": (handlers.confirm_message_received, message_pb2.ConfirmMessageReceivedRequest),
        }[what]
        try:
            return handle(kind.FromString(body), self.state, task).SerializeToString()  # type: ignore[operator]
        except Exception:  # as the SuperLink's own server
            return None

    def _take_up(self) -> None:
        """Each node is handed one order after the other, as when it asks."""
        with self.taking:
            for node in self.nodes:
                while handed := self.state.get_message_ins(node, 1):
                    self.handed += handed
                    self.works(handed[0])

    def reply(self, order: Message, content: RecordDict | Error, says: str = "") -> str:
        """A node's answer, with all its parts: its ID. says: the message that these say it answers, if another."""
        reply = self._made(order, content, says or order.metadata.message_id)
        parts = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
        tree = get_object_tree(reply)
        reply.metadata.__dict__["_reply_to_message_id"] = order.metadata.message_id
        self._store(reply, tree, parts)
        return reply.metadata.message_id

    def reply_with(self, order: Message, body: bytes) -> None:
        """A node's answer that is no Flower message inside, though its head and hash are right."""
        content = b"Message  %d\x00" % len(body) + body
        reply = self._made(order, RecordDict(), order.metadata.message_id)
        reply.metadata.__dict__["_message_id"] = get_object_id(content)
        self._store(reply, ObjectTree(object_id=get_object_id(content)), {get_object_id(content): content})

    def _made(self, order: Message, content: RecordDict | Error, says: str) -> Message:
        TaskIdentity.node_id = order.metadata.dst_node_id
        reply = Message(content, reply_to=order)  # type: ignore[arg-type]
        TaskIdentity.node_id = 1
        reply.metadata.__dict__["_reply_to_message_id"] = says
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def _store(self, reply: Message, tree: ObjectTree, parts: dict[str, bytes]) -> None:
        session = self.state.start_session(self.run_id)
        bare = remove_content_from_message(reply) if reply.has_content() else reply
        stored, missing = self.state.store_message_and_object_tree(bare, tree, session)
        assert stored, "the SuperLink does not take the reply"
        for key in missing:
            assert self.state.store_object(self.run_id, session, key, parts[key])
