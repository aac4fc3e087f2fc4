"""The shape that makes one service readable after another: same files, SQL in one place, names that say something."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from mercato import topology
from mercato.gateway import routes
from mercato.gateway.routes import ROUTES

PACKAGE = Path(__file__).parents[2] / "mercato"
MODULES = sorted(PACKAGE.rglob("*.py"))
SERVICES = [topology.migrations(name).parent for name in topology.SERVICES]

REQUIRED_FILES = ("app.py", "service.py", "store.py", "rules.py")
MAX_LINES = 600
# What has no noun is not ready to be shared.
EMPTY_NAMES = {"base", "common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
# The chassis keeps the tables of its own (outbox, cursors, sagas), the audit consists of queries over all tables, and
# tests look into them; a service's SQL stands in these alone.
SQL_MODULES = {
    "store.py",
    "erasure_store.py",
    "claim_store.py",
    "count_store.py",
    "history_store.py",
    "letter_store.py",
    "list_store.py",
    "name_store.py",
    "operation_store.py",
    "payment_store.py",
    "read_store.py",
    "log_store.py",
    "lost_order_store.py",
    "money_store.py",
    "reconciliation_store.py",
    "trace_store.py",
    "fast_path.py",
    "demo.py",
}
SQL_FOLDERS = {"migrations", "chassis", "operations", "testing"}
# A verb alone is an HTTP method or prose, so the second word is looked at too.
SQL = re.compile(r"\s*(SELECT\s|INSERT\s+INTO\s|UPDATE\s+\w|DELETE\s+FROM\s|WITH\s+\w|CREATE\s+\w)")


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Every string of a module with its line, an f-string with `_` for its values; docstrings left out."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def sql_lines(source: str) -> list[int]:
    return [line for line, text in strings(source) if SQL.match(text)]


def may_hold_sql(module: Path) -> bool:
    relative = module.relative_to(PACKAGE)
    return relative.name in SQL_MODULES or not SQL_FOLDERS.isdisjoint(relative.parts)


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("service", SERVICES, ids=label)
def test_a_service_has_the_files_of_a_service(service: Path):
    missing = [name for name in REQUIRED_FILES if not (service / name).is_file()]

    assert missing == []
    assert (service / "migrations").is_dir()


def test_sql_stands_in_stores_and_migrations_alone():
    elsewhere = {
        label(module): lines
        for module in MODULES
        if not may_hold_sql(module) and (lines := sql_lines(module.read_text()))
    }

    assert elsewhere == {}


def imported(source: str) -> set[str]:
    """The packages that a module imports, by their first name."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("service", SERVICES, ids=label)
def test_a_revision_holds_its_whole_text(service: Path):
    """What it would import may change after it is frozen."""
    revisions = sorted((service / "migrations").glob("[0-9]*_*.py"))

    assert revisions
    assert {label(file): names for file in revisions if (names := imported(file.read_text()) - {"alembic"})} == {}


@pytest.mark.parametrize(
    "line", ["import mercato.chassis.events", "from mercato.chassis import events", "from . import x"]
)
def test_a_revision_that_imports_is_found(line: str):
    assert imported(f"from alembic import op\n{line}\n") - {"alembic"}


def test_no_module_is_longer_than_a_reader_holds():
    lengths = {label(module): len(module.read_text().splitlines()) for module in MODULES}

    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}, (
        f"more than {MAX_LINES} lines: give a use case of it a module of its own"
    )


def test_every_module_of_routes_is_in_the_table():
    table = {(route.method, route.path) for route in ROUTES}
    modules = [import_module(f"{routes.__name__}.{name}") for _, name, _ in iter_modules(routes.__path__)]
    declared = {module.__name__: {(route.method, route.path) for route in module.ROUTES} for module in modules}

    assert {name: missing for name, rows in declared.items() if (missing := rows - table)} == {}, (
        "add the ROUTES of the module to mercato/gateway/routes/__init__.py"
    )


def test_every_module_name_says_what_it_holds():
    folders = {module.parent for module in MODULES}
    names = [*MODULES, *(folder for folder in folders if folder != PACKAGE)]

    assert [label(path) for path in names if not EMPTY_NAMES.isdisjoint(path.stem.split("_"))] == []


@pytest.mark.parametrize(
    "source",
    [
        'query = """\n    SELECT id FROM orders\n"""',
        'query = f"UPDATE {table} SET x = 1"',
        'query = "UPDATE orders SET version = 2"',
        'run("WITH moved AS (SELECT 1) SELECT * FROM moved")',
        'run("DELETE FROM orders")',
    ],
)
def test_sql_is_recognised(source: str):
    assert sql_lines(source) == [1]


@pytest.mark.parametrize("source", ['"""SELECT is explained here."""', 'method = "DELETE"', 'route = "DELETE /orders"'])
def test_prose_and_http_methods_are_not_sql(source: str):
    assert sql_lines(source) == []
