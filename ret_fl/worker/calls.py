"""The client process's side: find this SuperNode's worker, or start it; hand an order over, take the answer back."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp

from ret_fl.files import user_cache
from ret_fl.worker import frames

WORKER, IDLE = "worker", "worker-idle"
"""Keys of the node config: whether a worker carries orders out (bool), and the seconds it waits for the next."""

IDLE_SECONDS = 600.0
PROTOCOL = 1
LOG_LINES = 8
END_SECONDS = 10.0
QUERY_SECONDS = 10.0
"""How long a query waits for a worker that is busy: a resumed run asks who is there while an old order is trained."""


class WorkerError(RuntimeError):
    """The worker cannot be had, or ended with an order in it."""


class WorkerBusyError(WorkerError):
    """The worker has another order in it, and what is asked for is not worth waiting."""


class RaisedInWorker(Exception):  # noqa: N818  each has the name of what was raised
    """What an order raised in the worker; Flower tells the server the name of its class and its text."""


def load_app(app: str, *, only: bool) -> ClientApp:
    """The ClientApp at "module:name". What it loads stays to the end of this process.

    So Python need not look for garbage in it: not while it loads (a quarter of the time); nor at the end (a second of
    a core), which `only`, that this process is there for nothing but the app, takes for granted of all there is.
    """
    module, _, name = app.partition(":")
    was_on = gc.isenabled()
    gc.disable()
    try:
        loaded: ClientApp = getattr(import_module(module), name)
    finally:
        if was_on:
            gc.enable()
    if only:
        gc.freeze()
    return loaded


def wants_worker(context: Context) -> bool:
    """Whether this node's config asks for a worker. Raises `WorkerError` for a value that says neither."""
    asked = context.node_config.get(WORKER, False)
    if not isinstance(asked, bool):
        raise WorkerError(f"node config {WORKER}={asked!r}: true or false, without quotes, are what it may be")
    if asked and sys.platform != "linux":
        raise WorkerError(f"node config {WORKER}=true needs Linux: leave it out on this host")
    return asked


def carried_out(message: Message, context: Context, app: str) -> Message:
    """The answer of `app` ("module:name", a ClientApp), loaded by this SuperNode's worker, to a message.

    Raises what the order raised there, by name and text; `WorkerError` if the worker ended first, or has not answered
    when the message's time to live (`round-timeout`, by the server's clock) is over, which ends a worker that has the
    order; `WorkerBusyError` for a query that was not taken up within `QUERY_SECONDS`.
    """
    place = Place.of(context)
    identity = _identity(context, app)
    while True:
        connection, started = place.connect(identity, app, _idle_seconds(context))
        with connection:
            try:
                # one that this call has started is not busy: it loads
                short = message.metadata.message_type == MessageType.QUERY and not started
                connection.settimeout(min(QUERY_SECONDS, _seconds_left(message)) if short else _seconds_left(message))
                frames.send_told(connection, **identity)
                greeting = frames.receive_told(connection)
            except TimeoutError:
                if started:
                    started.kill()
                if short:
                    raise WorkerBusyError(f"the worker did not take a query up within {QUERY_SECONDS:g} s") from None
                raise WorkerError(f"the worker did not take the order up: {_too_late(message)}") from None
            except OSError:
                # it ended before it took this order up, of which nothing is done: the next one may
                if started:
                    raise WorkerError(f"the worker cannot start: {place.log_tail(started)}") from None
                continue
            if greeting.get("ready"):
                return _handed_over(connection, message, context, greeting.get("pid"))
            if "refused" in greeting:
                raise WorkerError(f"the worker refuses this client process: {greeting['refused']}")


def _handed_over(connection: socket.socket, message: Message, context: Context, pid: Any) -> Message:
    try:
        connection.settimeout(_seconds_left(message))
        frames.send_frames(connection, *frames.pack_message(message))
        frames.send_context(connection, context)
        connection.settimeout(_seconds_left(message))
        told = frames.receive_told(connection)
        if raised := told.get("raised"):
            raise _as_raised(raised)
        reply = frames.receive_message(connection)
        context.state = frames.receive_context(connection).state
    except TimeoutError:  # the caller closes the connection, on which the worker kills itself, whatever it hangs in
        raise WorkerError(f"the worker (process {pid}) was given up: {_too_late(message)}") from None
    except OSError as error:
        raise WorkerError(
            f"the worker (process {pid}) ended with the order in it ({error}); its last words are in the log of this "
            "SuperNode. The next order starts another"
        ) from None
    return reply


def _seconds_left(message: Message) -> float:
    """Until the message's time to live is over. Raises `TimeoutError` if it is."""
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    if left <= 0:
        raise TimeoutError
    return left


def _too_late(message: Message) -> str:
    return (
        f"{message.metadata.ttl:g} s (round-timeout) after the server sent it, its answer would be too late. Is it "
        "stuck, in a driver or a network disk? If not, set server's and node's clocks right, or raise round-timeout"
    )


def _as_raised(told: dict[str, str]) -> RaisedInWorker:
    """An exception whose class reads as the worker's does, which may be one of torch's, not loaded here."""
    error: RaisedInWorker = type(told["name"], (RaisedInWorker,), {"__module__": told["module"]})(told["text"])
    error.add_note(f"In the worker:\n{told['traceback']}")
    return error


def _idle_seconds(context: Context) -> float:
    told = context.node_config.get(IDLE, IDLE_SECONDS)
    if isinstance(told, bool) or not isinstance(told, int | float) or not 0 < told < float("inf"):
        raise WorkerError(f"node config {IDLE}={told!r}: it must be a number of seconds above 0")
    return float(told)


def _identity(context: Context, app: str) -> dict[str, Any]:
    """What a worker must have in common with the order it is to carry out."""
    owner = os.getppid()
    if owner == 0:
        raise WorkerError(
            f"node config {WORKER}=true needs client processes that Flower's SuperExec starts as its own: leave it out"
        )
    return {
        "protocol": PROTOCOL,
        "owner": owner,
        "owner-began": began(owner),
        "node": context.node_id,
        "run": context.run_id,
        "code": _code(app),
    }


def began(pid: int) -> int:
    """When a process began, in the kernel's ticks: with its number it names the process for ever. -1 if it is gone.

    psutil's create_time is that by a clock which may be set in between.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1


def _code(app: str) -> str:
    """A digest of the Python code that a worker would run: ret_fl's and the app's."""
    digest = hashlib.sha256()
    for package in ("ret_fl", app.partition(":")[0].partition(".")[0]):
        spec = find_spec(package)
        if spec is None:
            raise WorkerError(f"{app}: there is no {package}")
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        for path in [path for folder in folders for path in sorted(folder.rglob("*.py"))] or [Path(str(spec.origin))]:
            digest.update(f"{path}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """The folder of a SuperNode's worker: its socket, its log while it starts, a lock for starting it."""

    folder: Path

    @classmethod
    def of(cls, context: Context) -> Place:
        """Below the node's state-dir if its config names one, else the user's runtime dir or cache; private (0700).

        Raises `WorkerError` if the folder is somebody else's.
        """
        state, runtime = context.node_config.get("state-dir"), os.environ.get("XDG_RUNTIME_DIR")
        root = Path(str(state)) if state else Path(runtime) / "ret-fl" if runtime else user_cache("workers")
        folder = root.expanduser().absolute() / f"worker-{context.node_id}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat()
            if folder.is_symlink() or about.st_uid != os.getuid():
                raise WorkerError(f"{folder} is a link or another user's: delete it, or name another state-dir")
            folder.chmod(0o700)
        except OSError as error:
            raise WorkerError(
                f"{folder} cannot be used for a worker's socket ({error}): name another state-dir"
            ) from None
        return cls(folder)

    @property
    def log(self) -> Path:
        return self.folder / "start.log"

    @contextmanager
    def _address(self) -> Iterator[str]:
        """The socket's address, short as Unix sockets want it (108 bytes) however long the folder's path is."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{descriptor}/socket"
        finally:
            os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within, no other process starts a worker here."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def connect(
        self, identity: dict[str, Any], app: str, idle: float
    ) -> tuple[socket.socket, subprocess.Popen[bytes] | None]:
        """A connection to the worker, and its process if this call has started it.

        One that starts has the connection waiting in its socket's queue. Raises `WorkerError` if it is another user's.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            with self._alone(), self._address() as address:
                try:
                    connection.connect(address)
                    started = None
                except (FileNotFoundError, ConnectionRefusedError):  # none yet, or one that has ended
                    started = self._start(address, connection, identity, app, idle)
            if not frames.is_own(connection):
                raise WorkerError(f"{self.folder}/socket is another user's: delete it, or name another state-dir")
            return connection, started
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise WorkerError(
                    f"no worker can be reached or started in {self.folder} ({error}): name another state-dir, or leave "
                    f"{WORKER} out of the node config"
                ) from None
            raise

    def _start(
        self, address: str, connection: socket.socket, identity: dict[str, Any], app: str, idle: float
    ) -> subprocess.Popen[bytes]:
        """Start a worker on a socket that listens, and is connected to, already.

        Until it has loaded it writes into a log of its own.
        """
        (self.folder / "socket").unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener, self.log.open("wb") as log, _duplicate(2) as told:
            listener.bind(address)
            listener.listen()
            connection.connect(address)
            about = {"identity": identity, "app": app, "idle": idle, "listener": listener.fileno(), "log": told}
            return subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "ret_fl.worker", str(self.folder), json.dumps(about)],
                # what this process finds, the worker is to find
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(listener.fileno(), told),
                start_new_session=True,
            )

    def log_tail(self, process: subprocess.Popen[bytes]) -> str:
        """How a worker that did not get to its first order ended, and the last it wrote."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        try:
            how = f"exit code {process.wait(END_SECONDS)}"
        except subprocess.TimeoutExpired:
            how = "it still runs"
        return f"{how}, {self.log} ends with\n" + "\n".join(lines)


@contextmanager
def _duplicate(descriptor: int) -> Iterator[int]:
    copy = os.dup(descriptor)
    try:
        yield copy
    finally:
        os.close(copy)
