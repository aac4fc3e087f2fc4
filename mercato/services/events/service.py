"""The feed: what writes it, and what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis import faults
from mercato.chassis.db import Database, Tx
from mercato.chassis.events import Event
from mercato.contracts.events import CursorTooOld, EventPage, FeedEntry, ListEvents

from . import rules, store

BEFORE_COMMIT: Final = "feed.before_commit"
faults.declare(BEFORE_COMMIT)


class EventsService:
    """Implements `Events`, and takes every event of the shop."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, tx: Tx, events: Sequence[Event]) -> None:
        """Appends events to the feed. One that comes again finds its entry."""
        await store.append(tx, events)
        await faults.point(BEFORE_COMMIT)

    async def list(self, request: ListEvents) -> EventPage:
        async with self._database.read() as tx:
            if request.types:
                # A type that is named twice is wanted once.
                types = list(dict.fromkeys(request.types))
                rows = await store.page_of_types(tx, request.after, request.limit, types)
                oldest = await store.last_reaped_of_types(tx, types)
            else:
                rows = await store.page(tx, request.after, request.limit)
                oldest = await store.last_reaped(tx)
        # Looked up after the page: the other way round, what is deleted between the two would be missed without a word.
        if 0 < request.after < oldest:
            raise CursorTooOld(after=request.after, oldest=oldest)
        return EventPage(
            entries=tuple(_entry(row) for row in rows),
            next_after=rows[-1].position if rows else request.after,
            is_full=len(rows) == request.limit,
        )


def _entry(row: store.FeedRow) -> FeedEntry:
    return FeedEntry(
        position=row.position,
        id=rules.event_id(row.source, row.event_id),
        type=row.type,
        subject=rules.subject(row.subject, row.subject_id),
        version=row.version,
        data=msgspec.json.decode(row.data),
        at=row.at,
    )
