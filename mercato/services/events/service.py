"""The feed: writing and reading it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract.places import read, traceparent
from mercato.chassis.messaging.events import Event, SourceRow
from mercato.chassis.observability import faults
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.postgres.outbox_row import OutboxEvent
from mercato.contracts.events import CursorAhead, CursorTooOld, EventPage, FeedEntry, FollowEvents, ListEvents

from . import rules, store
from .store import Entry, FeedRow

BEFORE_COMMIT: Final = "feed.before_commit"
faults.declare(BEFORE_COMMIT)


POLL_SECONDS: Final = 0.2
"""How soon a waiting `follow` sees what another process has appended. One statement by primary key each time."""


class _Typed(msgspec.Struct, frozen=True, gc=False):
    type: str


_types: Final = msgspec.json.Decoder(list[_Typed])


class EventsService:
    """Implements `Events`, and consumes every event of the shop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._committed = asyncio.Event()
        """Set, and replaced, at the next commit of this process."""
        self._is_draining = False

    def wake(self) -> None:
        """After each commit of this process: there may be new entries."""
        self._committed.set()
        self._committed = asyncio.Event()

    def drain(self) -> None:
        self._is_draining = True
        self.wake()

    async def take_rows(self, tx: Tx, page: Sequence[SourceRow]) -> int:
        """Appends outbox rows unchanged; gives how many events they have."""
        entries = [
            Entry(row.source, row.id, 0, row.at, row.events, [event.type for event in _types.decode(row.events)])
            for row in page
        ]
        await store.append(tx, entries)
        await faults.point(BEFORE_COMMIT)
        return sum(len(entry.types) for entry in entries)

    async def take(self, tx: Tx, events: Sequence[Event]) -> None:
        """Appends events one by one, each in a row of its own."""
        entries = [
            Entry(event.source, *outbox_row.place_of(event.id), event.at, _packed(event), [event.type])
            for event in events
        ]
        await store.append(tx, entries)
        await faults.point(BEFORE_COMMIT)

    async def list(self, request: ListEvents) -> EventPage:
        after, types = request.after, list(dict.fromkeys(request.types))
        position, place = outbox_row.place_of(after)
        # The reader has read some events of the first row, which are skipped.
        wanted = request.limit + place + 1
        async with self._database.read() as tx:
            if types:
                found = await store.page_of_types(tx, position, wanted, types)
            else:
                found = await store.page(tx, position, wanted)
            purged = await store.last_purged(tx, types)
            last = position if found else await store.last_position(tx)
        # Read after the page: in the other order, the reader would miss events that are deleted in between.
        if 0 < after < purged:
            raise CursorTooOld(after=after, oldest=purged)
        if position > last:
            raise CursorAhead(after=after, last=outbox_row.end_of_row(last) if last else 0)
        entries = [entry for entry in _entries(found, types) if entry.position > after][: request.limit]
        return EventPage(
            entries=tuple(entries),
            next_after=entries[-1].position if entries else after,
            is_full=len(entries) == request.limit,
        )

    async def follow(self, request: FollowEvents) -> EventPage:
        until = time.monotonic() + request.wait_ms / 1_000
        while True:
            committed = self._committed
            page = await self._next(request)
            left_s = until - time.monotonic()
            if page.entries or page.is_full or request.after is None or left_s <= 0 or self._is_draining:
                return page
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, POLL_SECONDS)):
                    await committed.wait()

    async def _next(self, request: FollowEvents) -> EventPage:
        """The entries that there are now."""
        async with self._database.read() as tx:
            # Read first: what was appended since is in the page, or behind its `next_after`.
            last = await store.last_position(tx)
            end, after = outbox_row.end_of_row(last) if last else 0, request.after
            if after is None:
                return EventPage(entries=(), next_after=end)
            position, place = outbox_row.place_of(after)
            if position > last:
                raise CursorAhead(after=after, last=end)
            if after == end:
                return EventPage(entries=(), next_after=end)
            types = list(dict.fromkeys(request.types))
            found, read_to = await self._rows(tx, request, position, request.limit + place + 1, types)
            # After the page: in the other order, the reader would miss events that are deleted in between.
            purged = await store.last_purged(tx, types)
        if 0 < after < purged:
            raise CursorTooOld(after=after, oldest=purged)
        wanted = (e for e in _entries(found, types) if e.position > after and request.subject in (None, e.subject))
        entries = tuple(itertools.islice(wanted, request.limit))
        if len(entries) == request.limit:
            return EventPage(entries=entries, next_after=entries[-1].position, is_full=True)
        if read_to and read_to < last:
            return EventPage(entries=entries, next_after=outbox_row.end_of_row(read_to), is_full=True)
        return EventPage(entries=entries, next_after=max(end, entries[-1].position if entries else after))

    async def _rows(
        self, tx: Tx, request: FollowEvents, position: int, wanted: int, types: Sequence[str]
    ) -> tuple[Sequence[store.FeedRow], int]:
        """The rows of a page, and the last one that was read for it; 0: all that there are, or as many as wanted."""
        if request.subject is not None:
            last = await store.scanned_to(tx, position)
            return await store.rows_with(tx, position, last, rules.written_subject(request.subject)), last
        if types:
            return await store.page_of_types(tx, position, wanted, types), 0
        return await store.page(tx, position, wanted), 0

    async def before_last(self, count: int, types: Sequence[str] = ()) -> int:
        """The position before the last `count` events, of some types or of all; 0 where there are fewer."""
        wanted = list(dict.fromkeys(types))
        async with self._database.read() as tx:
            if wanted:
                found = await store.last_rows_of_types(tx, count + 1, wanted)
            else:
                found = await store.last_rows(tx, count + 1)
        positions = sorted((entry.position for entry in _entries(found, wanted)), reverse=True)
        return positions[count] if len(positions) > count else 0


def _traceparent(trace: str) -> str | None:
    return next(map(traceparent, read(trace)), None)


def _packed(event: Event) -> str:
    """A row with only this event."""
    data = msgspec.Raw(event.data.encode())
    return outbox_row.pack(
        [OutboxEvent(event.type, event.subject, event.subject_id, event.version, data, event.trace)]
    )[0]


def _entries(found: Sequence[FeedRow], types: Sequence[str]) -> Iterator[FeedEntry]:
    for row in found:
        for place, event in enumerate(outbox_row.unpack(row.events)):
            if types and event.type not in types:
                continue
            yield FeedEntry(
                position=outbox_row.position(row.position, place),
                id=rules.event_id(row.source, outbox_row.position(row.outbox_id, row.place + place)),
                type=event.type,
                subject=rules.subject(event.subject, event.subject_id),
                version=event.version,
                data=msgspec.json.decode(event.data),
                at=row.at,
                traceparent=_traceparent(event.trace) if event.trace else None,
            )
