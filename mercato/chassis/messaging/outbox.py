"""The event log of a service: how consumers read its outbox, and how long it keeps its rows.

A read names the consumer, the position that its cursor has committed, and the time of the row at that position. If the
log has another row there, or none although retention has deleted none, its database is not the one that the consumer
has read (it was restored from a backup), and later ids belong to other events: the read is refused. So is a read
whose next rows are deleted. Retention waits for the positions of all consumers that have read within 30 days.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

from msgspec import Meta

from mercato.chassis.contract import Contract, Kind, Message, Retry, ServiceError, single
from mercato.chassis.observability.clock import Clock
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Database, Row, Tx
from mercato.chassis.rpc.server import Server

from .events import KEPT_DAYS, UNREAD_KEPT_DAYS, SourceRow

PAGE_ROWS: Final = 64
PAGE_BYTES: Final = 1024 * 1024
"""A page ends with the row that exceeds it."""
PURGED_AT_ONCE: Final = 1_000
NOTE_EVERY_SECONDS: Final = 5.0


class ReadLog(Message):
    """Asks for the rows behind `after`. Raises `LogPurged`, `LogReplaced`."""

    consumer: str
    after: int | None = None
    """The committed position of the consumer; None: it has none yet, and begins with what is kept."""
    at: datetime.datetime | None = None
    """The time of the row in which the position is; None where the consumer has not seen a row."""
    limit: Annotated[int, Meta(ge=1, le=PAGE_ROWS)] = PAGE_ROWS


class LogPage(Message):
    """Rows by ascending id. The first may be the row of the position itself, if events of it are left."""

    rows: tuple[SourceRow, ...]
    start: int = 0
    """The position for a consumer that had none."""
    is_full: bool = False
    """Whether there may be more rows."""


class LogPurged(ServiceError, code="log.purged", kind=Kind.NOT_FOUND):
    sentence = "Rows of {source} behind position {after} are deleted, and {consumer} had not read them."
    source: str
    consumer: str
    after: int


class LogReplaced(ServiceError, code="log.replaced", kind=Kind.CONFLICT):
    sentence = (
        "The log of {source} has another row than {consumer} has read at position {after}, or none: was its database "
        "restored from a backup?"
    )
    source: str
    consumer: str
    after: int


class EventLog(Contract, name="log"):
    """The log of a source. Only services may read it; a read only notes the position, so that it may be repeated."""

    read = single(ReadLog, LogPage, allow=frozenset(), retry=Retry.SAFE)


@functools.cache
def event_log(source: str) -> type[EventLog]:
    """The contract of one source."""

    class Log(EventLog, name=f"{source}.log"):
        read = single(ReadLog, LogPage, allow=frozenset(), retry=Retry.SAFE)

    return Log


class OutboxLog:
    """Serves the event log of `source`, whose outbox is in `database`."""

    def __init__(self, source: str, database: Database) -> None:
        self._source = source
        self._database = database
        self._registered: set[str] = set()
        self._acknowledged: dict[str, int] = {}

    def server(self, clock: Clock) -> Server:
        contract = event_log(self._source)
        server = Server(contract, clock)
        server.register(contract.read, self.read)
        return server.complete()

    async def read(self, request: ReadLog) -> LogPage:
        after = request.after or 0
        row_id, place = outbox_row.place_of(after)
        async with self._database.read() as tx:
            found = await page(tx, row_id, request.limit, is_read=place == outbox_row.LAST_PLACE)
        kept = [SourceRow(source=self._source, id=row.id, at=row.at, events=row.events)
                for row in found if row.id and row.at]  # fmt: skip
        is_full = len(kept) > request.limit or sum(len(row.events) for row in kept) >= PAGE_BYTES
        purged = found[0]
        start = outbox_row.end_of_row(purged.purged_id)
        if request.after is not None:
            self._check(request, kept, purged)
            if kept and not kept[0].events:
                kept = kept[1:]
        await self._acknowledge(request.consumer, start if request.after is None else after)
        return LogPage(rows=tuple(kept), start=start, is_full=is_full)

    def _check(self, request: ReadLog, kept: Sequence[SourceRow], purged: PageRow) -> None:
        """Raises unless the row at the consumer's position is the one that it has read, and none behind is deleted."""
        after = request.after or 0
        row_id, place = outbox_row.place_of(after)
        about = {"source": self._source, "consumer": request.consumer, "after": after}
        if kept and kept[0].id == row_id:
            is_known = kept[0].at == request.at
        elif purged.purged_id > row_id or (purged.purged_id == row_id and after > 0 and place < outbox_row.LAST_PLACE):
            raise LogPurged(**about)
        else:
            is_known = purged.purged_id == row_id and request.at in (None, purged.purged_at)
        if not is_known:
            raise LogReplaced(**about)

    async def _acknowledge(self, consumer: str, position: int) -> None:
        """Keeps the position for the next `note`; a new consumer is registered at once, so that retention waits."""
        self._acknowledged[consumer] = position
        if consumer not in self._registered:
            async with self._database.transaction() as tx:
                await note(tx, {consumer: position})
            self._registered.add(consumer)

    async def maintain(self) -> int:
        """Notes the positions that were read, also unchanged ones: they show the audit until when the shop ran.

        Deletes up to `PURGED_AT_ONCE` old rows; gives how many.
        """
        acknowledged, self._acknowledged = self._acknowledged, {}
        async with self._database.transaction() as tx:
            if acknowledged:
                await note(tx, acknowledged)
            return await purge(tx)


class PageRow(Row):
    purged_id: int
    purged_at: datetime.datetime | None
    id: int | None
    at: datetime.datetime | None
    events: str


async def page(tx: Tx, row_id: int, limit: int, *, is_read: bool) -> list[PageRow]:
    """The row itself (without its events if it `is_read`), up to `limit` behind it, and the last deleted id.

    All from one snapshot. There is at least one answer; its `id` is None if there are no rows.
    """
    return await tx.fetch(
        PageRow,
        """
        SELECT coalesce(purged.id, 0) AS purged_id, purged.at AS purged_at, o.id, o.at, coalesce(o.events, '') AS events
          FROM (SELECT 1) AS always
          LEFT JOIN outbox_purged purged ON purged.single
          LEFT JOIN LATERAL (
            SELECT id, at, events
              FROM (
                SELECT *, sum(octet_length(events)) OVER (ORDER BY id) - octet_length(events) AS before
                  FROM (
                    SELECT id, at, CASE WHEN id = $1 AND $2 THEN '' ELSE events END AS events
                      FROM outbox WHERE id >= $1 ORDER BY id LIMIT $3 + 1
                  ) AS next
              ) AS measured
             WHERE before < $4
          ) o ON true
         ORDER BY o.id
        """,
        *(row_id, is_read, limit, PAGE_BYTES),
    )


async def note(tx: Tx, acknowledged: Mapping[str, int]) -> None:
    """Stores the positions of consumers; a stored position never decreases."""
    await tx.execute(
        """
        INSERT INTO outbox_readers AS readers (consumer, position)
        SELECT * FROM unnest($1::text[], $2::bigint[]) AS a (consumer, position) ORDER BY a.consumer
            ON CONFLICT ON CONSTRAINT outbox_readers_pkey DO UPDATE
           SET position = greatest(readers.position, excluded.position), seen_at = excluded.seen_at
        """,
        *(list(acknowledged), list(acknowledged.values())),
    )


async def purge(tx: Tx) -> int:
    """Deletes a bounded number of the oldest rows that need not be kept, and notes the last; gives how many.

    A consumer that has not read for `UNREAD_KEPT_DAYS` is unregistered. Without registered consumers, rows are kept.
    """
    # Only rows before the first that is kept: even if a clock was set back, the remaining rows have no gap.
    deleted = await tx.fetch_values(
        int,
        """
        WITH forgotten AS (
            DELETE FROM outbox_readers WHERE seen_at < now() - make_interval(days => $4)
        ), oldest AS MATERIALIZED (
            SELECT id, at FROM outbox ORDER BY id LIMIT $1
        ), acknowledged AS (
            SELECT min(position) + 1 >> $2 AS before_id FROM outbox_readers
        ), kept AS (
            SELECT min(o.id) AS id FROM oldest o CROSS JOIN acknowledged a
             WHERE o.at >= now() - make_interval(days => $4)
               AND (o.at >= now() - make_interval(days => $3) OR coalesce(o.id >= a.before_id, true))
        ), deleted AS (
            DELETE FROM outbox
             WHERE id IN (SELECT o.id FROM oldest o CROSS JOIN kept WHERE kept.id IS NULL OR o.id < kept.id)
            RETURNING id, at
        ), noted AS (
            INSERT INTO outbox_purged AS purged (id, at) SELECT id, at FROM deleted ORDER BY id DESC LIMIT 1
                ON CONFLICT ON CONSTRAINT outbox_purged_pkey DO UPDATE SET id = excluded.id, at = excluded.at
             WHERE excluded.id > purged.id
        )
        SELECT count(*) FROM deleted
        """,
        *(PURGED_AT_ONCE, outbox_row.PLACE_BITS, KEPT_DAYS, UNREAD_KEPT_DAYS),
    )
    return deleted[0]
