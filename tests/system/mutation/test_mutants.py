"""Random mutants: the changes there are, the choice by a seed, and what a run says about a package with a gap."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from mercato.testing.command import ROOT, clean_environment
from mercato.testing.process import command_line, process_table
from system.mutation.copies import Inconclusive, Run
from system.mutation.mutants import choosing, equivalents, trial
from system.mutation.mutants.__main__ import main, summed_up
from system.mutation.mutants.choosing import Mutant, Place
from system.mutation.mutants.python_changes import python_changes
from system.mutation.mutants.relevance import Record, covering, own_files, touching, wider_files
from system.mutation.mutants.sql_changes import edits, literals, parses, sql_changes
from system.mutation.mutants.trial import MutantResult
from system.mutation.recording import Recorded, RecordedRun

RULES: Final = """
def total(price, quantity):
    return price * quantity


def is_large(count):
    return count > 10
"""
TESTS: Final = """
from mercato.services.shop.rules import is_large, total

def test_total():
    assert total(2, 3) == 6

def test_large():
    assert is_large(11) and not is_large(1)
"""
HANGING_TESTS: Final = """
import time
from mercato.services.shop.rules import total

def test_total():
    if total(2, 3) != 6:
        time.sleep(600)
"""
STATEMENT: Final = """
    SELECT id, count(*)
      FROM orders
     WHERE status = 'held' AND expires_at < now() AND version BETWEEN $1 AND $2
     ORDER BY expires_at
     LIMIT 10
       FOR NO KEY UPDATE SKIP LOCKED
"""


# ------------------------------------------------------------------------------------------------------- Python changes


def changed(source: str) -> set[tuple[str, str]]:
    """Kind and changed line of every change of a function's body."""
    made = [choosing.mutant("f.py", source, change) for change in python_changes(source)]
    for each in made:
        ast.parse(each.text)
    return {(each.kind, each.mutated) for each in made}


@pytest.mark.parametrize(
    ("line", "kind", "mutated"),
    [
        ("return a < b", "swap_op", "return a <= b"),
        ("return a and b", "swap_op", "return a or b"),
        ("x = a - b", "swap_op", "x = a + b"),
        ("x += b", "augmented_assignment", "x = b"),
        ("x += b", "deletion", "pass"),
        ("self.x = b", "deletion", "pass"),
        ("await self.send(a)", "deletion", "pass"),
        ("raise Late(a)", "deletion", "pass"),
        ("f(a, key=b)", "argument", "f(a, )"),
        ("x = [i for i in a if i]", "condition", "x = [i for i in a if not (i)]"),
        ('x = "held"', "string", 'x = "XXheldXX"'),
        ("return not a", "remove_unary_ops", "return a"),
    ],
)
def test_a_change_of_python_is_found_where_it_can_be_made(line: str, kind: str, mutated: str):
    assert (kind, mutated) in changed(f"async def f(self, a, b, x):\n    {line}\n")


@pytest.mark.parametrize(
    "line",
    [
        'log.warning("lost", count=1)',
        "assert a > 0",
        'x = "it is too late, says a sentence"',
        'x: "int < 3" = a',
        "x = sleep(timeout=3)",
    ],
)
def test_what_changes_no_behaviour_is_left_alone(line: str):
    assert {kind for kind, _ in changed(f"def f(a):\n    {line}\n")} <= {"argument"}


def test_constants_outside_functions_are_left_alone():
    assert changed("LIMIT = 3\n\n\nclass A:\n    limit = LIMIT + 1\n") == set()


# ---------------------------------------------------------------------------------------------------------- SQL changes


def mutated_sql(statement: str) -> dict[str, set[str]]:
    """The changed statements, with single spaces, by kind."""
    found: dict[str, set[str]] = {}
    for edit in edits(statement):
        text = statement[: edit.start] + edit.new + statement[edit.end :]
        found.setdefault(edit.kind, set()).add(" ".join(text.split()))
    return found


def test_every_kind_of_change_is_made_in_a_statement():
    plain = " ".join(STATEMENT.split())
    assert mutated_sql(STATEMENT) == {
        "sql_equality": {plain.replace("status = ", "status <> ")},
        "sql_bound": {plain.replace("expires_at < ", "expires_at <= ")},
        "sql_logic": {
            plain.replace("'held' AND", "'held' OR"),
            plain.replace("now() AND", "now() OR"),
        },
        "sql_condition": {
            plain.replace("status = 'held'", "(status = 'held' OR true)"),
            plain.replace("expires_at < now()", "(expires_at < now() OR true)"),
            plain.replace("version BETWEEN $1 AND $2", "(version BETWEEN $1 AND $2 OR true)"),
        },
        "sql_order": {plain.replace("BY expires_at", "BY expires_at DESC")},
        "sql_number": {plain.replace("LIMIT 10", "LIMIT 11")},
        "sql_lock": {plain.replace(" FOR NO KEY UPDATE SKIP LOCKED", "")},
        "sql_skip_locked": {plain.replace(" SKIP LOCKED", "")},
    }


@pytest.mark.parametrize(
    ("statement", "kind", "mutated"),
    [
        (
            "INSERT INTO a (b) VALUES (1) ON CONFLICT (b) DO UPDATE SET b = excluded.b RETURNING b",
            "sql_conflict",
            {
                "INSERT INTO a (b) VALUES (1) RETURNING b",
                "INSERT INTO a (b) VALUES (1) ON CONFLICT (b) DO NOTHING RETURNING b",
            },
        ),
        ("LOCK TABLE a IN SHARE ROW EXCLUSIVE MODE", "sql_lock", {"LOCK TABLE a IN ACCESS SHARE MODE"}),
        ("SELECT a FROM b ORDER BY a DESC", "sql_order", {"SELECT a FROM b ORDER BY a ASC"}),
        ("SELECT a FROM b WHERE NOT c", "sql_logic", {"SELECT a FROM b WHERE c"}),
        ("SELECT a + 1 FROM b", "sql_arithmetic", {"SELECT a - 1 FROM b"}),
        (
            "SELECT a FROM b LEFT JOIN c ON c.d = b.d",
            "sql_join",
            {"SELECT a FROM b JOIN c ON c.d = b.d"},
        ),
    ],
)
def test_a_change_of_sql_is_found_where_it_can_be_made(statement: str, kind: str, mutated: set[str]):
    assert mutated_sql(statement)[kind] == mutated


def test_a_statement_with_values_between_braces_keeps_them():
    source = 'async def f(tx):\n    await tx.execute(f"UPDATE {table} SET a = 1 WHERE b = {b}")\n'
    assert {choosing.mutant("f.py", source, change).mutated for change in sql_changes(source)} == {
        'await tx.execute(f"UPDATE {table} SET a = 2 WHERE b = {b}")',
        'await tx.execute(f"UPDATE {table} SET a = 1 WHERE b <> {b}")',
        'await tx.execute(f"UPDATE {table} SET a = 1 WHERE (b = {b} OR true)")',
    }


def test_every_statement_of_a_store_is_parsed_with_each_of_its_changes():
    source = (ROOT / "mercato/chassis/sagas/store.py").read_text()
    statements = [text for start, end in literals(source) if parses(text := source[start:end]) and "FROM" in text]

    assert len(statements) > 8
    for statement in statements:
        for edit in edits(statement):
            assert parses(statement[: edit.start] + edit.new + statement[edit.end :])


# -------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def planted() -> Iterator[Path]:
    """A tree with a small package, a gap in its tests, and this tool. Its path is short: there are sockets below it."""
    root = Path(tempfile.mkdtemp(prefix="mut-"))
    for name, text in {
        "mercato/__init__.py": "",
        "mercato/services/shop/rules.py": RULES,
        "tests/services/shop/test_rules.py": TESTS,
        "pyproject.toml": '[tool.pytest]\nmarkers = ["long: not run here"]\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copytree(
        ROOT / "tests/system/mutation",
        root / "tests/system/mutation",
        ignore=shutil.ignore_patterns("__pycache__", "test_*"),
    )
    (root / equivalents.FILE).write_text("")
    yield root
    shutil.rmtree(root)


def test_the_same_seed_chooses_the_same_mutants_also_from_the_cache(planted: Path, tmp_path: Path):
    files = choosing.product_files(planted)
    first = choosing.places(planted, files, tmp_path)
    again = choosing.places(planted, files, tmp_path)

    assert files == ["mercato/services/shop/rules.py"]
    assert first == again
    assert choosing.choose(first, 2, 7) == choosing.choose(again, 2, 7)
    assert {choosing.choose(first, 1, seed)[0] for seed in range(20)} == set(first)
    assert len(choosing.choose(first, 100, 7)) == len(first) == 3


def test_files_in_which_there_is_nothing_to_change_are_an_error_of_one_sentence():
    with pytest.raises(Inconclusive, match="nothing to mutate"):
        choosing.choose([], 1, 1)


def test_migrations_texts_and_tests_are_not_mutated():
    files = choosing.product_files(ROOT)

    assert "mercato/services/orders/store.py" in files
    assert [f for f in files if "/migrations/" in f or "/testing/" in f or f.endswith(("openapi.py", "docs.py"))] == []


def test_every_listed_equivalent_mutant_exists():
    known = equivalents.read(ROOT)
    for file in {one.file for one in known}:
        source = (ROOT / file).read_text()
        wanted = {(one.function, one.line) for one in known if one.file == file}
        functions = {function for function, _ in wanted}
        there_are = {
            (change.function, choosing.mutant(file, source, change).mutated)
            for change in choosing.changes(source)
            if change.function in functions
        }
        assert wanted - there_are == set()


# -------------------------------------------------------------------------------------------------- the relevant tests


def a_mutant(**fields: Any) -> Mutant:
    values: dict[str, Any] = {
        "file": "mercato/services/shop/rules.py",
        "function": "total",
        "kind": "swap_op",
        "line": 3,
        "statement": (3, 3),
        "mutated": "return price / quantity",
        "diff": "",
        "text": "",
    }
    return Mutant(**{**values, **fields})


def test_the_tests_of_a_mutant_are_those_that_run_its_statement():
    lines = {"t::one": {"mercato/services/shop/rules.py": [3]}, "t::two": {"mercato/services/shop/rules.py": [7]}}
    record = Record(needed={}, seconds={"t::one": 1.0, "t::two": 2.0}, lines=lines, failed=())

    assert [test.name for test in covering(record, a_mutant())] == ["t::one"]
    assert covering(record, a_mutant(statement=(1, 1))) == []
    assert [test.name for test in touching(record, a_mutant(statement=(1, 1)))] == ["t::one", "t::two"]


def test_the_mirrored_tests_come_first_and_then_those_of_the_layers_above():
    own = own_files(ROOT, "mercato/services/orders/paying.py")

    assert own[0] == "tests/services/orders/test_paying.py"
    assert {Path(file).parent.as_posix() for file in own} == {"tests/services/orders"}
    assert own_files(ROOT, "mercato/operations/copying.py")
    assert "tests/gateway/test_payments.py" in wider_files(ROOT, "mercato/services/orders/paying.py")


# ------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize(
    ("exit_code", "seen", "output", "outcome"),
    [
        (1, Recorded("call", "AssertionError", "assert 1 == 2"), "", "killed"),
        (1, Recorded("setup", "Unavailable", "the database"), "", "killed"),
        (1, Recorded("call", "Failed", "Failed: Timeout (>60.0s) from pytest-timeout."), "", "timed_out"),
        (None, Recorded(), "", "timed_out"),
        (
            1,
            Recorded("call", "InternalError", "it failed"),
            "asyncpg.UndefinedFunctionError: no such operator",
            "invalid",
        ),
        (1, Recorded("call", "TypeError", "x"), "TypeError: f() missing 1 required keyword-only argument", "invalid"),
        (4, None, "ImportError while loading conftest", "killed"),
    ],
)
def test_the_end_of_a_run_decides_the_outcome_of_its_mutant(
    exit_code: int | None, seen: Recorded | None, output: str, outcome: str
):
    copy = Path("/copy")
    recorded = RecordedRun("/copy/mercato/__init__.py", {"tests/test_it.py::test": seen} if seen else {})

    result = trial._result(a_mutant(), copy, Run(exit_code, recorded, output, 1.0), 1.0)

    assert result is not None
    assert result.outcome == outcome


def test_a_run_with_another_package_than_that_of_the_copy_says_nothing():
    seen = RecordedRun("/installed/mercato/__init__.py", {"tests/test_it.py::test": Recorded()})
    with pytest.raises(Inconclusive, match="not with the copy"):
        trial._result(a_mutant(), Path("/copy"), Run(0, seen, "", 1.0), 1.0)


def results(**counts: int) -> list[MutantResult]:
    return [
        trial._of(a_mutant(), outcome, 1.0)  # pyright: ignore[reportArgumentType]
        for outcome, count in counts.items()
        for _ in range(count)
    ]


def test_the_rate_leaves_out_what_is_equivalent_or_invalid_and_95_of_100_are_required():
    enough = summed_up(results(killed=94, timed_out=1, survived=5, equivalent=7, invalid=9), 1, 1, 1.0)
    too_few = summed_up(results(killed=94, survived=6, equivalent=7), 1, 1, 1.0)

    assert (enough.ok, enough.rate) == (True, 0.95)
    assert (too_few.ok, too_few.rate) == (False, 0.94)


# ------------------------------------------------------------------------------------------------------------ real runs


def test_a_planted_gap_survives_and_what_is_tested_is_killed(planted: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--json", "--count", "9", "--seed", "1"], planted) == 1

    result = json.loads(capsys.readouterr().out)
    by_line = {(m["line"], m["kind"]): m for m in result["mutants"]}
    assert {place: m["outcome"] for place, m in by_line.items()} == {
        (3, "swap_op"): "killed",
        (7, "swap_op"): "survived",
        (7, "number"): "killed",
    }
    survivor = by_line[7, "swap_op"]
    assert survivor["ran"] == ["tests/services/shop/test_rules.py::test_large"]
    assert "+    return count >= 10" in survivor["diff"]
    assert by_line[3, "swap_op"]["by"] == "tests/services/shop/test_rules.py::test_total"
    assert (planted / "mercato/services/shop/rules.py").read_text() == RULES


def test_a_mutant_that_is_listed_as_equivalent_is_not_tried(planted: Path, capsys: pytest.CaptureFixture[str]):
    (planted / equivalents.FILE).write_text(
        '[[equivalent]]\nfile = "mercato/services/shop/rules.py"\nfunction = "is_large"\n'
        'line = "return count >= 10"\nreason = "for this test"\n'
    )

    assert main(["--count", "9", "--seed", "1"], planted) == 0

    assert "2 killed, 0 hung until their time was up, 0 survived, 1 equivalent" in capsys.readouterr().out


@pytest.mark.long
def test_an_interrupted_run_leaves_no_file_and_no_process(planted: Path):
    (planted / "tests/services/shop/test_rules.py").write_text(HANGING_TESTS)
    temporary = planted / "tmp"
    temporary.mkdir()
    program = (
        f"import sys; from system.mutation.mutants.__main__ import main; sys.exit(main(sys.argv[1:], {planted!r}))"
    )
    code = f"from pathlib import PosixPath; {program}"

    with subprocess.Popen(
        [sys.executable, "-c", code, "--count", "9", "--seed", "1"],
        env={**clean_environment(), "TMPDIR": str(temporary), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        bound = time.monotonic() + 120
        while not list(temporary.glob("mercato-mutants-*/*/chosen.json")):
            assert process.poll() is None, "it ended before it had tried a mutant"
            assert time.monotonic() < bound, "it has not tried a mutant"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()

    assert (process.returncode, err.strip()) == (130, "stopped")
    assert list(temporary.iterdir()) == []
    assert [line for pid in process_table() if str(temporary) in (line := command_line(pid))] == []


def test_the_place_of_a_mutant_is_named_with_its_function():
    source = "class A:\n    def f(self, a):\n        if a:\n            return a + 1\n        return 0\n"
    assert Place("", 0, "swap_op", 4, (4, 4), "A.f") in [
        Place("", 0, c.kind, c.line, c.statement, c.function) for c in python_changes(source)
    ]
