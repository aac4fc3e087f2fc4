"""Figures in documents are those of the measurements that are committed, and of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from bench.throughput import document
from bench.throughput.figures import Result
from cli.test_one_restored import ODD
from mercato.chassis.http import LoadLimits, Priority
from mercato.cli.settings import rows

ROOT: Final = Path(__file__).parents[2]


def result(name: str) -> Result:
    return msgspec.json.decode((ROOT / "bench/results" / name).read_bytes(), type=Result)


def test_the_figures_of_the_performance_page_are_those_of_the_results() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    figures = "\n".join(document.lines(result("before.json"), result("latest.json")))

    assert document.replaced(text, figures) == text, "run .venv/bin/python -m bench.throughput.document"


def test_the_figures_of_the_readme_are_those_of_the_latest_result() -> None:
    """`N times` and `N us` in its sentence about speed."""
    latest = result("latest.json")
    text = " ".join((ROOT / "README.md").read_text().split())
    sentence = re.search(r"Measured side by side.*?\(`docs/performance.md`\)", text)

    assert sentence is not None
    assert latest.ratios.placed is not None
    assert latest.ratios.paid is not None
    wanted = [f"{latest.ratios.placed:.1f}", f"{latest.ratios.paid:.1f}", f"{latest.cpu_us['paid'].total:.0f}"]
    assert re.findall(r"\d+(?:\.\d+)?", sentence[0].replace("2 cores", "")) == wanted


def table(document: str, header: str) -> list[list[str]]:
    """The cells of the table below that row of headers."""
    lines = (ROOT / document).read_text().partition(f"\n{header}\n")[2].splitlines()
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1 : lines.index("")]]
    assert found, f"{document} has no table {header}"
    return found


def test_the_shares_of_the_classes_are_those_of_the_code() -> None:
    header = "| class | routes | may enter while fewer requests are in work than | slow, once it takes longer than |"
    classes = {
        "payments": Priority.PAY,
        "orders": Priority.ORDER,
        "browsing": Priority.BROWSE,
        "reports": Priority.REPORT,
    }
    limits = LoadLimits()
    listed = {row[0]: row for row in table("docs/reliability.md", header)}

    assert [name for name in classes if float(listed[name][2].split()[0]) != limits.shares[classes[name]]] == []
    for name, priority in classes.items():
        slow = limits.slow_seconds[priority]
        assert listed[name][3].startswith("is not measured" if slow is None else f"{slow * 1000:.0f} ms")


def test_the_limit_of_requests_in_work_begins_and_ends_where_the_document_says() -> None:
    limits = LoadLimits()
    text = (ROOT / "docs/reliability.md").read_text()

    assert f"begins at {limits.start} and stays between {limits.floor} and {limits.ceiling}" in text


def test_the_defaults_of_breakers_are_those_of_the_code() -> None:
    defaults = {row.name: row.default for row in rows()}
    listed = table("docs/reliability.md", "| setting | default | meaning, and where the default is from |")

    assert [(row[0], row[1]) for row in listed if defaults[row[0].strip("`")] != row[1]] == []


def test_the_drill_lists_what_the_audit_finds_after_each_restore() -> None:
    listed = table("docs/operations.md", "| restored | the audit lists | what to do |")

    assert {row[0]: set(re.findall(r"\b[EKMOSX]\d{1,2}\b", row[1])) for row in listed} == ODD
