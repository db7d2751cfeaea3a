"""A redistribution policy: what is fitted best goes to another shard, where nobody has seen it yet.

python -m examples.policy [FOLDER]        # in a clone: a tiny run, in one process
ret-fl run --set redistribution.policy=examples.policy:PassOn+quarantine --set 'redistribution.options=top = 3'
"""

import sys
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field

from ret_fl.config import RedistributionConfig, Scalar
from ret_fl.ledger import Moves, ShardLedger
from ret_fl.protocol import TrainReport


class PassOn:
    """Each shard's best-fitted samples (lowest mean log-ratio) go to shards drawn at random."""

    class Settings(BaseModel):
        top: int = Field(3, ge=1, description="Samples that each shard passes on at a time.")

    def __init__(self, settings: Settings) -> None:
        self.top = settings.top

    def __call__(
        self,
        ledger: ShardLedger,
        reports: Sequence[TrainReport],
        rng: np.random.Generator,
        config: RedistributionConfig,
    ) -> Moves:
        if ledger.num_shards < 2:
            return Moves.none()
        ratio = ledger.log_loss_ratio()
        moves = []
        for report in reports:
            ids = ledger.ids(report.shard)
            for chosen in ids[np.argsort(ratio[ids])][: self.top]:  # NaN, not drawn yet, comes last
                target = (report.shard + int(rng.integers(1, ledger.num_shards))) % ledger.num_shards
                moves.append(Moves.between(chosen[None], report.shard, target))
        return Moves.join(moves)


if __name__ == "__main__":
    from simulations.inline import run_here

    settings: dict[str, Scalar] = {
        "redistribution.policy": "examples.policy:PassOn",
        "redistribution.options": "top = 2",
        "data.limit": 32,
        "num-server-rounds": 2,
        "local-epochs": 1,
        "evaluate-every": 0,
        "samples": 0,
    }
    print(run_here(settings, *sys.argv[1:]).summary.read_text())
