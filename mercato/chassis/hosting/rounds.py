"""Looking through a whole table again and again, a page at a time: how a reconciliation finds what nobody carries on.

Each round looks at the newest page, where something is wrong most likely, and at one of the older ones: a mistake that
has just been made is found within a round, and any other within as many rounds as there are pages. So the work of a
round is bounded however large the table is, and no index is kept, and paid for by every order, just for this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from prometheus_client import Counter

from mercato.chassis.observability.telemetry import Telemetry

from .periodic import PeriodicTask

C = TypeVar("C")

PAGE: Final = 5_000
"""Rows that are looked at in one go."""

Look = Callable[[C | None], Awaitable[C | None]]
"""Looks at the page behind a place, or at the newest; gives the place behind which the next one is, None at the end."""


def repairs(telemetry: Telemetry) -> Counter:
    """Counts what reconciliations have put right, by kind."""
    return telemetry.counter("mercato_reconciliation_repaired", "What was wrong, and was put right.", ["kind"])


class Rounds(Generic[C]):
    """Rounds of a `look`. Where the older pages have come to is forgotten with the process."""

    def __init__(self, look: Look[C]) -> None:
        self._look = look
        self._older: C | None = None

    def task(self, name: str, every_seconds: float) -> PeriodicTask:
        return PeriodicTask(name, self.round, every_seconds, delay_seconds=every_seconds)

    async def round(self) -> int:
        """Gives how many pages were looked at. Raises what `look` raises: the next round begins where it failed."""
        newest = await self._look(None)
        place = self._older if self._older is not None else newest
        self._older = None if place is None else await self._look(place)
        return 2
