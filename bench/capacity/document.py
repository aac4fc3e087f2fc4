"""Writes the tables into `docs/capacity.md`, between its two marks: `python -m bench.capacity --document FILE`."""

from __future__ import annotations

from typing import Final

from bench.throughput.document import CannotWrite

from .assumptions import RATES, Question
from .inputs import ROOT
from .report import Report
from .tables import tables

DOCUMENT: Final = ROOT / "docs" / "capacity.md"
QUESTIONS: Final = [Question(float(rate)) for rate in RATES]
"""Of the default plan, which the page has."""
BEGIN: Final = "<!-- tables: written by python -m bench.capacity --document docs/capacity.md -->"
END: Final = "<!-- end of tables -->"


def replaced(text: str, found: Report, commit: str) -> str:
    """The text with the tables between its marks. Raises `CannotWrite` where it has no such place."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise CannotWrite(f"the page has no place for the tables: {BEGIN} ... {END}")
    lines = [line for table in tables(found) for line in table.markdown()]
    return (
        f"{head}{BEGIN}\n"
        + "\n".join((*lines, f"From `bench/results/latest.json` of commit {commit}."))
        + f"\n{END}{tail}"
    )
