"""Replies averaged as they arrive, so that the server holds one mean instead of K models."""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords, aggregate_metricrecords

from ret_fl.protocol import ARRAYS, METRICS, NUM_EXAMPLES, TrainReport, base_content

HAND_ON_THE_MEAN = (FedAvg, FedProx)
NEED_THE_MEAN_ONLY = (*HAND_ON_THE_MEAN, FedAvgM, FedAdam, FedYogi, FedAdagrad)


def needs_the_mean_only(base: Strategy) -> bool:
    """Whether a strategy makes of many replies what it makes of one that is their weighted mean.

    So do Flower's own that average first. A median, Krum, clipping and whatever is derived from these classes are given
    all replies.
    """
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
        """Take in a reply, whose weights need not be kept."""
        new = base_content(weights, report)
        self.examples += report.num_examples
        if self.content is None:
            self.content = new
            return
        both = [(content.array_records[ARRAYS], content.metric_records[METRICS]) for content in (self.content, new)]
        mean, told = both[0]
        for name in weights:
            pair = [RecordDict({ARRAYS: ArrayRecord({name: arrays[name]}), METRICS: by}) for arrays, by in both]
            mean[name] = aggregate_arrayrecords(pair, NUM_EXAMPLES)[name]
        pair = [RecordDict({METRICS: by}) for _, by in both]
        told.update(aggregate_metricrecords(pair, NUM_EXAMPLES))
        told[NUM_EXAMPLES] = self.examples

    def through(
        self, base: Strategy, server_round: int, reply: Message
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What `base` makes of the mean, given to it as the one reply there is.

        FedAvg multiplies it by 1, in two copies more: they are spared.
        """
        assert self.content is not None, "there is no mean before the first reply"
        if type(base) in HAND_ON_THE_MEAN:
            return self.content.array_records[ARRAYS], aggregate_metricrecords([self.content], NUM_EXAMPLES)
        reply.content = self.content
        return base.aggregate_train(server_round, [reply])
