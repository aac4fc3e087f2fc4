"""The audit: copies all databases, checks every invariant on the copies, and reports the violations."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from mercato.operations.audit.clients import CLIENTS
from mercato.operations.audit.history import ClientOperation
from mercato.operations.audit.invariant import Group, Invariant
from mercato.operations.audit.invariants import SHOP
from mercato.operations.audit.tables import WANTED, prepare
from mercato.operations.copying import Copies, Moment, copied

SETTLED_SECONDS: Final = 60.0
"""The time since the last change of something that several services change, after which they must agree."""
ROWS_SHOWN: Final = 5


class Finding(msgspec.Struct, frozen=True):
    """The result of one invariant."""

    name: str
    group: Group
    when: Literal["always", "settled"]
    title: str
    violations: int
    rows: tuple[Mapping[str, Any], ...]
    """The first few violations."""


class Report(msgspec.Struct, frozen=True):
    """An audit. `findings` has every invariant that was checked, also those that hold."""

    taken_at: datetime.datetime
    """Right before the copies, by the clock of the server; of several servers, by the one that is behind."""
    is_stopped: bool
    as_of: datetime.datetime
    """The reference time of the checks: `taken_at`; of a stopped shop, its last activity."""
    settled_seconds: float
    copied_rows: int
    clock_difference_seconds: float
    """Of the servers of the databases. What was changed on a server whose clock is ahead is settled so much later."""
    findings: tuple[Finding, ...]

    @property
    def violated(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.violations)


async def audit(
    admin_dsn: str,
    dsns: Mapping[str, str],
    *,
    settled_seconds: float = SETTLED_SECONDS,
    history: Sequence[ClientOperation] | None = None,
    is_stopped: bool = False,
    progress: Callable[[str], None] = lambda _line: None,
    moment: Moment | None = None,
    stopped_at: datetime.datetime | None = None,
) -> Report:
    """Checks every invariant on the databases in `dsns`, by service, as they are now; also while the shop is running.

    `admin_dsn` may create a database on its server, which is one of theirs or another. `settled_seconds` 0 is for an
    idle shop: everything must have ended. `is_stopped`: the shop does not run; it is checked as of its last activity,
    or as of `stopped_at` where that is earlier. With `history`, the invariants of clients are checked too; with
    `moment`, that moment is checked. Raises `CopyError` where that is not possible.
    """
    async with copied(admin_dsn, dsns, WANTED, progress=progress, moment=moment) as copies:
        as_of = await prepare(
            copies, settled_seconds=settled_seconds, history=history, is_stopped=is_stopped, stopped_at=stopped_at
        )
        invariants = SHOP if history is None else (*SHOP, *CLIENTS)
        progress(f"checking {len(invariants)} invariants on {copies.rows} rows")
        findings = await check(copies, invariants)
        return Report(
            taken_at=copies.taken_at,
            is_stopped=is_stopped,
            as_of=as_of,
            settled_seconds=settled_seconds,
            copied_rows=copies.rows,
            clock_difference_seconds=copies.clock_difference_seconds,
            findings=findings,
        )


async def check(copies: Copies, invariants: Sequence[Invariant]) -> tuple[Finding, ...]:
    """Checks each of the invariants, in order."""
    return tuple([await _find(copies, invariant) for invariant in invariants])


async def _find(copies: Copies, invariant: Invariant) -> Finding:
    # All violations are counted, and few are fetched: there can be millions.
    rows = await copies.fetch(
        f"SELECT found.*, count(*) OVER () AS how_many FROM ({invariant.sql}) found LIMIT {ROWS_SHOWN}"  # noqa: S608
    )
    violations = rows[0]["how_many"] if rows else 0
    shown = tuple({name: value for name, value in row.items() if name != "how_many"} for row in rows)
    return Finding(invariant.name, invariant.group, invariant.when, invariant.title, violations, shown)
