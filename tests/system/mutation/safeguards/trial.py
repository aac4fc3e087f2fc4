"""Copies of the working tree, with a safeguard or without, and what the tests in them say.

    snapshot    One copy, taken first: changes in the tree do not disturb what runs here.
    as it is    All tests that will be asked, in the snapshot. They must pass, or their failing later means nothing.
    without     For each safeguard a copy of the snapshot with its edits: its `red` tests must fail, `green` must pass.

How copies are made, and how tests run in them, is in `copies.py` of the folder above.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mercato.chassis.postgres.migrations import CHECKSUMS
from system.mutation.copies import FAILED, PASSED, Inconclusive, is_of_copy, run_pytest
from system.mutation.recording import Recorded
from system.mutation.safeguards.table import Safeguard

RUN_SECONDS: Final = 240.0
"""A bound for a run that hangs: where a lock is gone, a test may wait for what never comes."""
AS_IT_IS_SECONDS: Final = 900.0
"""A bound for the run of all tests, with every safeguard in place."""
BROKEN_CODE: Final = frozenset(
    {
        "AttributeError",
        "ImportError",
        "IndentationError",
        "ModuleNotFoundError",
        "NameError",
        "PostgresSyntaxError",
        "SyntaxError",
        "TypeError",
        "UnboundLocalError",
        "UndefinedColumnError",
        "UndefinedFunctionError",
        "UndefinedTableError",
    }
)
"""Who takes away a safeguard leaves code that runs: a test that fails with one of these has missed nothing."""


class RunResults(msgspec.Struct, frozen=True):
    """What a run has said. `wrong`: why that is worth nothing, in a sentence; empty where it is worth something."""

    wrong: str
    tests: dict[str, Recorded]
    seconds: float

    def failed(self, test: str) -> bool:
        """Whether it failed where a test fails that misses something."""
        seen = self.tests[test]
        return seen.failed_in == "call" and seen.error not in BROKEN_CODE

    def passed(self, test: str) -> bool:
        return self.tests[test].failed_in == "none"


class Finding(msgspec.Struct, frozen=True):
    """What came of taking a safeguard away. `said`: by test that went red. `wrong`: why it does not count as missed."""

    name: str
    removed: str
    said: dict[str, str]
    wrong: str
    seconds: float

    @property
    def missed(self) -> bool:
        return not self.wrong


# ----------------------------------------------------------------------------------------------------------- the steps


async def run_unchanged(snapshot: Path, safeguards: Sequence[Safeguard]) -> RunResults:
    """Raises `Inconclusive` where a test fails although every safeguard is in its place."""
    tests = sorted({test for safeguard in safeguards for test in (*safeguard.red, safeguard.green)})
    results = await run_tests(snapshot, tests, AS_IT_IS_SECONDS)
    if results.wrong:
        raise Inconclusive(f"With all safeguards in place, {results.wrong}")
    if failed := [test for test in tests if not results.passed(test)]:
        said = results.tests[failed[0]].said
        raise Inconclusive(f"With all safeguards in place, {failed[0]} fails, one of {len(failed)} that do: {said}")
    return results


async def take_away(safeguard: Safeguard, snapshot: Path, folder: Path) -> Finding:
    """Runs the tests of a safeguard without it, in `folder`, of which nothing is left."""
    copy = folder / "tree"
    try:
        # With the byte code that the first run has left: that of edited files no longer fits them, and is made anew.
        shutil.copytree(snapshot, copy)
        edit(safeguard, copy)
        results = await run_tests(copy, (*safeguard.red, safeguard.green))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return evaluate(safeguard, results)


def edit(safeguard: Safeguard, copy: Path) -> None:
    """Makes the edits of a safeguard in a copy. Raises `Inconclusive` where one does not fit."""
    for file, text in edited(safeguard, copy).items():
        (copy / file).write_text(text)
        # A revision whose checksum stands beside it is frozen, and does not run once it was edited.
        (copy / file).with_name(CHECKSUMS).unlink(missing_ok=True)


def misfits(safeguards: Sequence[Safeguard], root: Path) -> list[str]:
    """A sentence about each safeguard with an edit that does not fit the files below `root`."""
    sentences: list[str] = []
    for safeguard in safeguards:
        try:
            edited(safeguard, root)
        except Inconclusive as reason:
            sentences.append(str(reason))
    return sentences


def edited(safeguard: Safeguard, root: Path) -> dict[str, str]:
    """The files of a safeguard as they are without it. Raises `Inconclusive` where an edit does not fit."""
    texts: dict[str, str] = {}
    for edit in safeguard.edits:
        text = texts.get(edit.file)
        if text is None:
            text = (root / edit.file).read_text() if (root / edit.file).is_file() else ""
        if (found := text.count(edit.old)) != 1:
            raise Inconclusive(
                f"{safeguard.name}: what it takes away stands {found} times in {edit.file}, not once: "
                "see tests/system/mutation/safeguards/table.py."
            )
        texts[edit.file] = text.replace(edit.old, edit.new)
    return texts


def evaluate(safeguard: Safeguard, results: RunResults) -> Finding:
    return Finding(
        name=safeguard.name,
        removed=safeguard.removed,
        said={
            test: results.tests[test].said for test in safeguard.red if test in results.tests and results.failed(test)
        },
        wrong=_wrong(safeguard, results),
        seconds=round(results.seconds, 1),
    )


def _wrong(safeguard: Safeguard, results: RunResults) -> str:
    if results.wrong:
        return results.wrong
    for test in safeguard.red:
        seen = results.tests[test]
        if results.passed(test):
            return f"{short(test)} passes without it: nothing misses it."
        if not results.failed(test):
            how = "was skipped" if seen.failed_in == "skipped" else f"failed in its {seen.failed_in}"
            return f"{short(test)} {how} with {seen.said}: that is no answer."
    if not results.passed(safeguard.green):
        said = results.tests[safeguard.green].said
        return f"{short(safeguard.green)} fails as well, which can do without: the edits break the code ({said})."
    return ""


def short(test: str) -> str:
    return test.partition("::")[2]


# ---------------------------------------------------------------------------------------------------------------- runs


async def run_tests(copy: Path, tests: Sequence[str], seconds_max: float = RUN_SECONDS) -> RunResults:
    run = await run_pytest(copy, tests, seconds_max)
    if run.exit_code is None:
        return RunResults(f"the tests did not end within {seconds_max:.0f} s.", {}, run.seconds)
    wrong = ""
    if run.exit_code not in (PASSED, FAILED) or any(test not in run.recorded.tests for test in tests):
        wrong = f"not all tests ran (pytest ended with {run.exit_code}): {run.last}"
    elif not is_of_copy(run, copy):
        wrong = f"the tests ran with {run.recorded.package}, and not with the copy in {copy}."
    return RunResults(wrong, run.recorded.tests, run.seconds)
