"""Every SQL statement of every store, prepared on the database that the migrations make; and the migrations, linted.

A statement is a string that a function gives to `tx.fetch`, `fetch_one`, `fetch_values` or `execute`, or any value of
the module-level constant (a string, or a mapping of strings) that it gives instead. Of those that fill rows the columns
must have the names of the row's fields, in their order: rows are filled by position, so that two columns of one type
that changed places would be seen by no other test.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import asyncpg
import msgspec
import pytest

from mercato import topology
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.messaging import outbox, parking
from mercato.chassis.postgres.database import Row
from mercato.chassis.postgres.migrations import needs, revisions, statements
from mercato.chassis.sagas import store as saga
from mercato.testing.cluster import Cluster

METHODS = {"fetch": 1, "fetch_one": 1, "fetch_values": 1, "execute": 0}
"""The methods of a `tx` and where their SQL stands."""

SERVICES = list(topology.SERVICES)
MODULES = [
    *(
        (service, f"{topology.package(service)}.{path.stem}")
        for service in SERVICES
        for path in sorted(topology.migrations(service).parent.glob("*store.py"))
    ),
    ("inventory", "mercato.services.inventory.fast_path"),
    # The tables of the chassis are in the databases of those that use them.
    ("inventory", idempotency.__name__),
    ("orders", saga.__name__),
    ("orders", outbox.__name__),
    ("products", parking.__name__),
]


class Statement(msgspec.Struct, frozen=True):
    line: int
    sql: str
    row: type[Row] | None


class UnreadableStatement(Exception):
    """SQL that is put together where it is used: no test could prepare it before."""


def statements_of(source: str, names: Mapping[str, Any]) -> Iterator[Statement]:
    """The statements of a module whose global names have these values."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "tx"):
            continue
        place = METHODS[node.func.attr]
        row = names[ast.unparse(node.args[0])] if node.func.attr in ("fetch", "fetch_one") else None
        for sql in texts(node.args[place], names):
            yield Statement(node.lineno, sql, row)


def texts(argument: ast.expr, names: Mapping[str, Any]) -> list[str]:
    """The string itself, the constant that is named, or all values of the mapping that is looked into."""
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return [argument.value]
    if isinstance(argument, ast.Name) and isinstance(names.get(argument.id), str):
        return [names[argument.id]]
    if isinstance(argument, ast.Subscript) and isinstance(argument.value, ast.Name):
        mapping = names.get(argument.value.id)
        if isinstance(mapping, Mapping) and mapping:
            return list(mapping.values())
    raise UnreadableStatement(f"line {argument.lineno}: {ast.unparse(argument)}")


async def problems(dsn: str, found: list[Statement]) -> list[str]:
    """What PostgreSQL, or a comparison with the row, has against each statement."""
    connection = await asyncpg.connect(dsn)
    wrong: list[str] = []
    try:
        for statement in found:
            try:
                prepared = await connection.prepare(statement.sql)
            except asyncpg.PostgresError as error:
                wrong.append(f"line {statement.line}: {error}")
                continue
            columns = [attribute.name for attribute in prepared.get_attributes()]
            fields = list(statement.row.__struct_fields__) if statement.row else columns
            if columns != fields:
                wrong.append(f"line {statement.line}: columns {columns}, fields {fields}")
    finally:
        await connection.close()
    return wrong


def source_of(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text()


async def problems_of(cluster: Cluster, service: str, source: str, module: ModuleType) -> tuple[int, list[str]]:
    found = list(statements_of(source, vars(module)))
    dsn = await cluster.fresh_database(service, topology.migrations(service))
    try:
        return len(found), await problems(dsn, found)
    finally:
        await cluster.release_database(dsn)


@pytest.mark.parametrize(("service", "name"), MODULES, ids=[name for _, name in MODULES])
async def test_every_statement_fits_the_database_and_its_row(cluster: Cluster, service: str, name: str):
    module = importlib.import_module(name)
    count, wrong = await problems_of(cluster, service, source_of(module), module)
    assert wrong == []
    assert count > 0


INJECTED = {
    "SELECT a column that does not exist": ("SELECT i.principal, i.key, i.fingerprint, i.answers", "column i.answers"),
    "two columns that changed places": (
        "SELECT i.key, i.principal, i.fingerprint, i.answer",
        "columns ['key', 'princi",
    ),
    "one column too few": ("SELECT i.principal, i.key, i.fingerprint\n", "columns ['principal', 'key', 'fingerprint']"),
}


@pytest.mark.parametrize("injected", INJECTED.values(), ids=INJECTED.keys())
async def test_a_planted_mistake_is_found(cluster: Cluster, injected: tuple[str, str]):
    source = source_of(idempotency)
    right = "SELECT i.principal, i.key, i.fingerprint, i.answer"
    assert right in source
    _, wrong = await problems_of(cluster, "inventory", source.replace(right, injected[0]), idempotency)
    assert len(wrong) == 1
    assert injected[1] in wrong[0]


def test_statements_in_constants_and_mappings_are_found():
    names = {"ONE_SQL": "SELECT 1", "MANY_SQL": {("a", 1): "SELECT 2", ("b", 2): "SELECT 3"}, "Row": Row}
    source = "await tx.execute(ONE_SQL)\nawait tx.fetch(Row, MANY_SQL[a, b], c)\nawait tx.fetch_values(int, 'SELECT 4')"
    assert [s.sql for s in statements_of(source, names)] == ["SELECT 1", "SELECT 2", "SELECT 3", "SELECT 4"]


@pytest.mark.parametrize("sql", ['f"SELECT {x}"', '"SELECT " + x', "made(x)", "UNKNOWN_SQL", "UNKNOWN_SQL[x]"])
def test_a_statement_that_is_put_together_is_refused(sql: str):
    with pytest.raises(UnreadableStatement):
        list(statements_of(f"await tx.execute({sql})", {}))


# ---------------------------------------------------------------------------------------------------------- migrations

EXCLUDED = {
    "require-lock-timeout": "the runner sets it for every revision",
    "require-statement-timeout": "an index of a large table takes as long as it takes; what others wait for is locks",
    "prefer-text-field": "Alembic's own table, which no traffic touches",
    "prefer-bigint-over-int": "versions, quantities: far from two thousand million",
    "prefer-bigint-over-smallint": "the position of a line in its order, of which there are at most a hundred",
}
"""Rules that do not fit, with the reason. Squawk knows that no transaction waits for a table of the same revision."""


def squawk() -> str:
    found = shutil.which("squawk", path=str(Path(sys.executable).parent)) or shutil.which("squawk")
    assert found, "squawk-cli is not installed"
    return found


REMOVING: Final = ("ban-drop-column", "ban-drop-table", "ban-drop-not-null", "renaming-column", "renaming-table")
"""What only a revision may do that refuses the versions which use what it removes."""


def lint(sql: str, tmp_path: Path) -> str:
    file = tmp_path / "revision.sql"
    file.write_text(sql)
    excluded = [*EXCLUDED, *(REMOVING if needs("")[0] in sql else ())]
    done = subprocess.run(
        [squawk(), f"--exclude={','.join(excluded)}", "--pg-version=16.0", "--reporter=gcc", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_migrations_are_safe_under_traffic(service: str, tmp_path: Path):
    folder = topology.migrations(service)
    current = None
    for revision in revisions(folder):
        assert lint("\n".join(statements(folder, current, revision)), tmp_path) == ""
        current = revision


@pytest.mark.parametrize(
    ("sql", "rule"),
    [
        ("ALTER TABLE users ADD COLUMN nick text NOT NULL;", "adding-required-field"),
        ("ALTER TABLE users RENAME COLUMN name TO title;", "renaming-column"),
        ("CREATE INDEX users_name_idx ON users (name);", "require-concurrent-index-creation"),
        ("ALTER TABLE users ALTER COLUMN id TYPE text;", "changing-column-type"),
        ("ALTER TABLE users DROP COLUMN name;", "ban-drop-column"),
        ("DROP TABLE users;", "ban-drop-table"),
    ],
)
def test_a_dangerous_migration_is_found(sql: str, rule: str, tmp_path: Path):
    assert rule in lint(f"BEGIN;\n{sql}\nCOMMIT;", tmp_path)


def test_a_revision_may_remove_what_the_versions_that_it_refuses_use(tmp_path: Path):
    removing = ";\n".join([*needs("0002"), "ALTER TABLE users DROP COLUMN name", ""])

    assert lint(f"BEGIN;\n{removing}COMMIT;\n", tmp_path) == ""
    assert "require-concurrent-index-creation" in lint(f"{removing}CREATE INDEX a ON users (b);", tmp_path)
