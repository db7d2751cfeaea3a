"""Server sends `values` floats to every client, each sends back others; times of the rounds go to `out`.

Others, because Flower keeps and sends what it has seen before only once.

imports: modules, between spaces, that a client loads before it answers.
"""

import importlib
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    for name in str(context.run_config["imports"]).split():
        importlib.import_module(name)
    sent = message.content["arrays"]
    assert isinstance(sent, ArrayRecord)
    changed = sent["x"].numpy() * np.float32(1 + 0.01 * np.random.default_rng().random())
    content = RecordDict({"arrays": ArrayRecord({"x": Array(changed)}), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    arrays = ArrayRecord({"x": Array(np.random.default_rng(0).random(int(config["values"]), np.float32))})
    times = []
    FedAvg(fraction_evaluate=0.0).start(
        grid, arrays, int(config["rounds"]), evaluate_fn=lambda round, arrays: times.append(time.time())
    )
    Path(str(config["out"])).write_text(json.dumps(times))
