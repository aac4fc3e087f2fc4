"""Which sessions have ended: the log of the users service, followed by every process that verifies access tokens.

An access token is valid for up to 15 minutes. So that it ends with its session, each process reads the log of ended
sessions about every second, and keeps what it has read for as long as a token is valid, as a set in memory: looking a
session up costs no call. The set is bounded like the log: a session begins with a password hash, of which a process
makes some 80 a second.

    not loaded    no token is accepted; the first request with one waits for the first read
    followed      tokens of ended sessions are refused
    behind        the last read is more than `BEHIND_SECONDS` old: staff are refused, customers are not
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from mercato.chassis.contract import ANONYMOUS_ACTOR, Context, current
from mercato.chassis.observability.clock import Clock
from mercato.contracts.users import EndedSessions, EndedSessionsAfter

READ_EVERY_SECONDS: Final = 0.8
"""A fifth more or less, as for every periodic task: at most one second."""
READ_SECONDS: Final = 2.0
"""The deadline of a read; the pages that it has read by then are kept."""
RETRY_SECONDS: Final = 0.8
"""After a read that failed, at most."""
BEHIND_SECONDS: Final = 10.0
HELD_SECONDS: Final = 20 * 60.0
"""From reading an entry on: as long as the log keeps it, which is longer than any access token is valid."""

Read = Callable[[EndedSessionsAfter], Awaitable[EndedSessions]]


class EndedSessionsLog:
    """The ids of ended sessions that `follow` has read so far. `read` calls the users service."""

    def __init__(self, read: Read, clock: Clock) -> None:
        self.ids: dict[str, float] = {}
        """With the time at which each may be removed, the earliest first."""
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
        """Waits for a read. Raises the errors of the read."""
        await asyncio.shield(self._begin())

    async def follow(self) -> int:
        """One read, to the end of the log; gives the number of its entries. Raises the errors of the call."""
        reading = self._begin()
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            reading.cancel()
            raise

    def _begin(self) -> asyncio.Task[int]:
        """The read in progress, which all waiting callers share, or a new one."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(_retrieve_exception)
        return self._reading

    async def _read(self) -> int:
        began = self._clock.monotonic()
        current.set(Context(ANONYMOUS_ACTOR, began + READ_SECONDS, "", ""))
        count, is_full = 0, True
        while is_full:
            page = await self._read_page(EndedSessionsAfter(after=self._position, session_id=self._session_id))
            self._position, self._session_id, is_full = page.position, page.session_id, page.is_full
            self._hold(page, began + HELD_SECONDS)
            count += len(page.session_ids)
        self._remove_expired(began)
        self._read_at = began
        return count

    def _hold(self, page: EndedSessions, until: float) -> None:
        for session_id in page.session_ids:
            self.ids.pop(session_id, None)  # read again after the log was replaced: it moves to the end
            self.ids[session_id] = until

    def _remove_expired(self, now: float) -> None:
        over: list[str] = []
        for session_id, until in self.ids.items():
            if until > now:
                break
            over.append(session_id)
        for session_id in over:
            del self.ids[session_id]


def _retrieve_exception(reading: asyncio.Task[int]) -> None:
    """Keeps asyncio from logging a failure whose waiters were all cancelled."""
    if not reading.cancelled():
        reading.exception()
