"""Clipping on the client, by Flower's mods for it, where an order asks for it.

The mods want messages of one ArrayRecord and one ConfigRecord; orders and reports have more. They are shown the
weights, and the rest is put back behind them.
"""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable

from ret_fl.protocol import as_clipped_reply, as_order_to_clip, wanted_clipping


def clip_where_asked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod: clip the change of the weights in a reply to the norm its order names, if it names one."""
    mode = wanted_clipping(message.content)
    if mode is None:
        return call_next(message, context)
    order, kept = message.content, RecordDict()

    def train(narrowed: Message, context: Context) -> Message:
        narrowed.content = order
        reply = call_next(narrowed, context)
        if reply.has_content():
            nonlocal kept
            kept = reply.content
            reply.content = as_clipped_reply(kept)
        return reply

    message.content = as_order_to_clip(order)
    try:
        reply = (adaptiveclipping_mod if mode == "client-adaptive" else fixedclipping_mod)(message, context, train)
    finally:
        message.content = order
    if reply.has_content():
        reply.content = RecordDict({**kept, **reply.content})
    return reply
