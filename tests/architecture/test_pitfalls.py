"""What Python lets through and the linter does not know: work inside of `assert`, and patterns that end with `$`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_shape import MODULES, label

# Calls that change nothing. An assertion may ask them alone: `python -O` does not run it.
HARMLESS = {"all", "any", "fullmatch", "get", "isinstance", "len", "max", "min", "search", "sub", "type", "_available"}
# Their patterns are shown in the document of the API, where `$` is the end alone, and match nothing here.
SHOWN_ALONE = {"gateway/described_headers.py", "gateway/openapi.py", "gateway/schemas.py"}


def working_assertions(source: str) -> list[int]:
    """The lines of assertions that may change something."""
    assertions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [one.lineno for one in assertions if any(map(_works, ast.walk(one.test)))]


def _works(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        return name not in HARMLESS
    return isinstance(node, ast.Await | ast.NamedExpr | ast.Yield | ast.YieldFrom)


def open_patterns(source: str) -> list[int]:
    """The lines of patterns that end with `$`, which also stands before a newline at the end of a text."""
    return [node.lineno for node in _patterns(ast.parse(source)) if _text(node).endswith("$")]


def _text(node: ast.Constant) -> str:
    return node.value.decode("latin-1") if isinstance(node.value, bytes) else str(node.value)


def _patterns(tree: ast.Module) -> Iterator[ast.Constant]:
    """Texts that are used as a pattern, or look like one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
            yield from [a for a in node.args[:1] if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.keyword) and node.arg == "pattern" and isinstance(node.value, ast.Constant):
            yield node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("^"):
            yield node


def modules() -> list[Path]:
    return [module for module in MODULES if "testing" not in module.parts]


def test_no_assertion_does_work():
    assert {label(m): lines for m in modules() if (lines := working_assertions(m.read_text()))} == {}


def test_no_pattern_lets_a_newline_through():
    checked = [module for module in modules() if label(module) not in SHOWN_ALONE]

    assert {label(m): sorted(set(lines)) for m in checked if (lines := open_patterns(m.read_text()))} == {}


@pytest.mark.parametrize(
    "test", ["all(await store.move(tx))", "queue.pop()", "(found := 1)", "len(taken.clear() or [])", "store.delete(tx)"]
)
def test_an_assertion_that_works_is_found(test: str):
    assert working_assertions(f"async def f():\n    assert {test}, 'a reason'\n") == [2]


@pytest.mark.parametrize("test", ["all(moved)", "len(rows) == 1", "self._handlers.get(name) is None"])
def test_an_assertion_that_only_looks_is_none(test: str):
    assert working_assertions(f"assert {test}") == []


@pytest.mark.parametrize(
    "line",
    ['re.compile(r"[a-z]+$")', 're.compile(rb"^[a-z]+$")', 'Meta(pattern=r"^[A-Z]{3}$")', 'PATTERN = "^a$"'],
)
def test_a_pattern_that_lets_a_newline_through_is_found(line: str):
    assert open_patterns(line) != []


@pytest.mark.parametrize("line", [r're.compile(r"[a-z]+\Z")', 'price = "5 $"', 're.sub("[$]", "", text)'])
def test_what_ends_or_is_no_pattern_is_none(line: str):
    assert open_patterns(line) == []
