"""Replies averaged as they arrive, so that the server holds one mean instead of K models."""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords, aggregate_metricrecords

from ret_fl.protocol import ARRAYS, METRICS, NUM_EXAMPLES, TrainReport, base_content, find
from ret_fl.serveroptimizer import ServerOptimizer

HAND_ON_THE_MEAN = (FedAvg, FedProx)
NEED_THE_MEAN_ONLY = (*HAND_ON_THE_MEAN, FedAvgM, FedAdam, FedYogi, FedAdagrad)


def needs_the_mean_only(base: Strategy) -> bool:
    """Whether a strategy makes of many replies what it makes of one that is their weighted mean.

    So do Flower's own that average first. A median, Krum, clipping and whatever is derived from these classes are given
    all replies.
    """
    if isinstance(base, ServerOptimizer):
        return needs_the_mean_only(base.strategy)
    return (
        type(base) in NEED_THE_MEAN_ONLY
        and isinstance(base, FedAvg)
        and base.weighted_by_key == NUM_EXAMPLES
        and base.train_metrics_aggr_fn is aggregate_metricrecords
    )


class RunningMean:
    """The mean of replies so far, weighted by their examples: Flower's averaging of two, one array after the other.

    content: it as one reply, of as many examples as all of them; None before the first.
    """

    def __init__(self) -> None:
        self.content: RecordDict | None = None
        self.examples = 0

    def add(self, weights: ArrayRecord, report: TrainReport) -> None:
        """Take over a reply: its weights become the mean, or are empty afterwards."""
        new = base_content(weights, report)
        self.examples += report.num_examples
        if self.content is None:
            self.content = new
            return
        (mean, told), (_, fresh) = _parts(self.content), _parts(new)
        for name in list(weights):
            pair = [ArrayRecord({name: mean[name]}), ArrayRecord({name: weights.pop(name)})]
            contents = [RecordDict({ARRAYS: one, METRICS: by}) for one, by in zip(pair, (told, fresh), strict=True)]
            mean[name] = aggregate_arrayrecords(contents, NUM_EXAMPLES)[name]
            for one in pair:
                one.clear()  # see protocol.find: Flower has looked at the contents, which stay for a while
        told.update(_mean_metrics([told, fresh]))
        told[NUM_EXAMPLES] = self.examples

    def through(
        self, base: Strategy, server_round: int, reply: Message
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `base` makes of the mean, given to it as the one `reply` there is; the mean is then used up.

        FedAvg multiplies it by 1, in two copies more: they are spared.
        """
        assert self.content is not None, "there is no mean before the first reply"
        content, self.content = self.content, None
        mean, told = _parts(content)
        if type(base) in HAND_ON_THE_MEAN:
            return mean, _mean_metrics([told])
        reply.content = content
        arrays, metrics = base.aggregate_train(server_round, [reply])
        mean.clear()
        return arrays, metrics


def _parts(content: RecordDict) -> tuple[ArrayRecord, MetricRecord]:
    arrays, metrics = find(content, ARRAYS, ArrayRecord), find(content, METRICS, MetricRecord)
    assert arrays is not None and metrics is not None, "base_content makes both"
    return arrays, metrics


def _mean_metrics(metrics: list[MetricRecord]) -> MetricRecord:
    """Flower's mean of them, each by its examples."""
    return aggregate_metricrecords([RecordDict({METRICS: one}) for one in metrics], NUM_EXAMPLES)
