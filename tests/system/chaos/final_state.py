"""The state of the shop after the faults: first it comes to rest by itself, then the audit checks every invariant."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec

from mercato.chassis.postgres.outbox_row import end_of_row, place_of
from mercato.cli.databases import reached
from mercato.operations.audit.checking import Finding, audit
from mercato.operations.audit.history import ClientOperation

CONVERGENCE_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.25

UNDER_WAY: Final[Mapping[str, Mapping[str, str]]] = {
    "orders": {
        "pending orders": "SELECT count(*) FROM orders WHERE status = 'pending'",
        "sagas": "SELECT count(*) FROM sagas WHERE step <> 'authorized'",
        "refunds": "SELECT count(*) FROM refunds WHERE status = 'pending'",
    },
    "inventory": {
        "holds": "SELECT count(*) FROM reservations WHERE state = 'held'",
    },
    "payments": {
        "operations without a result": "SELECT count(*) FROM intents",
        "differences with the bank": "SELECT count(*) FROM mismatches WHERE resolved_at IS NULL",
    },
}
"""What there is none of in a shop at rest, by service."""

LAST_ROW: Final = "SELECT coalesce(max(id), 0) FROM outbox"
PARKED: Final = "SELECT count(*) FROM parked WHERE dead_at IS NULL"
READ: Final = "SELECT coalesce(min(position), 0) FROM cursors WHERE source = '{source}'"
CONSUMED: Final[Mapping[str, tuple[str, ...]]] = {
    "orders": ("events", "users"),
    "inventory": ("events", "products"),
    "payments": ("events",),
    "products": ("events", "users"),
}
"""Which services consume the events of each source. At rest each has read all rows."""

MEANINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "lost": ("O4", "O5"),
    "doubled": ("O6",),
    "charged_twice": ("M3",),
    "oversold": ("S1", "S4"),
}
"""Words of the report, and the invariants that they stand for."""


class FinalState(msgspec.Struct, frozen=True):
    """`convergence_s` None: it did not come to rest in time; `under_way` says what was left."""

    convergence_s: float | None
    under_way: dict[str, int]
    orders: int
    paid: int
    invariants: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        by_name = {finding.name: finding.violations for finding in self.findings}
        return {word: sum(by_name.get(name, 0) for name in names) for word, names in MEANINGS.items()}


async def final_state(data: Path, history: Sequence[ClientOperation], began_at: float) -> FinalState:
    """Waits for the running shop in `data` to come to rest since `began_at`, a monotonic time, and audits it."""
    async with reached(data, (), lambda _line: None) as databases:
        left = await _at_rest(databases.dsns, began_at + CONVERGENCE_SECONDS)
        took = None if left else round(time.monotonic() - began_at, 1)
        # The databases of a shop at rest may still be written to, by those who look for work; that changes nothing.
        report = await audit(databases.scratch_dsn, databases.dsns, settled_seconds=0, history=history)
        [orders] = await _counts(databases.dsns["orders"], ["SELECT count(*) FROM orders"])
        [paid] = await _counts(
            databases.dsns["orders"],
            ["SELECT count(*) FROM orders WHERE payment IN ('paid', 'partially_refunded', 'refunded')"],
        )
    return FinalState(took, left, orders, paid, len(report.findings), report.violated)


async def _at_rest(dsns: Mapping[str, str], end: float) -> dict[str, int]:
    """What is still under way when nothing is, or when the time is over."""
    left: dict[str, int] = {"everything": 1}
    while left and time.monotonic() < end:
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            left = await _under_way(dsns)
        if left:
            await asyncio.sleep(POLL_SECONDS)
    return left


async def _under_way(dsns: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for service, questions in UNDER_WAY.items():
        counts = await _counts(dsns[service], list(questions.values()))
        found.update({what: n for what, n in zip(questions, counts, strict=True) if n})
    for source, consumers in CONSUMED.items():
        [last] = await _counts(dsns[source], [LAST_ROW])
        for service in consumers:
            read, parked = await _counts(dsns[service], [READ.format(source=source), PARKED])
            if read < end_of_row(last):
                found[f"rows of {source} for {service}"] = last - place_of(read)[0] or 1
            if parked:
                found[f"parked events of {source} for {service}"] = parked
    return found


async def _counts(dsn: str, questions: Sequence[str]) -> list[int]:
    connection: Any = await asyncpg.connect(dsn)
    try:
        return [await connection.fetchval(question) for question in questions]
    finally:
        await connection.close()
