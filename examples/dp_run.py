"""A tiny run with differential privacy of its shards, in one process, and what it gives away.

    python -m examples.dp_run [FOLDER]

from a clone of ret-fl with the extra [dp]. Four shards share 48 digits; the update of each is clipped to norm 1,
and noise is added to their mean. docs/differential-privacy.md says what the numbers mean.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from clients.app import app as clients
from ret_fl.config import RunConfig, Scalar
from ret_fl.rundir import RunDir
from server.app import app as server
from simulations.inline import run_inline

SHARDS = 4
SETTINGS: dict[str, Scalar] = {
    "shards": SHARDS,
    "data.limit": 48,
    "num-server-rounds": 3,
    "local-epochs": 1,
    "dp.mode": "server-fixed",
    "dp.noise-multiplier": 4.0,
    "dp.clipping-norm": 1.0,
    # what could tell of a shard beside its update is off: with dp.mode on ret-fl insists on it
    "redistribution.policy": "none",
    "data.duplicates": "keep",
    "quorum": 1.0,
    "samples": 0,
}


def main(out: Path) -> None:
    """Train into `out`, an empty or new folder, and print epsilon after every round."""
    local: dict[str, Scalar] = {"out": str(out), "state-dir": str(out / "proxies")}
    config = RunConfig.from_flat(SETTINGS | local)
    run_inline(server, clients, config.to_flat(), SHARDS)
    for row in RunDir(out).rows():
        print(f"round {row['round']}: epsilon {row['epsilon']:.3f} at delta {row['delta']:g}, for a whole shard")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "dp-run")
