"""Numbers of an audit as text."""

from __future__ import annotations

import pytest
from audits import FEW

from ret_fl.audit.words import number, percent, with_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.002, "0.20 %"), (0.0999, "9.99 %"), (0.09999, "10.0 %"), (0.252, "25.2 %"), (1.0, "100.0 %"), (0.0, "0.00 %"),
     (None, "n/a"), (float("nan"), "n/a")],
)  # fmt: skip
def test_shares_have_two_digits_below_ten_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_intervals_and_numbers() -> None:
    assert with_interval(FEW) == "0.20 % (0.05 to 0.73 %)"
    assert number(10.698) == "10.7"
    assert number(0.01234) == "0.0123"
    assert number(1234.5) == "1,234"
    assert number(float("inf")) == "n/a"
