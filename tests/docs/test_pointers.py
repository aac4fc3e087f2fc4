"""The documents tell the truth about where things are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POINTER = re.compile(r"`((?:mercato|tests)/[\w/.]+\.py)::(\w+)`")
FILE = re.compile(r"`((?:mercato|tests|docs|requirements)/[\w/.-]+)`")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def names_in(path: Path) -> set[str]:
    """What a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef | ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def wrong_pointers(text: str, root: Path) -> list[str]:
    """The pointers of a text that lead nowhere."""
    wrong = [
        f"{path}::{name}"
        for path, name in POINTER.findall(text)
        if not (root / path).is_file() or name not in names_in(root / path)
    ]
    return wrong + [path for path in FILE.findall(text) if not (root / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_pointer_of_a_document_leads_somewhere(document: Path) -> None:
    assert wrong_pointers(document.read_text(), ROOT) == []


def test_the_life_of_an_order_has_pointers() -> None:
    assert len(POINTER.findall((ROOT / "docs/life-of-an-order.md").read_text())) > 20


def test_a_pointer_that_leads_nowhere_is_found() -> None:
    text = "see `mercato/chassis/batching.py::Batcher`, `mercato/chassis/batching.py::Gone`, `mercato/gone.py`"
    assert wrong_pointers(text, ROOT) == ["mercato/chassis/batching.py::Gone", "mercato/gone.py"]


def test_every_file_of_the_chassis_is_on_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    parts = [p.name for p in (ROOT / "mercato/chassis").iterdir() if not p.name.startswith(("_", "alembic"))]
    assert [name for name in parts if f"`{name}" not in text] == []
