"""A run's status as Prometheus metrics, read at every scrape from what the server writes: scrapes cannot hold it up."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ret_fl.config import ConfigError
from ret_fl.rundir import RunDir
from ret_fl.status import RunStatus, read_status

ROW = {
    "loss": "Mean loss of the last round.",
    "skip_rate": "Share of draws that AGC skipped in the last round.",
    "moved": "Samples that changed shard after the last round.",
    "quarantined": "Samples in quarantine.",
    "images_per_second": "Images trained on a second in the last round, all shards together.",
    "train_loss": "Loss of the averaged model on training images.",
    "held_out_loss": "Loss of the averaged model on held-out images.",
}
SHARD = {
    "loss": "Mean loss of the shard's last round.",
    "skip_rate": "Share of the shard's draws that AGC skipped in its last round.",
    "samples": "Samples of the shard.",
}


class RunCollector(Collector):
    """Metrics ret_fl_* of one run, labelled with the name of its folder."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All metrics as of now."""
        status = read_status(self.run)
        name = self.run.path.name
        single = {
            "rounds": ("Rounds the run will have.", status.rounds),
            "round": ("Rounds that are finished.", status.done),
            "finished": ("1 once results are written.", int(status.finished)),
            "failures": ("Orders that failed, nodes gone or refused, since the server started.", len(status.failures)),
            "seen_timestamp_seconds": ("When the server last said something.", status.seen),
        } | {key: (what, (status.last or {}).get(key)) for key, what in ROW.items()}
        for key, (what, value) in single.items():
            yield self._family(f"ret_fl_{key}", what, [], [([], value)], name)
        for key, what in SHARD.items():
            values = [([str(s.shard)], getattr(s, key)) for s in status.shards.values()]
            yield self._family(f"ret_fl_shard_{key}", what, ["shard"], values, name)
        yield from self._nodes(status, name)

    def _nodes(self, status: RunStatus, name: str) -> Iterator[GaugeMetricFamily]:
        nodes = {str(n.node): n for n in status.nodes.values()}
        for key, what, value in (
            ("up", "1 while Flower hears from the node and its data are right.", lambda n: int(n.there)),
            ("images_per_second", "Images trained on a second by the node.", lambda n: n.speed),
            ("orders", "Shards the node is at work on.", lambda n: len(n.orders)),
            ("seen_timestamp_seconds", "When the node last said something.", lambda n: n.seen or None),
        ):
            values = [([node], value(n)) for node, n in nodes.items()]
            yield self._family(f"ret_fl_node_{key}", what, ["node"], values, name)

    @staticmethod
    def _family(
        key: str, what: str, labels: list[str], values: list[tuple[list[str], float | None]], run: str
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(key, what, labels=["run", *labels])
        for of, value in values:
            if value is not None and math.isfinite(value):
                family.add_metric([run, *of], value)
        return family


def serve(run: RunDir, host: str, port: int) -> None:
    """Answer scrapes of http://host:port/metrics until interrupted. Raises `ConfigError` if the port is taken."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(run))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"--prometheus {host}:{port}: {error}") from None
    while True:
        time.sleep(3600)
