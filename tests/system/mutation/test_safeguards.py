"""The table of safeguards fits the code and the tests that there are, and what nothing misses is called so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from mercato.chassis.postgres.migrations import CHECKSUMS
from mercato.testing.command import ROOT, clean_environment
from mercato.testing.process import command_line, process_table
from system.mutation.copies import Inconclusive
from system.mutation.recording import Recorded
from system.mutation.safeguards.__main__ import main
from system.mutation.safeguards.table import PARKING, SAFEGUARDS, Edit, Safeguard
from system.mutation.safeguards.trial import RunResults, edit, edited, evaluate

RED: Final = "tests/test_it.py::test_red"
GREEN: Final = "tests/test_it.py::test_green"
GUARD: Final = Safeguard("guard", "The gate has no guard.", (), red=(RED,), green=GREEN)
OF_FAULTS: Final = "tests/chassis/observability/test_faults.py"
IDLE: Final = Safeguard(
    "idle",
    "A sentence is gone, and no test reads it.",
    (
        Edit(
            "mercato/chassis/observability/faults.py",
            "Named fault points: places in the code where a test injects a fault.",
            "",
        ),
    ),
    red=(f"{OF_FAULTS}::test_an_injected_fault_happens_until_it_is_removed",),
    green=f"{OF_FAULTS}::test_a_fault_at_an_undeclared_point_is_refused",
)
MISSED: Final = Recorded("call", "AssertionError", "assert 2 == 1")


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("safeguard", SAFEGUARDS, ids=lambda safeguard: safeguard.name)
def test_every_edit_fits_and_leaves_code_that_can_be_imported(safeguard: Safeguard):
    for file, text in edited(safeguard, ROOT).items():
        assert text != (ROOT / file).read_text()
        assert missing_imports(text) == []


def missing_imports(text: str) -> list[str]:
    """What a source imports from Mercato that there is not, as `module.name`."""
    return [
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("mercato")
        for name in node.names
        if not hasattr(importlib.import_module(node.module or ""), name.name)
        and importlib.util.find_spec(f"{node.module}.{name.name}") is None
    ]


def test_no_edit_uses_a_name_that_there_is_not(tmp_path: Path):
    for safeguard in SAFEGUARDS:
        for file, text in edited(safeguard, ROOT).items():
            copy = tmp_path / safeguard.name / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)

    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_named_test_exists():
    tests = sorted({test for safeguard in SAFEGUARDS for test in (*safeguard.red, safeguard.green)})

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_safeguard_has_a_name_of_its_own_and_tests_that_miss_it():
    assert [name for name, count in Counter(s.name for s in SAFEGUARDS).items() if count > 1] == []
    assert [s.name for s in SAFEGUARDS if not s.edits or not s.red or s.green in s.red] == []


@pytest.mark.parametrize("text", ["", "guard guard", None])
def test_an_edit_that_does_not_fit_is_named_with_its_file(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "gate.py").write_text(text)
    broken = Safeguard("at-the-gate", "", (Edit("gate.py", "guard", ""),), red=(RED,), green=GREEN)

    with pytest.raises(Inconclusive, match=r"at-the-gate: .* times in gate\.py, not once"):
        edited(broken, tmp_path)


def test_every_entry_that_does_not_fit_is_named_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    gone = msgspec.structs.replace(
        IDLE, edits=(Edit("mercato/chassis/observability/faults.py", "a sentence of last year", ""),)
    )
    table = (IDLE, msgspec.structs.replace(gone, name="one"), msgspec.structs.replace(gone, name="other"))

    assert main([], table) == 2

    said = capsys.readouterr()
    assert said.out == ""
    assert [
        line.split(" stands 0 times in mercato/chassis/observability/faults.py, not once")[0]
        for line in said.err.splitlines()
    ] == [
        "safeguards: one: what it takes away",
        "safeguards: other: what it takes away",
    ]


def test_a_migration_that_was_edited_is_not_frozen_any_more(tmp_path: Path):
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "0001_gate.py").write_text("guard")
    (folder / CHECKSUMS).write_text("0001 sum\n")

    edit(Safeguard("gate", "", (Edit("migrations/0001_gate.py", "guard", ""),), red=(RED,), green=GREEN), tmp_path)

    assert {path.name: path.read_text() for path in folder.iterdir()} == {"0001_gate.py": ""}


# ---------------------------------------------------------------------------------------------------- the evaluation


@pytest.mark.parametrize(
    ("red", "green", "wrong"),
    [
        (Recorded(), Recorded(), "test_red passes without it"),
        (
            Recorded("setup", "Unavailable", "no database"),
            Recorded(),
            "test_red failed in its setup with no database",
        ),
        (Recorded("call", "NameError", "no `rows`"), Recorded(), "test_red failed in its call with no `rows`"),
        (Recorded("teardown", "AssertionError", "left over"), Recorded(), "test_red failed in its teardown"),
        (Recorded("skipped", "Skipped", "not today"), Recorded(), "test_red was skipped"),
        (MISSED, MISSED, "test_green fails as well"),
    ],
)
def test_a_removal_that_does_not_count_as_missed_has_a_reason(red: Recorded, green: Recorded, wrong: str):
    finding = evaluate(GUARD, RunResults("", {RED: red, GREEN: green}, 1.0))

    assert not finding.missed
    assert wrong in finding.wrong


def test_a_test_that_fails_because_of_it_has_missed_it():
    finding = evaluate(GUARD, RunResults("", {RED: MISSED, GREEN: Recorded()}, 1.0))

    assert finding.missed
    assert finding.said == {RED: "assert 2 == 1"}


def test_a_run_without_results_is_not_counted_as_missed():
    finding = evaluate(GUARD, RunResults("the tests did not end.", {}, 1.0))

    assert (finding.missed, finding.wrong) == (False, "the tests did not end.")


def test_a_name_that_there_is_not_is_an_error_of_one_sentence(capsys: pytest.CaptureFixture[str]):
    assert main(["cursor", "moat"]) == 2

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("safeguards: There is no safeguard 'moat'; there are cursor, ")
    assert said.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where a command has its temporary files. Its path is short: there are sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="safe-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def command(temporary: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "system.mutation.safeguards", *arguments],
        cwd=ROOT,
        env={**clean_environment(), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_nothing_is_left(temporary: Path) -> None:
    assert list(temporary.iterdir()) == []
    assert [line for pid in process_table() if str(temporary) in (line := command_line(pid))] == []


@pytest.mark.slow
@pytest.mark.long
def test_the_command_takes_a_safeguard_away_and_finds_it_missed(temporary: Path):
    before = (ROOT / PARKING).read_text()

    with command(temporary, "--json", "cursor") as process:
        out, err = process.communicate()

    assert process.returncode == 0, out + err
    result = json.loads(out)
    assert result["ok"]
    [cursor] = result["safeguards"]
    assert cursor["wrong"] == ""
    assert len(cursor["said"]) == 2
    assert (ROOT / PARKING).read_text() == before
    assert_nothing_is_left(temporary)


@pytest.mark.slow
@pytest.mark.long
def test_a_safeguard_that_nothing_misses_is_a_failure(capsys: pytest.CaptureFixture[str]):
    assert main(["--json"], (IDLE,)) == 1

    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert "passes without it" in result["safeguards"][0]["wrong"]


@pytest.mark.slow
@pytest.mark.long
def test_a_test_that_cannot_be_run_with_everything_in_place_proves_nothing(capsys: pytest.CaptureFixture[str]):
    lost = msgspec.structs.replace(IDLE, red=(f"{OF_FAULTS}::test_that_does_not_exist",))

    assert main(["--json"], (lost,)) == 2

    said = capsys.readouterr()
    assert said.out == ""
    assert "With all safeguards in place, not all tests ran" in said.err


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_leaves_no_file_and_no_process(temporary: Path):
    with command(temporary, "cursor") as process:
        assert process.stdout
        while "[ 1/1]" not in (line := process.stdout.readline()):
            assert line, "it ended before it had begun"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()

    assert (process.returncode, err.strip()) == (130, "stopped")
    assert_nothing_is_left(temporary)
