"""Takes each safeguard away, one at a time, in a copy of this tree, and expects a test to miss it.

    make safeguards [ARGS="inbox epoch"] [ARGS=--list] [ARGS=--json]

What is promised under crashes and races is only worth as much as the tests that fail when it is broken. The safeguards
and their tests are in `table.py`, how one is tried is in `trial.py`. The working tree is not touched. Ends with 0 if
every safeguard was missed, with 1 if one was not, with 2 if nothing can be said.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from system.mutation.console import Console, interruptible
from system.mutation.copies import Inconclusive, take_snapshot
from system.mutation.safeguards.table import SAFEGUARDS, Safeguard
from system.mutation.safeguards.trial import Finding, misfits, run_unchanged, short, take_away

ROOT: Final = Path(__file__).parents[4]
AT_ONCE: Final = 2
"""Copies that are tested at the same time. A run waits for a database to be made as long as it tests."""


class Result(msgspec.Struct, frozen=True):
    """A run, as `--json` prints it."""

    ok: bool
    seconds: float
    safeguards: tuple[Finding, ...]


def main(arguments: Sequence[str] | None = None, safeguards: Sequence[Safeguard] = SAFEGUARDS) -> int:
    options = _options(arguments)
    display = Display(options.json)
    try:
        chosen = _chosen(safeguards, options.names)
        if options.list:
            display.list(chosen)
            return 0
        result = asyncio.run(interruptible(try_all(chosen, display)))
    except Inconclusive as reason:
        for sentence in str(reason).splitlines():
            print(f"safeguards: {sentence}", file=sys.stderr)
        return 2
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
        return 130
    display.result(result)
    return 0 if result.ok else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make safeguards", description="Take each safeguard away, and see a test miss it."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--list", action="store_true", help="say what there is, and take nothing away")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


def _chosen(safeguards: Sequence[Safeguard], names: Sequence[str]) -> Sequence[Safeguard]:
    known = {safeguard.name: safeguard for safeguard in safeguards}
    if unknown := [name for name in names if name not in known]:
        raise Inconclusive(f"There is no safeguard {unknown[0]!r}; there are {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)] if names else safeguards


async def try_all(safeguards: Sequence[Safeguard], display: Display) -> Result:
    """Tries safeguards in the order given, some at a time. Raises `Inconclusive`."""
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mercato-safeguards-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        snapshot = take_snapshot(ROOT, folder)
        if sentences := misfits(safeguards, snapshot):
            raise Inconclusive("\n".join(sentences))
        display.line(f"the tests of {len(safeguards)} safeguards, with all of them in place")
        as_it_is = await run_unchanged(snapshot, safeguards)
        display.line(f"        {len(as_it_is.tests)} tests pass ({as_it_is.seconds:.1f} s)")
        findings = await _try_each(safeguards, snapshot, folder, display)
    seconds = round(time.monotonic() - began_at, 1)
    return Result(all(finding.missed for finding in findings), seconds, tuple(findings))


async def _try_each(safeguards: Sequence[Safeguard], snapshot: Path, folder: Path, display: Display) -> list[Finding]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def try_one(n: int, safeguard: Safeguard) -> Finding:
        async with turn:
            display.begin(n, len(safeguards), safeguard)
            # By number: a socket's path must be short.
            (folder / str(n)).mkdir(mode=0o755)
            finding = await take_away(safeguard, snapshot, folder / str(n))
            display.end(n, len(safeguards), finding)
            return finding

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(try_one(n, safeguard)) for n, safeguard in enumerate(safeguards, 1)]
    return [task.result() for task in tasks]


class Display(Console):
    """What a person sees: what goes on, a line for what is done, a table. With --json nothing but the result."""

    def list(self, safeguards: Sequence[Safeguard]) -> None:
        if self.as_json:
            print(msgspec.json.encode(safeguards).decode())
            return
        for safeguard in safeguards:
            print(f"{safeguard.name:24s}{safeguard.removed}")

    def begin(self, n: int, count: int, safeguard: Safeguard) -> None:
        self.going[n] = f"[{n:2d}/{count}] without {safeguard.name}"
        if not self.draws:
            self.line(f"[{n:2d}/{count}] {safeguard.name}: {safeguard.removed}")
        self.draw()

    def end(self, n: int, count: int, finding: Finding) -> None:
        del self.going[n]
        self.line(f"[{n:2d}/{count}] {finding.name:24s}{_outcome(finding)} ({finding.seconds:.1f} s)")
        self.draw()

    def result(self, result: Result) -> None:
        if self.as_json:
            print(msgspec.json.encode(result).decode())
            return
        print(f"\n{'safeguard':24s}{'seconds':>7s}  tests that went red")
        for finding in result.safeguards:
            for line in _lines(finding):
                print(line)
        missed = sum(finding.missed for finding in result.safeguards)
        print(f"\n{missed} of {len(result.safeguards)} safeguards were missed by a test ({result.seconds:.0f} s)")


def _outcome(finding: Finding) -> str:
    return "missed" if finding.missed else "NOT MISSED"


def _lines(finding: Finding) -> list[str]:
    tests = [short(test) for test in finding.said] or ["-"]
    lines = [f"{finding.name:24s}{finding.seconds:7.1f}  {tests[0]}", *(f"{'':33s}{test}" for test in tests[1:])]
    return lines if finding.missed else [*lines, f"{'':33s}NOT MISSED: {finding.wrong}"]


if __name__ == "__main__":
    sys.exit(main())
