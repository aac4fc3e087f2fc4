"""The documents tell the truth about where things are."""

from __future__ import annotations

import ast
import fnmatch
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from mercato import topology
from mercato.chassis.observability import faults
from mercato.operations.audit.clients import CLIENTS
from mercato.operations.audit.invariants import SHOP
from system.mutation.safeguards.table import SAFEGUARDS

ROOT = Path(__file__).parents[2]
USUAL = {"app.py", "service.py", "store.py", "rules.py", "consumers.py", "demo.py"}
"""Files that several services have."""
UNLISTED = {"assertions.py"}
"""Of one test."""
POINTER = re.compile(r"`((?:mercato|tests|bench)/[\w/.]+\.py)::([\w.]+)`")
FILE = re.compile(r"`((?:mercato|tests|docs|requirements)/[\w/.-]+)`")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def names_in(path: Path) -> set[str]:
    """What a module defines or imports at its top level, and what its classes define, as `Class.name`."""
    names = _defined(ast.parse(path.read_text()).body)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in _defined(node.body)}
    return names


def _defined(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
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


def wrong_links(document: Path) -> list[str]:
    """The relative links of a document that lead to no file, or to no heading of it."""
    wrong: list[str] = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if path.is_file() else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not path.exists() or (anchor and anchor not in anchors):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    assert wrong_links(document) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One thing\n[a](#one-thing) [b](#another) [c](b.md) [d](https://example.com/d.md) [e](a.md)")
    assert wrong_links(document) == ["#another", "b.md"]


def test_the_life_of_an_order_is_short() -> None:
    assert len((ROOT / "docs/life-of-an-order.md").read_text().splitlines()) < 120


def test_the_exercise_has_ten_questions_each_with_the_place_of_its_answer() -> None:
    questions = re.split(r"^\d+\. \*\*", (ROOT / "docs/exercise.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(questions) == 10
    assert [question[:40] for question in questions if not POINTER.search(question)] == []


def test_every_term_of_the_glossary_says_where_to_look() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/glossary.md").read_text().splitlines() if line.startswith("| ")]
    terms = [row for row in rows if not row[0].startswith(("| term", "| ---"))]
    assert len(terms) > 40
    assert [row[0] for row in terms if len(row) != 3 or not (POINTER.search(row[2]) or FILE.search(row[2]))] == []


def test_a_pointer_that_leads_nowhere_is_found() -> None:
    batching = "mercato/chassis/rpc/batching.py"
    right = f"`{batching}::Batcher`, `{batching}::Batcher.__init__`, `{batching}`"
    wrong = f"`{batching}::Gone`, `{batching}::Batcher.gone`, `mercato/gone.py`"
    assert wrong_pointers(right, ROOT) == []
    assert wrong_pointers(wrong, ROOT) == [f"{batching}::Gone", f"{batching}::Batcher.gone", "mercato/gone.py"]


def test_every_file_of_the_chassis_is_on_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    folders = [p for p in (ROOT / "mercato/chassis").iterdir() if (p / "__init__.py").exists()]
    files = [file for folder in folders for file in folder.glob("[!_]*.py")]
    assert len(files) > 25
    assert [file.name for file in files if f"`{file.name}`" not in text] == []
    assert [folder.name for folder in folders if f"`{folder.name}/`" not in text] == []


@pytest.mark.parametrize("folder", ["cli", "gateway", "operations", "testing"])
def test_every_file_of_a_folder_is_on_the_map(folder: str) -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    files = list((ROOT / "mercato" / folder).glob("[!_]*.py"))
    assert len(files) > 2
    assert [file.name for file in files if f"`{file.name}`" not in text and file.name not in UNLISTED] == []


def test_every_file_of_a_service_beside_the_usual_ones_is_on_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    files = [file for file in (ROOT / "mercato/services").glob("*/[!_]*.py") if file.name not in USUAL]
    assert len(files) > 20
    named = {
        name for names in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"[\w/]+\.py", names)
    }
    assert [f for f in files if f.name not in named and f"{f.parent.name}/{f.name}" not in named] == []


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_order_of_imports_is_that_of_the_import_rules(document: str) -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(rule["layers"] for rule in rules if rule["id"] == "layers")
    named = re.search(r"`(cli > [\w >]+)`", (ROOT / document).read_text())
    assert named is not None
    order = [next(n for n, layer in enumerate(layers) if name in layer.split(" | ")) for name in named[1].split(" > ")]
    assert order == sorted(order)


@pytest.mark.parametrize("document", ["CHANGELOG.md", "docs/operations.md", "docs/reliability.md"])
def test_every_invariant_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"\b[EKMOSX]\d{1,2}\b", text))
    assert len(named) > 2
    assert named - {invariant.name for invariant in (*SHOP, *CLIENTS)} == set()


def test_the_table_of_invariants_is_that_of_the_code() -> None:
    rows = [f"| {each.name} | {each.when} | {each.title} |" for each in (*SHOP, *CLIENTS)]
    assert table_behind("### The invariants") == rows, "\n".join(rows)


def test_every_invariant_belongs_to_a_guarantee() -> None:
    cells = " ".join(row.rpartition(" | ")[2] for row in table_behind("## What holds"))
    for kind, first, last in re.findall(r"([A-Z])(\d+) to [A-Z](\d+)", cells):
        cells += "".join(f" {kind}{number}" for number in range(int(first), int(last) + 1))
    listed = set(re.findall(r"\b[EKMOSX]\d{1,2}\b", cells))
    assert {invariant.name for invariant in (*SHOP, *CLIENTS)} - listed == set()


def test_the_invariants_that_need_the_words_of_clients_are_listed() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    assert f"({', '.join(invariant.name for invariant in CLIENTS)})" in text


def test_every_fault_point_is_in_the_table_of_crashes() -> None:
    topology.builds()
    rows = table_behind("## What goes on after a crash")
    patterns = [pattern for row in rows for pattern in re.findall(r"`([\w.*]+)`", row.split("|")[1])]
    assert [point for point in faults.POINTS if not any(fnmatch.fnmatch(point, p) for p in patterns)] == []
    assert [p for p in patterns if not fnmatch.filter(faults.POINTS, p)] == []


def test_the_table_of_safeguards_is_that_of_the_code() -> None:
    rows = [
        f"| `{safeguard.name}` | {safeguard.removed} | {', '.join(f'`{name}`' for name in names_of(safeguard.red))} |"
        for safeguard in SAFEGUARDS
    ]
    assert table_behind("## Each safeguard has a test that fails without it") == rows, "\n".join(rows)


def names_of(tests: Sequence[str]) -> list[str]:
    """Their functions, each once."""
    return list(dict.fromkeys(test.rpartition("::")[2].partition("[")[0] for test in tests))


def test_every_test_that_misses_a_safeguard_exists() -> None:
    named = {node for safeguard in SAFEGUARDS for node in (*safeguard.red, safeguard.green)}
    pairs = [node.partition("[")[0].split("::") for node in sorted(named)]
    assert len(pairs) > 60
    assert [node for node in pairs if not (ROOT / node[0]).is_file() or node[-1] not in all_names(ROOT / node[0])] == []


def all_names(path: Path) -> set[str]:
    """The functions of a module, those of its classes included, and of the suites that it inherits."""
    texts = [path.read_text(), *(file.read_text() for file in path.parent.glob("conformance*.py"))]
    return {name for text in texts for name in re.findall(r"def (\w+)\(", text)}


def table_behind(heading: str) -> list[str]:
    """The rows of the first table of that section in the reliability document."""
    _, _, section = (ROOT / "docs/reliability.md").read_text().partition(f"{heading}\n")
    lines = re.split(r"\n##+ ", section)[0].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 2
    return rows[2:]


def test_the_reading_list_takes_an_hour_and_its_files_are_there() -> None:
    _, _, section = (ROOT / "README.md").read_text().partition("## Where to read on\n")
    rows = re.findall(r"^\| (\d+) \| `([\w/.-]+)` \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) > 10
    assert sum(int(minutes) for minutes, _, _ in rows) == 60
    for _, file, hint in rows:
        text = (ROOT / file).read_text()
        # What it names in quotes is a heading, and in backquotes a word, of the file.
        headings = re.findall(r"\"([^\"]+)\"", hint)
        assert [name for name in headings if f"## {name}\n" not in text] == []
        assert [name for name in re.findall(r"`([^`]+)`", hint) if name not in text] == []


def test_the_readme_says_that_the_bank_is_the_only_payment_provider() -> None:
    assert [path.name for path in (ROOT / "mercato/simulators").iterdir() if (path / "app.py").exists()] == ["bank"]
    assert "The one payment provider so far is the\nsandbox bank" in (ROOT / "README.md").read_text()
