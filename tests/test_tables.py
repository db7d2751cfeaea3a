"""Audits side by side, against their baseline."""

from __future__ import annotations

import re

from audits import FEW, make_audit, make_replication
from rich.console import Console

from ret_fl.audit.schema import Interval
from ret_fl.audit.tables import comparison_table


def test_the_table_compares_against_the_baseline() -> None:
    close = make_audit("close", Interval(value=0.22, low=0.195, high=0.23))
    bare = make_audit("bare", replication=make_replication([]), fidelity=[], leakage=None)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(comparison_table([make_audit("few", FEW), close, bare], make_audit("base")))
    rows = {cells[1]: cells[2:] for line in capture.get().splitlines() if len(cells := re.split(r"\s*│\s*", line)) > 5}
    assert list(rows) == ["base", "few", "close", "bare"]
    assert rows["few"][:4] == ["0.20 % (0.05 to 0.73 %)", "0.64 %", "-25.0 points, fewer", "15.0 %"]
    assert rows["few"][4:9] == ["50.0 %", "10.7", "75.5 %", "83.5 %", "0.612 by loss"]
    assert rows["close"][2] == "-3.20 points, no clear difference"
    assert rows["base"][2] == "the baseline"
    assert rows["bare"][0] == "n/a" and rows["bare"][5:9] == ["n/a"] * 4
