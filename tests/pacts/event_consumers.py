"""Services that consume events as consumers of pacts: the real consumer on a real database."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import msgspec
import pytest

from mercato import topology
from mercato.chassis.contract import Operation
from mercato.chassis.messaging.consumers import Consumer
from mercato.chassis.messaging.events import SourceRow, Subscription
from mercato.chassis.messaging.outbox import PAGE_ROWS, LogPage, LogReplaced, event_log
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.outbox_row import end_of_row
from mercato.chassis.rpc.client import Connector
from mercato.contracts.events import Events, ListEvents
from mercato.testing.actors import SERVICE, STAFF
from mercato.testing.cluster import Cluster
from pacts.book import PactBook
from pacts.consumers import ConsumerHarness
from pacts.examples import exactly, values_of
from pacts.messages import EventExample, consume
from pacts.rpc import Exchange, Stage, given, refusal

AFAR: Final = end_of_row(2**31)
"""A position that no log reaches in a test."""
ENDS_WELL: Final = contextlib.nullcontext()
AT: Final = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)


def example(provider: str, type_: str, subject: str, data: Any) -> EventExample:
    """An event of the outbox of `provider`. `pacts/states.py` makes one of each type."""
    return EventExample(
        provider=provider,
        description=type_,
        content={"type": exactly(type_), "subject": exactly(subject), "subject_id": 1, "version": 2, "data": data},
        states=(given("an event", source=provider, type=type_),),
    )


class EventConsumer(ConsumerHarness):
    """A service that consumes events: `take` handles one as its consumer does."""

    def __init__(self, cluster: Cluster, service: str, book: PactBook) -> None:
        empty = LogPage(rows=())
        super().__init__(cluster, service, book, {f"{s}.log.read": lambda _: empty for s in topology.READS[service]})
        self.book = book
        self._ids: Iterator[int] = itertools.count(1)

    @property
    def subscription(self) -> Subscription:
        [only] = self.host.services[self.service].subscriptions
        return only

    async def take(self, source: str, content: bytes) -> None:
        row = SourceRow(source=source, id=next(self._ids), at=AT, events=f"[{content.decode()}]")
        async with self.database.transaction() as tx:
            if self.subscription.handle_rows is not None:
                await self.subscription.handle_rows(tx, [row])
            else:
                await self.subscription.handle(tx, row.unpack())

    async def consume(self, example: EventExample) -> None:
        """Pact calls the consumer from its own thread."""
        loop = asyncio.get_running_loop()

        def handle(content: bytes) -> None:
            asyncio.run_coroutine_threadsafe(self.take(example.provider, content), loop).result()

        await asyncio.to_thread(consume, self.book, example, handle)


class LogReader:
    """How a service in another process reads the event log of `example.provider`: its consumer, and its own cursor.

    The consumers of the host run by themselves: this one runs a round when a test wants it.
    """

    def __init__(self, of: EventConsumer, example: EventExample) -> None:
        self._of = of
        self._example = example
        self._stage = Stage(of.book)
        self._telemetry = Telemetry()
        self._connector = Connector(of.host.clock, self._telemetry)
        self._name = f"{of.subscription.consumer}.pact"
        log = event_log(example.provider)
        self._read: Operation[Any, Any] = log.read
        self._client = self._connector.client(log, self._stage.transport)

    def _started(self) -> Consumer:
        """As a process has it that has just started: with the position that is stored."""
        wanted = msgspec.structs.replace(self._of.subscription, consumer=self._name)
        source, clock = self._example.provider, self._of.host.clock
        return Consumer(wanted, source, self._of.database, self._client, clock, self._telemetry)

    async def close(self) -> None:
        await self._connector.close()
        await self._stage.transport.close()

    async def begins(self) -> int:
        """Asks where a consumer without a position begins; gives the position that it has then."""
        answer = {"rows": [self._row()], "start": 0}
        await self._round("a consumer begins in the log", {"after": None, "at": None}, answer=answer)
        return await self._position()

    async def goes_on(self) -> int:
        answer = {"rows": [self._row()], "is_full": False}
        await self._round("a consumer goes on in the log", {"after": exactly(0), "at": None}, answer=answer)
        return await self._position()

    async def is_refused(self) -> None:
        """The log has another row than the consumer has read, as after a restore."""
        await self._of.rows(
            "UPDATE cursors SET position = $2, at = $3 WHERE consumer = $1 RETURNING 1", self._name, AFAR, AT
        )
        gone = {"consumer": self._name, "source": self._example.provider, "after": AFAR}
        await self._round(
            "a consumer has read another log",
            {"after": exactly(AFAR), "at": "2026-11-30T12:00:00Z"},
            pytest.raises(LogReplaced),
            error=refusal(LogReplaced, **gone),
        )

    async def _round(
        self,
        description: str,
        position: Mapping[str, Any],
        ends: AbstractContextManager[Any] = ENDS_WELL,
        **outcome: Any,
    ) -> None:
        exchange = Exchange(
            description=description,
            operation=self._read,
            request={"consumer": self._name, **position, "limit": PAGE_ROWS},
            states=self._example.states,
            **outcome,
        )
        async with self._stage.expects(exchange):
            with self._of.acting(SERVICE), ends:
                await self._started().follow()

    def _row(self) -> Any:
        content = json.dumps(values_of(self._example.content))
        return {
            "source": exactly(self._example.provider),
            "id": 1,
            "at": "2026-11-30T12:00:00Z",
            "events": f"[{content}]",
        }

    async def _position(self) -> int:
        [found] = await self._of.values("SELECT position FROM cursors WHERE consumer = $1", self._name)
        return found


async def assert_reads_the_log(of: EventConsumer, example: EventExample) -> None:
    """The consumer begins, reads a page and moves behind it, and knows a log that is another."""
    reader = LogReader(of, example)
    try:
        assert await reader.begins() == 0
        assert await reader.goes_on() == end_of_row(1)
        await reader.is_refused()
    finally:
        await reader.close()
        await of.rows("DELETE FROM cursors WHERE consumer LIKE '%.pact' RETURNING 1")


class FeedConsumer(EventConsumer):
    """The feed stores rows unread, and unpacks them for its readers: both are what it needs of them."""

    async def take(self, source: str, content: bytes) -> None:
        try:
            await super().take(source, content)
            with self.acting(STAFF):
                await self.client(Events).list(ListEvents())
        finally:
            await self.forget()

    async def forget(self) -> None:
        await self.rows("WITH gone AS (DELETE FROM feed_types RETURNING 1) DELETE FROM feed RETURNING 1")
