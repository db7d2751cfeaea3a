"""The worker of a SuperNode: real processes on a real socket, ended in every way they may end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, fresh_weights
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_to_proto
from flwr.supercore.task_identity import TaskIdentity
from orders import make_order

from clients.app import app as client_app
from ret_fl.config import RunConfig
from ret_fl.deploy.local import workers
from ret_fl.packing import pack_state, unpack_state
from ret_fl.protocol import Hello, TrainReport
from ret_fl.worker import frames
from ret_fl.worker.__main__ import Worker
from ret_fl.worker.calls import Place, WorkerError, wants_worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

Tiny = Callable[..., RunConfig]

NODE = 77

APP = """
import ctypes, os, signal, sys, time
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

# {mark}
app = ClientApp()


class Odd(Exception):
    pass


@app.query()
@app.train()
def do(message, context):
    asked = message.content["asked"]
    what = asked["what"]
    print("begun", what, flush=True)
    if what == "raise":
        raise Odd("no such luck")
    if what == "import":
        import no_such_module
    if what == "wait":
        while not os.path.exists(asked["until"]):
            time.sleep(0.02)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    context.state["seen"] = ConfigRecord({{"orders": context.state.get("seen", {{"orders": 0}})["orders"] + 1}})
    visible = os.environ.get("GPU", "")
    told = ConfigRecord({{"pid": os.getpid(), "node": context.node_config["device"], "visible": visible}})
    return Message(RecordDict({{"told": told, "weights": message.content["weights"]}}), reply_to=message)
"""

CLIENT = """
import sys, time
from pathlib import Path
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context, Message
from ret_fl.worker import calls

calls.QUERY_SECONDS = 0.5
folder, name = Path(sys.argv[1]), sys.argv[2]
message = message_from_proto(Message.FromString((folder / f"{name}.message").read_bytes()))
message.metadata.__dict__["_created_at"] = time.time()  # however long this process took to begin
context = context_from_proto(Context.FromString((folder / f"{name}.context").read_bytes()))
try:
    if sys.argv[3] == "clients.app":
        from clients.app import app
        reply = app(message, context)
        sys.modules.pop("torch")
    else:
        reply = calls.carried_out(message, context, sys.argv[3])
except Exception as error:
    sys.exit(str(type(error)) + ":<'" + str(error) + "'>" + "".join(getattr(error, "__notes__", [])))
assert "torch" not in sys.modules
(folder / f"{name}.reply").write_bytes(message_to_proto(reply).SerializeToString())
(folder / f"{name}.after").write_bytes(context_to_proto(context).SerializeToString())
"""
"""A client process of Flower's: its parent is what the worker belongs to."""

OWNER = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
"""A SuperExec: starts a client process and stays."""


def order(
    run: int = 1,
    node: int = NODE,
    content: RecordDict | None = None,
    ttl: float | None = None,
    kind: str = "train",
    **asked: str,
) -> Message:
    weights = ArrayRecord({"w": Array(np.arange(1000, dtype=np.float32))})
    content = content or RecordDict({"asked": ConfigRecord({**asked}), "weights": weights})
    with pytest.MonkeyPatch.context() as patched:  # without a task there are no messages
        for name, value in {"_run_id": run, "_node_id": 1, "_task_id": 1}.items():
            patched.setattr(TaskIdentity, name, value)
        message = Message(content, node, kind, ttl=ttl)
    message.metadata.__dict__["_message_id"] = f"message-{run}"
    return message


class Client:
    """One client process and its files."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, name: str) -> None:
        self.process, self.folder, self.name = process, folder, name

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def await_word(self, word: str) -> None:
        until(lambda: word in self.log)

    def failure(self) -> str:
        assert self.process.wait(60) == 1, self.log
        return self.log

    def reply(self) -> Message:
        assert self.process.wait(60) == 0, self.log
        return frames.message_from_proto(
            frames.ProtoMessage.FromString((self.folder / f"{self.name}.reply").read_bytes())
        )

    def orders_seen(self) -> int:
        after = frames.ProtoContext.FromString((self.folder / f"{self.name}.after").read_bytes())
        return int(frames.context_from_proto(after).state.config_records["seen"]["orders"])  # type: ignore[call-overload]

    def worker(self) -> int:
        return int(self.reply().content.config_records["told"]["pid"])  # type: ignore[call-overload]


class Node:
    """A SuperNode whose SuperExec is this process, unless it is given another."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        # longer than a Unix socket's address may be
        self.state = folder / "a-folder-with-a-long-name" / ("of-more-than-a-hundred-letters" * 5)
        self.app = folder / "orders_app.py"
        self.write_app()

    def write_app(self, mark: str = "") -> None:
        self.app.write_text(APP.format(mark=mark))

    def send(
        self,
        message: Message,
        *,
        node: int = NODE,
        app: str = "orders_app:app",
        owner: bool = False,
        env: dict[str, str] | None = None,
        **config: bool | float | str,
    ) -> Client:
        self.count += 1
        name = f"client-{self.count}"
        told: dict[str, bool | int | float | str] = {"worker": True, "state-dir": str(self.state), "device": "cpu"}
        context = Context(message.metadata.run_id, node, told | config, RecordDict(), {})
        (self.folder / f"{name}.message").write_bytes(frames.message_to_proto(message).SerializeToString())
        (self.folder / f"{name}.context").write_bytes(context_to_proto(context).SerializeToString())
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *([sys.executable, "-c", OWNER] if owner else []),
                    *(sys.executable, "-c", CLIENT, str(self.folder), name, app),
                ],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"} | (env or {}),
                stdout=log,
                stderr=log,
            )
        return Client(process, self.folder, name)

    def workers(self) -> set[int]:
        return {process.pid for process in workers(self.state) if process.status() != psutil.STATUS_ZOMBIE}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for pid in made.workers():
        os.kill(pid, signal.SIGKILL)


def gone(node: Node) -> None:
    until(lambda: not node.workers())


def test_what_flower_loads_for_an_order_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, clients.app; print(sorted({'torch', 'diffusers', 'pydantic', 'scipy'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_orders_go_to_one_worker_that_ends_when_there_are_none(node: Node) -> None:
    first, second = (node.send(order(what="go"), **{"worker-idle": 3.0}) for _ in range(2))
    assert first.worker() == second.worker() and node.workers() == {first.worker()}
    assert sorted([first.orders_seen(), second.orders_seen()]) == [1, 1]  # each has the state of its own context
    reply = second.reply()
    assert reply.metadata.reply_to_message_id == "message-1"
    np.testing.assert_array_equal(reply.content.array_records["weights"]["w"].numpy(), np.arange(1000))
    (folder,) = node.state.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    said = first.log + second.log  # of either, whichever has started it
    assert f"worker {first.worker()}: ready for the orders of run 1" in said and "begun go" in said
    gone(node)
    assert "no order for 3 s" in first.log + second.log
    assert not (folder / "socket").exists()


def test_what_an_order_raises_is_raised_by_the_client_process_and_the_next_order_has_another_worker(node: Node) -> None:
    before = node.send(order(what="go")).worker()
    said = node.send(order(what="raise")).failure()
    assert "<class 'orders_app.Odd'>:<'no such luck'>" in said and 'raise Odd("no such luck")' in said
    said = node.send(order(what="import")).failure()
    assert "<class 'ModuleNotFoundError'>:<'No module named 'no_such_module''>" in said
    after = node.send(order(what="go"))
    assert after.worker() != before and node.workers() == {after.worker()}


def test_a_client_process_killed_in_an_order_takes_its_worker_along(node: Node) -> None:
    client = node.send(order(what="wait", until="/never"))
    client.await_word("begun wait")
    (worker,) = node.workers()
    waiting = node.send(order(what="go"))  # in the queue of the worker that ends
    until(lambda: bool(psutil.Process(waiting.process.pid).net_connections("unix")))
    client.process.kill()
    assert waiting.worker() != worker
    assert node.workers() == {waiting.worker()}


def test_a_query_is_answered_while_an_order_is_in_the_worker(node: Node, tiny: Tiny, tmp_path: Path) -> None:
    busy = node.send(order(what="wait", until=str(tmp_path / "go on")))
    busy.await_word("begun wait")
    asked = order(content=Hello.request(tiny()), kind="query")
    query = node.send(asked, app="clients.app", **{"partition-id": 3.0})
    assert Hello.unpack(query.reply().content).partition == 3
    assert "the worker did not take a query up" in query.log
    assert busy.process.poll() is None
    (tmp_path / "go on").touch()
    busy.reply()


def test_an_order_that_hangs_is_given_up_when_its_time_to_live_is_over_and_its_worker_ends(node: Node) -> None:
    first = node.send(order(what="go"))  # whose log is the worker's
    first.reply()
    hanging = node.send(order(what="wait", until="/never", ttl=15.0))
    first.await_word("begun wait")
    (worker,) = node.workers()
    behind = node.send(order(what="go", ttl=1.0))
    assert "WorkerError" in behind.failure() and "did not take the order up: 1 s (round-timeout)" in behind.log
    said = hanging.failure()
    assert "WorkerError" in said and f"the worker (process {worker}) was given up: 15 s (round-timeout) after" in said
    gone(node)
    assert node.send(order(what="go")).worker() != worker


def test_a_worker_killed_in_an_order_is_an_error_that_says_so(node: Node) -> None:
    client = node.send(order(what="wait", until="/never"))
    client.await_word("begun wait")
    (worker,) = node.workers()
    os.kill(worker, signal.SIGKILL)
    said = client.failure()
    assert "WorkerError" in said and f"the worker (process {worker}) ended with the order in it" in said
    assert node.send(order(what="die")).failure().count("ended with the order in it") == 1
    assert node.send(order(what="go")).worker() != worker


def test_a_worker_of_another_run_or_code_is_replaced_and_a_stale_socket_is_no_hindrance(node: Node) -> None:
    first = node.send(order(what="go")).worker()
    os.kill(first, signal.SIGKILL)  # which leaves its socket
    second = node.send(order(what="go")).worker()
    other_run = node.send(order(run=2, what="go")).worker()
    node.write_app("edited")
    other_code = node.send(order(run=2, what="go")).worker()
    assert len({first, second, other_run, other_code}) == 4
    until(lambda: node.workers() == {other_code})


@pytest.mark.parametrize(("run", "reason"), [(2, "an order of another run"), (1, "an order raised ValueError")])
def test_a_worker_ends_in_order_where_nobody_is_left_to_be_told_why(tmp_path: Path, run: int, reason: str) -> None:
    app, address = ClientApp(), str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(address)
        listener.listen()
        client.connect(address)

        @app.train()
        def raising(message: Message, context: Context) -> Message:
            client.shutdown(socket.SHUT_RD)  # what is sent to it from now on is a broken pipe
            raise ValueError("no such luck")

        frames.send_told(client, run=run)
        frames.send_frames(client, *frames.pack_message(order()))
        frames.send_context(client, Context(1, NODE, {}, RecordDict(), {}))
        if run == 2:
            client.close()
        owner = os.pidfd_open(os.getpid())
        try:
            assert Worker(app, listener, tmp_path / "socket", owner, {"run": 1}, 5.0).serve() == reason
        finally:
            os.close(owner)
    assert not (tmp_path / "socket").exists()


def test_each_supernode_has_a_worker_of_its_own_with_its_environment(node: Node) -> None:
    first = node.send(order(what="go"), env={"GPU": "0"})
    second = node.send(order(node=78, what="go"), node=78, device="cuda", env={"GPU": "1"})
    told = [dict(client.reply().content.config_records["told"]) for client in (first, second)]
    assert [(t["node"], t["visible"]) for t in told] == [("cpu", "0"), ("cuda", "1")]
    assert len(node.workers()) == 2


@pytest.mark.parametrize("what", ["go", "wait"])
def test_a_worker_ends_with_the_superexec_it_belongs_to(node: Node, what: str) -> None:
    superexec = node.send(order(what=what, until="/never"), owner=True)
    superexec.await_word(f"begun {what}")
    if what == "go":
        until((node.folder / "client-1.after").exists)
    assert len(node.workers()) == 1
    children = psutil.Process(superexec.process.pid).children()
    superexec.process.kill()
    superexec.process.wait()
    gone(node)
    for child in children:
        child.kill()


def test_a_worker_that_cannot_start_is_an_error_with_the_end_of_its_log(node: Node) -> None:
    node.app.write_text("raise OSError('the driver is too old')")
    said = node.send(order(what="go")).failure()
    assert "the worker cannot start: exit code 1" in said and "OSError: the driver is too old" in said
    assert not node.workers()
    node.write_app()
    assert node.send(order(what="go")).worker()


def test_a_folder_that_is_not_ones_own_is_refused(node: Node, tmp_path: Path) -> None:
    context = Context(1, NODE, {"worker": True, "state-dir": str(tmp_path / "state")}, RecordDict(), {})
    (tmp_path / "state").mkdir()
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "state" / f"worker-{NODE}").symlink_to(tmp_path / "open")
    with pytest.raises(WorkerError, match="a link or another user's"):
        Place.of(context)
    context.node_config["state-dir"] = "/proc"
    with pytest.raises(WorkerError, match="name another state-dir"):
        Place.of(context)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"worker": "yes"}, "true or false, without quotes"), ({"worker": 1}, "node config worker=1")],
)
def test_a_node_config_that_says_neither_is_refused(config: dict[str, str | int], message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        wants_worker(Context(1, NODE, dict(config), RecordDict(), {}))


def test_an_idle_time_that_is_none_is_refused(node: Node) -> None:
    assert (
        "worker-idle=0: it must be a number of seconds" in node.send(order(what="go"), **{"worker-idle": 0}).failure()
    )


def test_shards_trained_by_a_worker_are_those_trained_here(node: Node, tiny: Tiny) -> None:
    config = tiny({"local-epochs": 2})
    weights = fresh_weights(config)
    asked = make_order(config)
    content = asked.pack(pack_state(weights))
    clients = [node.send(order(content=content), app="clients.training:app") for _ in range(2)]
    replies = [client.reply() for client in clients]
    shutil.rmtree(node.state, ignore_errors=True)
    expected = client_app(order(content=content), Context(1, NODE, {"device": "cpu"}, RecordDict(), {}))
    for reply in (*replies, expected):
        report, got = TrainReport.unpack(reply.content)
        _, wanted = TrainReport.unpack(expected.content)
        assert got is not None and wanted is not None and report.num_examples == len(asked.ids)
        for name, value in unpack_state(wanted).items():
            np.testing.assert_array_equal(unpack_state(got)[name], value, err_msg=name)
    said = "".join(client.log for client in clients)
    assert said.count("order begun") == said.count("order done") == 2
    wrong = make_order(config, fingerprint="0" * 64).pack(pack_state(weights))
    said = node.send(order(content=wrong), app="clients.training:app").failure()
    assert "<class 'clients.training.WrongDataError'>:<'the order is about data 0000000000000000" in said
