"""A gate: where AGC skips a sample or not, this one lets its weight fall.

python -m examples.gate [FOLDER]        # in a clone: a tiny run, in one process
ret-fl run --set agc.mode=examples.gate:Soft --set 'agc.options=low = 0.5'
"""

import sys

from pydantic import BaseModel, Field
from torch import Tensor

from ret_fl.config import AgcConfig, Scalar
from ret_fl.mitigation.agc import Seen
from ret_fl.mitigation.taa import threshold_ratio


class Soft:
    """Weights fall from 1 at AGC's threshold to 0 at a share of it."""

    class Settings(BaseModel):
        low: float = Field(0.5, ge=0, lt=1, description="Share of the threshold at which a weight is 0.")

    def __init__(self, settings: Settings) -> None:
        self.low = settings.low

    def __call__(self, loss: Tensor, t: Tensor, seen: Seen, config: AgcConfig) -> Tensor:
        ratio = threshold_ratio(loss, seen.bank.value(t), config.mem_ratio)
        weight = ((ratio - self.low) / (1 - self.low)).clamp(0, 1)
        return weight.masked_fill(t >= config.t_max, 1.0)


if __name__ == "__main__":
    from simulations.inline import run_here

    settings: dict[str, Scalar] = {
        "agc.mode": "examples.gate:Soft",
        "agc.options": "low = 0.5",
        "agc.bias-correct": True,  # else losses seem high beside a bank that is still filling
        "agc.bins": 5,
        "shards": 2,
        "batch-size": 4,
        "data.limit": 32,
        "num-server-rounds": 2,
        "local-epochs": 1,
        "evaluate-every": 0,
        "samples": 0,
    }
    print(run_here(settings, *sys.argv[1:]).summary.read_text())
