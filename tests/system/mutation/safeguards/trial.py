"""Copies of the working tree, with a safeguard or without, and what the tests in them say.

    snapshot    One copy, taken first: whoever goes on writing in the tree does not disturb what runs here.
    as it is    All tests that will be asked, in the snapshot. They must pass, or their failing later means nothing.
    without     For each safeguard a copy of the snapshot with its edits: its `red` tests must fail, `green` must pass.

A run imports the package of its own copy, and says which one that was: an editable install lies behind it on the path,
and would quietly test the original. Whatever a run writes is in the folder of its copy, which goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mercato.chassis.postgres.migrations import CHECKSUMS
from mercato.embedded_postgres.processes import serving
from system.mutation.safeguards.table import Safeguard
from system.mutation.safeguards.witness import Seen, Testimony

COPIED: Final = ("mercato", "tests", "bench", "docs", "pyproject.toml", "Makefile", "README.md")
RUN_SECONDS: Final = 240.0
"""A bound for a run that hangs: where a lock is gone, a test may wait for what never comes."""
AS_IT_IS_SECONDS: Final = 900.0
"""A bound for the run of all tests, with every safeguard in place."""
STOP_SECONDS: Final = 15.0
POLL_SECONDS: Final = 0.05
LINES_SHOWN: Final = 3

PASSED: Final = 0
FAILED: Final = 1
"""Exit codes of pytest: all tests ran, and some failed. Any other says that not all of them ran."""

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


class CannotTell(Exception):
    """Why nothing can be said about the safeguards, in a sentence."""


class Heard(msgspec.Struct, frozen=True):
    """What a run has said. `wrong`: why that is worth nothing, in a sentence; empty where it is worth something."""

    wrong: str
    tests: dict[str, Seen]
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


def take_snapshot(root: Path, folder: Path) -> Path:
    """A copy of everything that tests need of a working tree."""
    # PostgreSQL does not run as root, and whoever it runs as then must be able to pass through.
    folder.chmod(0o755)
    snapshot = folder / "snapshot"
    snapshot.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, snapshot / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(root / name, snapshot / name)
    return snapshot


async def hear_as_it_is(snapshot: Path, safeguards: Sequence[Safeguard]) -> Heard:
    """Raises `CannotTell` where a test fails although every safeguard is in its place."""
    tests = sorted({test for safeguard in safeguards for test in (*safeguard.red, safeguard.green)})
    heard = await run_tests(snapshot, tests, AS_IT_IS_SECONDS)
    if heard.wrong:
        raise CannotTell(f"With all safeguards in place, {heard.wrong}")
    if failed := [test for test in tests if not heard.passed(test)]:
        said = heard.tests[failed[0]].said
        raise CannotTell(f"With all safeguards in place, {failed[0]} fails, one of {len(failed)} that do: {said}")
    return heard


async def take_away(safeguard: Safeguard, snapshot: Path, folder: Path) -> Finding:
    """Runs the tests of a safeguard without it, in `folder`, of which nothing is left."""
    copy = folder / "tree"
    try:
        # With the byte code that the first run has left: that of edited files no longer fits them, and is made anew.
        shutil.copytree(snapshot, copy)
        edit(safeguard, copy)
        heard = await run_tests(copy, (*safeguard.red, safeguard.green))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return judge(safeguard, heard)


def edit(safeguard: Safeguard, copy: Path) -> None:
    """Makes the edits of a safeguard in a copy. Raises `CannotTell` where one does not fit."""
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
        except CannotTell as reason:
            sentences.append(str(reason))
    return sentences


def edited(safeguard: Safeguard, root: Path) -> dict[str, str]:
    """The files of a safeguard as they are without it. Raises `CannotTell` where an edit does not fit."""
    texts: dict[str, str] = {}
    for edit in safeguard.edits:
        text = texts.get(edit.file)
        if text is None:
            text = (root / edit.file).read_text() if (root / edit.file).is_file() else ""
        if (found := text.count(edit.old)) != 1:
            raise CannotTell(
                f"{safeguard.name}: what it takes away stands {found} times in {edit.file}, not once: "
                "see tests/system/mutation/safeguards/table.py."
            )
        texts[edit.file] = text.replace(edit.old, edit.new)
    return texts


def judge(safeguard: Safeguard, heard: Heard) -> Finding:
    return Finding(
        name=safeguard.name,
        removed=safeguard.removed,
        said={test: heard.tests[test].said for test in safeguard.red if test in heard.tests and heard.failed(test)},
        wrong=_wrong(safeguard, heard),
        seconds=round(heard.seconds, 1),
    )


def _wrong(safeguard: Safeguard, heard: Heard) -> str:
    if heard.wrong:
        return heard.wrong
    for test in safeguard.red:
        seen = heard.tests[test]
        if heard.passed(test):
            return f"{short(test)} passes without it: nothing misses it."
        if not heard.failed(test):
            how = "was skipped" if seen.failed_in == "skipped" else f"failed in its {seen.failed_in}"
            return f"{short(test)} {how} with {seen.said}: that is no answer."
    if not heard.passed(safeguard.green):
        said = heard.tests[safeguard.green].said
        return f"{short(safeguard.green)} fails as well, which can do without: the edits break the code ({said})."
    return ""


def short(test: str) -> str:
    return test.partition("::")[2]


# ---------------------------------------------------------------------------------------------------------------- runs


async def run_tests(copy: Path, tests: Sequence[str], seconds_max: float = RUN_SECONDS) -> Heard:
    """Runs tests in a copy, with its package, and with a folder for temporary files beside it."""
    temporary, testimony = copy.parent / f"{copy.name}-tmp", copy.parent / f"{copy.name}.json"
    temporary.mkdir(mode=0o755)
    began_at = time.monotonic()
    output = temporary / "output.txt"
    with output.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "pytest_asyncio.plugin",
                "-p",
                "pytest_timeout",
            ),
            *("-p", "system.mutation.safeguards.witness", "--witness", str(testimony), *tests),
            cwd=copy,
            env=_environment(copy, temporary),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            # Ctrl-C in a terminal reaches us alone: we end the runs ourselves, and wait for their ends.
            start_new_session=True,
        )
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds_max):
                    await process.wait()
            too_long = process.returncode is None
        finally:
            await _end(process, temporary)
    seconds = time.monotonic() - began_at
    if too_long:
        return Heard(f"the tests did not end within {seconds_max:.0f} s.", {}, seconds)
    return _heard(copy, tests, process.returncode, testimony, output, seconds)


def _environment(copy: Path, temporary: Path) -> dict[str, str]:
    """That of this process, without settings of Mercato, of PostgreSQL, or of a pytest that we may run in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MERCATO_", "PG", "PYTEST_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join((str(copy), str(copy / "tests"))),
        "TMPDIR": str(temporary),
        # All plugins that are installed would cost each run a second, and it needs two of them.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def _heard(
    copy: Path, tests: Sequence[str], exit_code: int | None, testimony: Path, output: Path, seconds: float
) -> Heard:
    seen = msgspec.json.decode(testimony.read_bytes(), type=Testimony) if testimony.exists() else Testimony("", {})
    last = " / ".join(line for line in output.read_text(errors="replace").splitlines() if line.strip())[-500:]
    wrong = ""
    if exit_code not in (PASSED, FAILED) or any(test not in seen.tests for test in tests):
        wrong = f"not all tests ran (pytest ended with {exit_code}): {last}"
    elif not Path(seen.package).resolve().is_relative_to(copy.resolve()):
        wrong = f"the tests ran with {seen.package}, and not with the copy in {copy}."
    return Heard(wrong, seen.tests, seconds)


async def _end(process: asyncio.subprocess.Process, temporary: Path) -> None:
    """Ends a run and waits until nothing of it is left.

    pytest stops its database by itself when it is asked to. If it has to be killed, the guard of the database ends it a
    little later, and until then it lives in a folder that is about to be removed.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    end = time.monotonic() + STOP_SECONDS
    while _is_served(temporary):
        if time.monotonic() > end:
            return
        await asyncio.sleep(POLL_SECONDS)


def _is_served(temporary: Path) -> bool:
    """Whether a database that a run has made there is still running."""
    return any(serving(cluster) for cluster in temporary.glob("mercato-test-*/data/postgres"))
