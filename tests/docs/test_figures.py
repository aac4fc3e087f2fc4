"""Figures in documents are those of the measurements that are committed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from bench.throughput import document
from bench.throughput.figures import Result

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
