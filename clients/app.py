"""ClientApp: what Flower loads, in a process of its own for every order. It loads neither torch nor diffusers.

With `worker=true` in the node config (`flower-supernode --node-config`) a process that stays between orders carries
them out: see ret_fl/worker. Else, in simulation and inline, this process does.
"""

from __future__ import annotations

from functools import cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ret_fl.worker.calls import carried_out, load_app, wants_worker

TRAINING = "clients.training:app"

app = ClientApp()
_load = cache(load_app)  # a process does it once


@app.query()
@app.train()
def order(message: Message, context: Context) -> Message:
    """Answer a query, or train one shard for one round."""
    if wants_worker(context):
        return carried_out(message, context, TRAINING)
    return _load(TRAINING)(message, context)
