"""Looking through a whole table again and again, a page at a time: how a reconciliation finds what nobody carries on.

Each round looks at the newest page, where something is wrong most likely, and at one of the older ones: a mistake that
has just been made is found within a round, and any other within as many rounds as there are pages. So the work of a
round is bounded however large the table is, and no index is kept, and paid for by every order, just for this.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

C = TypeVar("C")

PAGE: Final = 5_000
"""Rows that are looked at in one go."""

Look = Callable[[C | None], Awaitable[C | None]]
"""Looks at the page behind a place, or at the newest; gives the place behind which the next one is, None at the end."""


class Rounds(Generic[C]):
    """Rounds of a `look`, `every_seconds`. Where the older pages have come to is forgotten with the process."""

    def __init__(self, look: Look[C], every_seconds: float) -> None:
        self._look = look
        self._every_seconds = every_seconds
        self._older: C | None = None

    async def round(self) -> None:
        """Raises what `look` raises; the next round then begins where this one failed."""
        newest = await self._look(None)
        place = self._older if self._older is not None else newest
        self._older = None if place is None else await self._look(place)

    async def run(self) -> None:
        """Never returns. Processes that were started together do not look at the same moment."""
        while True:
            await asyncio.sleep(self._every_seconds * random.uniform(0.8, 1.2))
            await self.round()
