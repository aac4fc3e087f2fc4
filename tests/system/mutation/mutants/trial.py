"""What the tests say about a mutant."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from system.mutation.copies import FAILED, PASSED, Inconclusive, Run, is_of_copy, run_pytest
from system.mutation.mutants.choosing import Mutant
from system.mutation.mutants.relevance import FILTER, WHOLE, Relevance, Test
from system.mutation.recording import Recorded

TEST_SECONDS_MIN: Final = 60.0
RUN_SECONDS_MIN: Final = 120.0
SLOWER_AT_MOST: Final = 6.0
"""A test that takes so many times longer than it took when it was recorded is taken to hang."""
WIDER_SECONDS: Final = 90.0
"""Of the wider tests, as many run as took so long when they were recorded."""

BROKEN: Final = re.compile(
    r"\b(PostgresSyntaxError|UndefinedFunctionError|UndefinedColumnError|UndefinedTableError|AmbiguousFunctionError|"
    r"AmbiguousColumnError|IndeterminateDatatypeError|DatatypeMismatchError|InvalidColumnReferenceError|GroupingError|"
    r"CannotCoerceError|WrongObjectTypeError|FeatureNotSupportedError|InvalidRecursionError)\b"
    r"|missing \d+ required|[Mm]issing required argument"
)
"""The server refuses the statement whatever the data is, or the type check refuses the call: no test is needed."""

Outcome = Literal["killed", "timed_out", "survived", "invalid", "equivalent"]


class MutantResult(msgspec.Struct, frozen=True):
    """`by`: the test that failed, and with what. `ran`: the tests that ran and passed."""

    file: str
    line: int
    function: str
    kind: str
    outcome: Outcome
    by: str
    said: str
    diff: str
    ran: tuple[str, ...]
    seconds: float


async def try_mutant(mutant: Mutant, snapshot: Path, folder: Path, relevance: Relevance) -> MutantResult:
    """Runs the tests of a mutant in `folder`, of which nothing is left: the nearest first, until one fails."""
    seconds = 0.0
    ran: list[str] = []
    copy = folder / "tree"
    try:
        shutil.copytree(snapshot, copy)
        _write(copy / mutant.file, mutant.text)
        for find in (relevance.nearest, relevance.own, relevance.wider):
            tests = [test for test in await find(mutant) if test.name not in ran]
            chosen = _within(tests, WIDER_SECONDS) if find == relevance.wider else tests
            if not chosen:
                continue
            run = await _run(copy, chosen)
            seconds += run.seconds
            if (result := _result(mutant, copy, run, seconds)) is not None:
                return result
            ran += list(run.recorded.tests)
        if not ran:
            run = await run_pytest(copy, ("-x", "-m", FILTER, *WHOLE), RUN_SECONDS_MIN * SLOWER_AT_MOST)
            seconds += run.seconds
            if (result := _result(mutant, copy, run, seconds)) is not None:
                return result
            ran += list(run.recorded.tests)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _of(mutant, "survived", seconds, ran=tuple(ran))


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    # Byte code is known by size and second of its source, and these may be as they were.
    for code in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        code.unlink()


def _within(tests: Sequence[Test], seconds: float) -> list[Test]:
    """The fastest, as many as take so long together, in the order given."""
    kept: set[str] = set()
    for test in sorted(tests, key=lambda test: test.seconds):
        seconds -= test.seconds
        if seconds < 0:
            break
        kept.add(test.name)
    return [test for test in tests if test.name in kept]


async def _run(copy: Path, tests: Sequence[Test]) -> Run:
    chosen = copy.parent / "chosen.json"
    chosen.write_bytes(msgspec.json.encode([test.name for test in tests]))
    files = dict.fromkeys(test.name.partition("::")[0] for test in tests)
    each = max(TEST_SECONDS_MIN, SLOWER_AT_MOST * max(test.seconds for test in tests))
    total = RUN_SECONDS_MIN + SLOWER_AT_MOST * sum(test.seconds for test in tests)
    plugin = ("-p", "system.mutation.mutants.plugin", "--chosen", str(chosen))
    return await run_pytest(copy, (*plugin, "-x", "--timeout", f"{each:.0f}", "-m", FILTER, *files), total)


def _result(mutant: Mutant, copy: Path, run: Run, seconds: float) -> MutantResult | None:
    """None where all tests passed."""
    if run.recorded.tests and not is_of_copy(run, copy):
        raise Inconclusive(f"The tests ran with {run.recorded.package}, and not with the copy in {copy}.")
    if run.exit_code is None:
        return _of(mutant, "timed_out", seconds, said="the run did not end")
    if run.exit_code == PASSED and run.recorded.tests:
        return None
    if BROKEN.search(run.output):
        return _of(mutant, "invalid", seconds, said=run.last)
    failed = [(test, seen) for test, seen in run.recorded.tests.items() if _has_failed(seen)]
    if run.exit_code == FAILED and failed:
        [(test, seen), *_] = failed
        outcome: Outcome = "timed_out" if seen.said.startswith("Failed: Timeout") else "killed"
        return _of(mutant, outcome, seconds, by=test, said=seen.said)
    # The package cannot be imported, or the fixtures that all tests share break.
    return _of(mutant, "killed", seconds, said=run.last)


def _has_failed(seen: Recorded) -> bool:
    return seen.failed_in not in ("none", "skipped")


def _of(
    mutant: Mutant, outcome: Outcome, seconds: float, *, by: str = "", said: str = "", ran: tuple[str, ...] = ()
) -> MutantResult:
    return MutantResult(
        file=mutant.file,
        line=mutant.line,
        function=mutant.function,
        kind=mutant.kind,
        outcome=outcome,
        by=by,
        said=said,
        diff=mutant.diff,
        ran=ran,
        seconds=round(seconds, 1),
    )


def equivalent(mutant: Mutant, reason: str) -> MutantResult:
    return _of(mutant, "equivalent", 0.0, said=reason)
