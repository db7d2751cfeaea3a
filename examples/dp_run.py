"""A tiny run with differential privacy of its shards, and what it gives away.

python -m examples.dp_run [FOLDER]        # in a clone, with the extra [dp], in one process

Four shards share 32 digits; the update of each is clipped to norm 1, and noise is added to their mean.
docs/differential-privacy.md says what the numbers mean.
"""

import sys

from ret_fl.config import Scalar

SETTINGS: dict[str, Scalar] = {
    "shards": 4,
    "data.limit": 32,
    "num-server-rounds": 2,
    "local-epochs": 1,
    "dp.mode": "server-fixed",
    "dp.noise-multiplier": 4.0,
    "dp.clipping-norm": 1.0,
    # what could tell of a shard beside its update is off: with dp.mode on ret-fl insists on it
    "agc.mode": "off",
    "redistribution.policy": "none",
    "data.duplicates": "keep",
    "quorum": 1.0,
    "evaluate-every": 0,
    "samples": 0,
}


if __name__ == "__main__":
    from simulations.inline import run_here

    for row in run_here(SETTINGS, *sys.argv[1:]).rows():
        print(f"round {row['round']}: epsilon {row['epsilon']:.3f} at delta {row['delta']:g}, for a whole shard")
