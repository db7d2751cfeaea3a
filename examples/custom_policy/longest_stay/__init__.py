"""Samples that stayed longest go on: ret-fl run --set redistribution.policy=longest-stay."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ret_fl.config import RedistributionConfig
from ret_fl.ledger import Moves, ShardLedger
from ret_fl.protocol import TrainReport


class LongestStay:
    """Each shard passes on what it visited most often since it came; the next shard takes it."""

    class Settings(BaseModel):
        model_config = ConfigDict(extra="forbid")

        count: int = Field(1, ge=1, description="Samples that each shard passes on at a time.")
        least_visits: int = Field(1, ge=1, description="Visits since it came that a sample needs before it goes.")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(
        self,
        ledger: ShardLedger,
        reports: Sequence[TrainReport],
        rng: np.random.Generator,
        config: RedistributionConfig,
    ) -> Moves:
        if ledger.num_shards < 2:
            return Moves.none()
        moves = []
        for shard in range(ledger.num_shards):
            ids = ledger.ids(shard)
            stayed = ledger.recent_visits[ids]
            order = np.argsort(-stayed, kind="stable")[: self.settings.count]
            chosen = ids[order[stayed[order] >= self.settings.least_visits]]
            moves.append(Moves.between(chosen, shard, (shard + 1) % ledger.num_shards))
        return Moves.join(moves)
