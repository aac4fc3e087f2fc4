"""`mercato audit`: checks the invariants of a shop, and prints the rows that violate them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato.cli.databases import reached, run
from mercato.cli.progress import Progress
from mercato.operations.audit.checking import Finding, Report, audit

HOLDS: Final = 0
VIOLATED: Final = 1
FAILED: Final = 2
"""Exit codes. 2: the audit could not run."""

WIDTH: Final = 118


class Options(msgspec.Struct, frozen=True):
    """The options of `audit`, as the command line gives them."""

    data: Path
    dsns: tuple[str, ...]
    scratch: str | None
    settled: float
    json: bool


def audit_shop(options: Options) -> int:
    """Audits a shop, running or not; gives the exit code."""
    return run(lambda: _audit(options), failure=FAILED)


async def _audit(options: Options) -> int:
    progress = Progress(as_json=False)

    def print_step(line: str) -> None:
        # With --json, programs get one document, and nothing else.
        if not options.json:
            progress.step(line)

    async with reached(options.data, options.dsns, print_step, scratch=options.scratch) as databases:
        report = await audit(
            databases.scratch_dsn,
            databases.dsns,
            settled_seconds=options.settled,
            is_stopped=databases.is_stopped,
            progress=print_step,
        )
    if options.json:
        progress.say(document(report))
    else:
        progress.say()
        progress.say("\n".join(_lines(report)))
    return VIOLATED if report.violated else HOLDS


def document(report: Report) -> str:
    """The report as one JSON document."""
    return msgspec.json.encode(
        {
            "holds": not report.violated,
            "taken_at": report.taken_at,
            "is_stopped": report.is_stopped,
            "as_of": report.as_of,
            "settled_seconds": report.settled_seconds,
            "copied_rows": report.copied_rows,
            "clock_difference_seconds": report.clock_difference_seconds,
            "invariants": report.findings,
        },
        enc_hook=str,
    ).decode()


def _lines(report: Report) -> Iterator[str]:
    """A table for people, followed by the first rows of each violation."""
    group = None
    for finding in report.findings:
        if finding.group != group:
            group = finding.group
            yield f"{group}"
        yield from _line(finding)
    for finding in report.violated:
        yield ""
        yield f"{finding.name}  {finding.title}: {finding.violations} times that it does not, such as"
        yield from (f"    {_row(row)}" for row in finding.rows)
    yield ""
    yield _verdict(report)


def _line(finding: Finding) -> Iterator[str]:
    state = f"{finding.violations} VIOLATED" if finding.violations else "holds"
    first, *rest = textwrap.wrap(finding.title, WIDTH - 22)
    yield f"  {finding.name:<4}{state:>13}   {first}"
    yield from (f"{'':22}{line}" for line in rest)


def _row(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'-' if value is None else value}" for name, value in row.items())


def _verdict(report: Report) -> str:
    asked, rows = len(report.findings), report.copied_rows
    at = report.as_of.strftime("%Y-%m-%d %H:%M:%S UTC")
    when = f"as of its last sign of life at {at}: the shop does not run" if report.is_stopped else f"as of {at}"
    if not report.violated:
        return f"All {asked} invariants hold ({rows} rows, {when})."
    return f"{len(report.violated)} of {asked} invariants do not hold ({rows} rows, {when})."
