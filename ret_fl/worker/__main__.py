"""`python -m ret_fl.worker FOLDER JSON`: a SuperNode's worker. Client processes start it, nobody else does.

Orders are carried out one after the other. It ends where the process that its SuperNode starts clients with
(SuperExec) is gone, without orders for a while, with an order of another run or of other code, after an order that
raised something, and in the middle of an order whose client process is gone.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging import INFO
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from ret_fl.worker import frames
from ret_fl.worker.calls import began, load_app

TRANSFER_SECONDS = 60.0
"""How long a client process may take to receive one frame, or let one wait that it sends."""


@contextmanager
def ending_when_gone(*watched: tuple[int, int]) -> Iterator[None]:
    """Within, this process and all it has started are killed once an event happens on a descriptor that is polled.

    Training cannot be broken off otherwise. This process leads a process group of its own.
    """
    over, end = os.pipe()
    poll = select.poll()
    for descriptor, events in (*watched, (over, select.POLLIN)):
        poll.register(descriptor, events)

    def watch() -> None:
        if over not in {descriptor for descriptor, _ in poll.poll()}:
            log(INFO, "worker %d: the process it worked for is gone, and so is what it was doing", os.getpid())
            os.killpg(os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(end, b".")
        thread.join()
        os.close(over)
        os.close(end)


class Worker:
    """Serves the client processes of one SuperNode.

    owner: descriptor (pidfd) of its SuperExec. identity: what an order must have in common with it. idle: seconds it
    waits for an order.
    """

    def __init__(
        self,
        app: ClientApp,
        listener: socket.socket,
        socket_file: Path,
        owner: int,
        identity: dict[str, Any],
        idle: float,
    ) -> None:
        self.app, self.listener, self.socket_file = app, listener, socket_file
        self.owner, self.identity, self.idle = owner, identity, idle

    def serve(self) -> str:
        """Carry orders out until there is a reason to end, which it returns."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self.owner, select.POLLIN)
        try:
            while True:
                ready = {descriptor for descriptor, _ in poll.poll(1000 * self.idle)}
                if self.owner in ready:
                    return "its SuperNode ended"
                if not ready:
                    return f"no order for {self.idle:g} s"
                connection, _ = self.listener.accept()
                with connection:
                    connection.settimeout(TRANSFER_SECONDS)
                    try:
                        if reason := self._attend(connection):
                            return reason
                    except OSError as error:  # it is gone, or stuck, and so is its order: the next one, please
                        log(INFO, "worker %d: a client process was given up (%s)", os.getpid(), error)
                gc.collect()  # Flower's messages are circles, of hundreds of MB
        finally:
            self._leave()

    def _leave(self) -> None:
        """Those who wait in the queue, and whoever comes next, start another worker."""
        if self.listener.fileno() >= 0:
            self.socket_file.unlink(missing_ok=True)
            self.listener.close()

    def _parted(self, connection: socket.socket, reason: str, **told: Any) -> str:
        """Leave, and say why to the client process if it is still there; returns the reason."""
        self._leave()
        try:
            frames.send_told(connection, **told)
        except OSError as error:
            log(INFO, "worker %d: a client process is gone that was to be told of %s (%s)", os.getpid(), reason, error)
        return reason

    def _attend(self, connection: socket.socket) -> str:
        """One client process; returns why this process should end, '' if it should not."""
        if not frames.is_own(connection):
            frames.send_told(connection, refused="it is another user's")
            return ""
        asked = frames.receive_told(connection)
        if other := ", ".join(key for key in self.identity if asked.get(key) != self.identity[key]):
            return self._parted(connection, f"an order of another {other}", other=other)
        frames.send_told(connection, ready=True, pid=os.getpid())
        message, context = frames.receive_message(connection), frames.receive_context(connection)
        reply = self._carry_out(connection, message, context)
        if isinstance(reply, Exception):
            return self._parted(connection, f"an order raised {type(reply).__name__}", raised=_described(reply))
        frames.send_told(connection, raised=None)
        frames.send_frames(connection, *reply)
        frames.send_context(connection, context)
        return ""

    def _carry_out(self, connection: socket.socket, message: Message, context: Context) -> list[bytes] | Exception:
        with ending_when_gone((self.owner, select.POLLIN), (connection.fileno(), select.POLLRDHUP)):
            try:
                return frames.pack_message(self.app(message, context))
            except Exception as error:  # an app may raise anything; the client process raises the same
                return error


def _described(error: Exception) -> dict[str, str]:
    kind = type(error)
    return {
        "module": kind.__module__,
        "name": kind.__qualname__,
        "text": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def main() -> None:
    """Load the app and serve."""
    folder, about = Path(sys.argv[1]), json.loads(sys.argv[2])
    identity: dict[str, Any] = about["identity"]
    owner = os.pidfd_open(identity["owner"])
    if began(identity["owner"]) != identity["owner-began"]:
        sys.exit("the SuperNode that this was started for ended")
    listener = socket.socket(fileno=about["listener"])
    with ending_when_gone((owner, select.POLLIN)):
        app = load_app(about["app"], only=True)
    for descriptor in (1, 2):  # from here on into the SuperNode's log, as client processes do
        os.dup2(about["log"], descriptor)
    os.close(about["log"])
    log(INFO, "worker %d: ready for the orders of run %d", os.getpid(), identity["run"])
    reason = Worker(app, listener, folder / "socket", owner, identity, about["idle"]).serve()
    log(INFO, "worker %d ended: %s", os.getpid(), reason)


if __name__ == "__main__":
    main()
