"""The audit: copies of all databases, every invariant asked of them, and what was found."""

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
"""How long nobody may have touched what several services do together, before they must agree about it."""
ROWS_SHOWN: Final = 5


class Finding(msgspec.Struct, frozen=True):
    """What was found of one invariant."""

    name: str
    group: Group
    when: Literal["always", "settled"]
    title: str
    violations: int
    rows: tuple[Mapping[str, Any], ...]
    """The first few of them."""


class Report(msgspec.Struct, frozen=True):
    """An audit. `findings` has every invariant that was asked, also those that hold."""

    taken_at: datetime.datetime
    """Right before the copies, by the clock of the server."""
    is_stopped: bool
    as_of: datetime.datetime
    """From when on time is counted back: `taken_at`; of a stopped shop, its last sign of life."""
    settled_seconds: float
    copied_rows: int
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
) -> Report:
    """Asks every invariant of the databases in `dsns`, by service, as they are now; also while the shop is running.

    `admin_dsn` may make a database on its server. `settled_seconds` 0 is for a shop that stands still: everything must
    have come to its end. `is_stopped`: nobody runs the shop; it is judged as it was when it gave its last sign of life.
    With `history`, the clients' side is asked too; with `moment`, all is asked of that one. Raises `CopyError` when it
    cannot be done.
    """
    async with copied(admin_dsn, dsns, WANTED, progress=progress, moment=moment) as copies:
        as_of = await prepare(copies, settled_seconds=settled_seconds, history=history, is_stopped=is_stopped)
        invariants = SHOP if history is None else (*SHOP, *CLIENTS)
        progress(f"asking {len(invariants)} questions of {copies.rows} rows")
        findings = await check(copies, invariants)
        return Report(copies.taken_at, is_stopped, as_of, settled_seconds, copies.rows, findings)


async def check(copies: Copies, invariants: Sequence[Invariant]) -> tuple[Finding, ...]:
    """Asks each of the invariants, in order."""
    return tuple([await _find(copies, invariant) for invariant in invariants])


async def _find(copies: Copies, invariant: Invariant) -> Finding:
    # All are counted, and few are fetched: a shop that is wrong in one place is often wrong in a million.
    rows = await copies.fetch(
        f"SELECT found.*, count(*) OVER () AS how_many FROM ({invariant.sql}) found LIMIT {ROWS_SHOWN}"  # noqa: S608
    )
    violations = rows[0]["how_many"] if rows else 0
    shown = tuple({name: value for name, value in row.items() if name != "how_many"} for row in rows)
    return Finding(invariant.name, invariant.group, invariant.when, invariant.title, violations, shown)
