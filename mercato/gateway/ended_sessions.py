"""Which sessions have ended: the log of the users service, followed by every process that verifies access tokens.

A token says for up to 15 minutes who its owner is. So that it ends with its session, each process reads the log of
ended sessions about every second, and holds what it has read for as long as a token lives, as a set in memory: looking
a session up costs no call. What is bounded by the log of one moment stays so here: a session begins with a password
hash, of which a process makes some 80 a second.

    not loaded    no token is accepted; the first that comes waits for the first read
    followed      tokens of ended sessions are refused
    behind        the last read is more than `BEHIND_SECONDS` old: staff are refused, customers go on
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from mercato.chassis.contract import ANONYMOUS, Context, current
from mercato.chassis.observability.clock import Clock
from mercato.contracts.users import EndedSessions, EndedSessionsAfter

READ_EVERY_SECONDS: Final = 0.8
"""A fifth more or less, as for every periodic task: at most one second."""
READ_SECONDS: Final = 2.0
"""A read has so long; what it has read by then is kept."""
RETRY_SECONDS: Final = 0.8
"""After a read that failed, at most."""
BEHIND_SECONDS: Final = 10.0
HELD_SECONDS: Final = 20 * 60.0
"""From reading an entry on: as long as the log keeps it, which is longer than any access token lives."""

Read = Callable[[EndedSessionsAfter], Awaitable[EndedSessions]]


class EndedSessionsLog:
    """The ids of ended sessions, as far as `follow` has read them. `read` asks the users service."""

    def __init__(self, read: Read, clock: Clock) -> None:
        self.ids: dict[str, float] = {}
        """With the time at which each may be forgotten, the earliest first."""
        self._read_page = read
        self._clock = clock
        self._position = 0
        self._session_id: str | None = None
        self._read_at = float("-inf")
        self._reading: asyncio.Task[int] | None = None

    @property
    def is_loaded(self) -> bool:
        return self._read_at != float("-inf")

    @property
    def is_behind(self) -> bool:
        return self._clock.monotonic() - self._read_at > BEHIND_SECONDS

    def problem(self) -> str:
        """Why this process is not ready, in a few words; empty where it is. One that falls behind later stays ready."""
        return "" if self.is_loaded else "it has not read which sessions have ended"

    async def load(self) -> None:
        """Waits for a read. Raises what the read raises."""
        await asyncio.shield(self._begin())

    async def follow(self) -> int:
        """One read, to the end of the log; gives the number of its entries. Raises what the call raises."""
        reading = self._begin()
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            reading.cancel()
            raise

    def _begin(self) -> asyncio.Task[int]:
        """The read that runs, shared by those who wait for it, or a new one."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(_look_at)
        return self._reading

    async def _read(self) -> int:
        began = self._clock.monotonic()
        current.set(Context(ANONYMOUS, began + READ_SECONDS, "", ""))
        count, is_full = 0, True
        while is_full:
            page = await self._read_page(EndedSessionsAfter(after=self._position, session_id=self._session_id))
            self._position, self._session_id, is_full = page.position, page.session_id, page.is_full
            self._hold(page, began + HELD_SECONDS)
            count += len(page.session_ids)
        self._forget(began)
        self._read_at = began
        return count

    def _hold(self, page: EndedSessions, until: float) -> None:
        for session_id in page.session_ids:
            self.ids.pop(session_id, None)  # read again after the log was replaced: it moves to the end
            self.ids[session_id] = until

    def _forget(self, now: float) -> None:
        over: list[str] = []
        for session_id, until in self.ids.items():
            if until > now:
                break
            over.append(session_id)
        for session_id in over:
            del self.ids[session_id]


def _look_at(reading: asyncio.Task[int]) -> None:
    """A failure that all who waited for it did not wait for to the end is not one to report."""
    if not reading.cancelled():
        reading.exception()
