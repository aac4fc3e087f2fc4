"""`SharedFeed`: reads the feed once for all streams of a process."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

import structlog

from mercato.chassis.contract import Actor, Context, ServiceError, current
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.observability.clock import Clock
from mercato.contracts.events import PAGE_LIMIT, CursorAhead, CursorTooOld, EventPage, FeedEntry, FollowEvents
from mercato.contracts.roles import STAFF

from .entries import Interest
from .limits import StreamLimits

if TYPE_CHECKING:
    from .stream import Stream

WAIT_MS: Final = 20_000
"""How long one call waits for entries. Another one follows at once."""
ANSWER_SECONDS: Final = 10.0
"""How long an answer may take, besides the wait: as any request of the API."""
RETRY_SECONDS: Final = (0.25, 4.0)
"""The pause after a call that failed, and the longest one: each further failure doubles it."""
READER: Final = Actor(STAFF)
"""The gateway reads the whole feed, and has checked what the caller of a stream may see of it."""
LOST: Final = (CursorTooOld, CursorAhead)
"""The feed does not have what follows a position: it was deleted, or another feed was restored."""

log = structlog.stdlib.get_logger("mercato.streams", service=GATEWAY)


class SharedFeed:
    """The end of the feed, and the live streams. It reads only while there are any. `follow` calls the operation."""

    def __init__(
        self, follow: Callable[[FollowEvents], Awaitable[EventPage]], clock: Clock, limits: StreamLimits
    ) -> None:
        self.position: int | None = None
        """All entries up to here have been given to the live streams; None: there are none."""
        self.buffered_bytes = 0
        """What waits for all clients."""
        self.reads = asyncio.Semaphore(limits.reads_at_once)
        """Held by a stream that is behind, while it reads a page."""
        self._follow = follow
        self._clock = clock
        self._limits = limits
        self._live: dict[str | None, dict[Interest, set[Stream]]] = {}
        """By subject."""
        self._count = 0
        self._recent: deque[Sequence[FeedEntry]] = deque()
        self._recent_entries = 0
        self._recent_after = 0
        """All entries after this position, up to `position`, are in `_recent`."""
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------------- live streams

    def join(self, stream: Stream, *, is_at_end: bool) -> bool:
        """Makes a stream live, and gives it what it has missed; False where that is not remembered any more.

        `is_at_end`: a moment ago, its position was the end of the feed.
        """
        if self.position is None:
            if not is_at_end:
                return False
            self.position = self._recent_after = stream.position
            # Without the context of the request that has opened the stream.
            self._task = asyncio.create_task(self._run(), context=contextvars.Context(), name="follow the feed")
        elif stream.position < self._recent_after:
            return False
        interest = stream.interest
        self._live.setdefault(interest.subject, {}).setdefault(interest, set()).add(stream)
        self._count += 1
        stream.is_live = True
        for entries in list(self._recent):
            if entries[-1].position > stream.position and stream.is_live:
                stream.offer(*interest.messages_of(entries), 0)
        return True

    def leave(self, stream: Stream) -> None:
        """The stream is not live any more."""
        if not stream.is_live:
            return
        stream.is_live = False
        interest = stream.interest
        interests = self._live[interest.subject]
        interests[interest].discard(stream)
        if not interests[interest]:
            del interests[interest]
        if not interests:
            del self._live[interest.subject]
        self._count -= 1
        if not self._count and self._task is not None:
            self._task.cancel()
            self._task, self.position = None, None
            self._recent.clear()
            self._recent_entries = 0

    def _deliver(self, page: EventPage) -> None:
        before = self.position
        assert before is not None, "the feed is read for live streams"
        if page.entries:
            self._give(page.entries, before)
        if self.position is None:
            return  # the last stream has left
        self.position = page.next_after
        if not page.entries:
            return
        self._recent.append(page.entries)
        self._recent_entries += len(page.entries)
        while self._recent_entries > self._limits.recent_entries and len(self._recent) > 1:
            oldest = self._recent.popleft()
            self._recent_entries -= len(oldest)
            self._recent_after = oldest[-1].position

    def _give(self, entries: Sequence[FeedEntry], before: int) -> None:
        about: dict[str, list[FeedEntry]] = {}
        for entry in entries:
            if entry.subject in self._live:
                about.setdefault(entry.subject, []).append(entry)
        wanted = [(interests, about[subject]) for subject in about if (interests := self._live.get(subject))]
        if None in self._live:
            wanted.append((self._live[None], list(entries)))
        for interests, found in wanted:
            for interest, streams in list(interests.items()):
                messages, is_end = interest.messages_of(found)
                if messages or is_end:
                    for stream in list(streams):
                        stream.offer(messages, is_end, before)

    # ------------------------------------------------------------------------------------------------------ reading

    async def end(self) -> int:
        """The end of the feed: what comes after this position has not happened yet, or is just happening."""
        if self.position is not None:
            return self.position
        return (await self.read(FollowEvents())).next_after

    async def read(self, request: FollowEvents) -> EventPage:
        """Raises the errors of the call, and those of `Events.follow`."""
        deadline = self._clock.monotonic() + request.wait_ms / 1_000 + ANSWER_SECONDS
        token = current.set(Context(READER, deadline, "", ""))
        try:
            return await self._follow(request)
        finally:
            current.reset(token)

    async def _run(self) -> None:
        failures, this = 0, asyncio.current_task()
        while self._task is this:
            try:
                page = await self.read(FollowEvents(after=self.position, limit=PAGE_LIMIT, wait_ms=WAIT_MS))
                failures = 0
                if self._task is this:
                    self._deliver(page)
            except LOST as error:
                log.error("streams_lost_the_feed", reason=str(error))
                self._end_all()
                return
            except ServiceError as error:
                failures += 1
                if failures == 1:
                    log.warning("streams_wait_for_the_feed", reason=str(error))
                await asyncio.sleep(pause(failures))
            except Exception as error:  # an edge: without this loop no stream would get anything
                failures += 1
                log.error("streams_failed", exc_info=error)
                await asyncio.sleep(pause(failures))

    def _end_all(self) -> None:
        """Ends all live streams: their clients come back, and are answered why they cannot continue."""
        for interests in list(self._live.values()):
            for streams in list(interests.values()):
                for stream in list(streams):
                    stream.end("position_lost")


def pause(failures: int) -> float:
    """The seconds to wait after so many failures in a row; a part of them at random."""
    shortest, longest = RETRY_SECONDS
    return min(longest, shortest * 2 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)
