"""`Stream`: what is sent to one client."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

from mercato.chassis.contract import ServiceError
from mercato.contracts.events import EventPage
from mercato.gateway.asgi import Send

from .entries import Interest
from .feed import LOST, SharedFeed, pause
from .limits import StreamLimits

T = TypeVar("T")

CATCH_UP_LIMIT: Final = 200
"""Entries of one page that a stream reads while it is behind: they go to the client before the next page is read."""


class Stream:
    """One stream. `run` sends it, until `end` is called."""

    __slots__ = (
        "_end", "_feed", "_is_at_end", "_limits", "_parts", "_parts_bytes", "_reading", "_was_sent", "_woken",
        "fell_behind", "interest", "is_live", "position",
    )  # fmt: skip

    def __init__(
        self, feed: SharedFeed, limits: StreamLimits, interest: Interest, position: int, first: bytes, *, at_end: bool
    ) -> None:
        """Begins after `position`, with the message `first`. `at_end`: a moment ago, that was the end of the feed."""
        self.interest = interest
        self.position = position
        """All that is wanted up to here was sent, or waits in `_parts`."""
        self.is_live = False
        self._was_sent = False
        self.fell_behind = 0
        """How often it had to read from the feed, because its client took less than there was."""
        self._is_at_end = at_end
        self._feed = feed
        self._limits = limits
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._woken = asyncio.Event()
        self._reading: asyncio.Task[Any] | None = None
        self._end = ""
        self._add(first)

    # ---------------------------------------------------------------------------------------------- from outside

    @property
    def ended(self) -> str:
        """Why it has ended; empty where it has not."""
        return self._end

    def end(self, reason: str) -> None:
        """Ends it, after what waits for its client. The first reason counts."""
        self._end = self._end or reason
        self._feed.leave(self)
        self._woken.set()
        if self._reading is not None:
            self._reading.cancel()

    def offer(self, messages: Sequence[tuple[int, bytes]], is_end: bool, before: int) -> None:
        """Adds the messages after its position, or lets it fall behind. `before`: the position of the feed so far."""
        if messages and messages[0][0] <= self.position:
            messages = [one for one in messages if one[0] > self.position]
        if messages:
            part = b"".join([body for _, body in messages])
            if not self._has_room(len(part)):
                self.position = max(self.position, before)
                self.fell_behind += 1
                self._is_at_end = False
                self._feed.leave(self)
                self._woken.set()
                return
            self.position = messages[-1][0]
            self._add(part)
        if is_end:
            self.end("claimed")

    def beat(self) -> None:
        """Adds a comment and the position."""
        if not self._parts:
            if self.is_live and self._feed.position is not None:
                self.position = max(self.position, self._feed.position)
            self._add(position_message(self.position))

    def was_sent(self) -> bool:
        """Whether something was sent since the last call."""
        was_sent, self._was_sent = self._was_sent, False
        return was_sent

    def discard(self) -> None:
        """Drops what waits for its client."""
        self._take()

    def _has_room(self, size: int) -> bool:
        limits, feed = self._limits, self._feed
        is_free = not self._parts or self._parts_bytes + size <= limits.buffer_bytes
        return is_free and feed.buffered_bytes + size <= limits.buffered_bytes

    def _add(self, part: bytes) -> None:
        self._parts.append(part)
        self._parts_bytes += len(part)
        self._feed.buffered_bytes += len(part)
        self._woken.set()

    def _take(self) -> bytes:
        taken = b"".join(self._parts)
        self._feed.buffered_bytes -= self._parts_bytes
        self._parts, self._parts_bytes = [], 0
        return taken

    # ---------------------------------------------------------------------------------------------------- sending

    async def run(self, send: Send) -> None:
        """Sends what there is, until the end. Cancelled when the client has left."""
        try:
            while not self._end:
                self._woken.clear()
                if self._parts:
                    await self._send(send, self._take())
                elif not self.is_live:
                    await self._catch_up(send)
                else:
                    await self._woken.wait()
            await send({"type": "http.response.body", "body": self._take(), "more_body": False})
        finally:
            self.end("client_gone")
            self._take()

    async def _send(self, send: Send, part: bytes) -> None:
        self._was_sent = True
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _catch_up(self, send: Send) -> None:
        """Becomes live, or sends one page of what it has missed."""
        if self._feed.join(self, is_at_end=self._is_at_end):
            return
        page = await self._unless_ended(self._read())
        if page is None:
            return
        messages, is_end = self.interest.messages_of(page.entries)
        self.position = page.next_after
        self._is_at_end = not page.is_full
        if messages:
            await self._send(send, b"".join([body for _, body in messages]))
        if is_end:
            self.end("claimed")

    async def _read(self) -> EventPage | None:
        failures = 0
        while True:
            try:
                async with self._feed.reads:
                    return await self._feed.read(self.interest.request(self.position, CATCH_UP_LIMIT))
            except LOST:
                self._end = self._end or "position_lost"
                return None
            except ServiceError:
                failures += 1
                await asyncio.sleep(pause(failures))

    async def _unless_ended(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None where the stream ends meanwhile."""
        self._reading = reading = asyncio.create_task(work)
        try:
            await asyncio.wait((reading,))
        finally:
            self._reading = None
            reading.cancel()
        return None if reading.cancelled() else reading.result()


def position_message(position: int, comment: bytes = b"heartbeat") -> bytes:
    """Tells a client the position without an event: it sends it as Last-Event-ID when it comes back.

    An empty data buffer is not dispatched, but the last event id is set before (HTML Standard 9.2.6).
    """
    return b": %b\nid: %d\n\n" % (comment, position)
