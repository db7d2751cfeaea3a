"""Audits side by side, against their baseline."""

from __future__ import annotations

import re

from audits import FEW, make_audit, make_fidelity, make_replication, on_other_data
from rich.console import Console

from ret_fl.audit.schema import Interval
from ret_fl.audit.tables import comparison_rows, comparison_table, key_numbers


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


def test_audits_of_other_data_or_features_are_not_set_against_each_other() -> None:
    base, other = make_audit("base"), on_other_data(make_audit("other", FEW))
    first, second = comparison_rows([other], base)
    assert first[0] == "base" and second[0] == "other (other data)"
    assert second[3] == "n/a"
    retrained = make_audit("retrained", fidelity=[make_fidelity(recipe="b")])
    (_, row) = comparison_rows([retrained], make_audit("base", fidelity=[make_fidelity(recipe="a")]))
    assert row[0] == "retrained" and row[6:9] == ("n/a",) * 3
    quality = [r for r in key_numbers(retrained, make_audit("base", fidelity=[make_fidelity(recipe="a")]))
               if r.group.startswith("Quality")]  # fmt: skip
    assert quality and {r.baseline for r in quality} == {"n/a"}
