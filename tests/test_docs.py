"""The pages name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def named_tests(line: str) -> list[tuple[str, str]]:
    """(file, start of the name) of every test in a row of the fault table; a file holds until the next."""
    found, file = [], ""
    for part in re.findall(r"`([^`]+)`", line):
        match = re.fullmatch(r"(?:(test_\w+\.py)::)?(test_\w+)(?:\.\.\.)?", part)
        if match:
            file = match[1] or file
            found.append((file, match[2]))
    return found


def fault_rows() -> list[str]:
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    return [line for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("row", fault_rows(), ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_fault_of_the_table_has_a_test_that_exists(row: str) -> None:
    fault, promised, tests, kind = (cell.strip() for cell in row.strip("|").split("|"))
    assert fault and promised and kind
    if tests.startswith("the same test"):
        return
    assert named_tests(tests), row
    for file, name in named_tests(tests):
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {name}", source, re.MULTILINE), f"{file} has no {name}..."


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda p: p.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
