"""Scans a whole table page by page, again and again: how a reconciliation finds rows that no process continues.

Each round scans the newest page, where an error is most likely, and one of the older pages: a new error is found within
a round, any other within as many rounds as there are pages. So the work of a round is bounded however large the table
is, and no index, which every order would pay for, is kept for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from prometheus_client import Counter

from mercato.chassis.observability.telemetry import Telemetry

from .periodic import PeriodicTask

C = TypeVar("C")

PAGE: Final = 5_000
"""Rows of a page."""

ScanPage = Callable[[C | None], Awaitable[C | None]]
"""Scans the page behind a cursor (None: the newest page); gives the cursor of the next page, None after the last."""


def repairs(telemetry: Telemetry) -> Counter:
    """Counts what reconciliations have repaired, by kind."""
    return telemetry.counter("mercato_reconciliation_repaired", "What was wrong, and was repaired.", ["kind"])


class TableScan(Generic[C]):
    """A scan by `scan_page`. The cursor is in memory: a new process begins with the newest pages."""

    def __init__(self, scan_page: ScanPage[C]) -> None:
        self._scan_page = scan_page
        self._cursor: C | None = None

    def task(self, name: str, every_seconds: float) -> PeriodicTask:
        return PeriodicTask(name, self.run_round, every_seconds, delay_seconds=every_seconds)

    async def run_round(self) -> int:
        """Scans two pages, and gives that number. Raises what `scan_page` raises; the next round scans that page."""
        newest = await self._scan_page(None)
        cursor = self._cursor if self._cursor is not None else newest
        self._cursor = None if cursor is None else await self._scan_page(cursor)
        return 2
