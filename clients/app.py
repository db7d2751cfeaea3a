"""ClientApp: what Flower loads, in a process of its own for every order. It loads neither torch nor diffusers.

With `worker=true` in the node config (`flower-supernode --node-config`) a process that stays between orders carries
them out: see ret_fl/worker. Else, in simulation and inline, this process does, and so it does where a query finds the
worker busy.
"""

from __future__ import annotations

import sys
from functools import cache
from logging import INFO
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from ret_fl.worker.calls import WorkerBusyError, carried_out, load_app, wants_worker

TRAINING = "clients.training:app"

app = ClientApp()


@cache
def _loaded() -> ClientApp:
    """Once a process. Flower's process for one order has nothing else in it; Ray's actors and a whole run do."""
    return load_app(TRAINING, only=Path(sys.argv[0]).name == "flwr-clientapp")


@app.query()
@app.train()
def order(message: Message, context: Context) -> Message:
    """Answer a query, or train one shard for one round."""
    if wants_worker(context):
        try:
            return carried_out(message, context, TRAINING)
        except WorkerBusyError as error:
            log(INFO, "%s: this process answers it", error)
    return _loaded()(message, context)
