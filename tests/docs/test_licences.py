"""The list of licences is that of what is installed."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/licences.md").read_text()
EXTRA = ("zeroconf", "ifaddr")
"""Of the extra `mdns`, which `requirements/runtime.txt` does not have."""


def pinned(name: str) -> list[str]:
    return re.findall(r"^([a-z0-9._-]+)==", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE)


def licence(name: str) -> str:
    """What a distribution says of its licence: the expression, else the line `License`, else the classifiers."""
    metadata = importlib.metadata.metadata(name)
    for field in ("License-Expression", "License"):
        said = metadata[field].strip() if field in metadata else ""
        if said and "\n" not in said:
            return said
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    return "; ".join(line.rpartition(" :: ")[2] for line in classifiers)


def test_every_shipped_distribution_is_listed_with_the_licence_that_it_names() -> None:
    listed = dict(re.findall(r"^\| `([a-z0-9._-]+)` \| ([^|]+) \|$", DOCUMENT, re.MULTILINE))

    assert {name for name, said in listed.items() if not said.strip()} == set()
    assert listed == {name: licence(name) for name in (*pinned("runtime"), *EXTRA)}
