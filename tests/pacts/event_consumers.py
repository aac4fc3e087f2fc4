"""Services that consume events as consumers of pacts: the real consumer on a real database."""

from __future__ import annotations

import asyncio
import datetime
import itertools
from collections.abc import Iterator
from typing import Any, Final

from mercato import topology
from mercato.chassis.messaging.events import SourceRow, Subscription
from mercato.chassis.messaging.outbox import LogPage
from mercato.contracts.events import Events, ListEvents
from mercato.testing.actors import STAFF
from mercato.testing.cluster import Cluster
from pacts.book import PactBook
from pacts.consumers import ConsumerHarness
from pacts.examples import exactly
from pacts.messages import EventExample, consume
from pacts.rpc import given

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


class FeedConsumer(EventConsumer):
    """The feed stores rows unread, and unpacks them for its readers: both are what it needs of them."""

    async def take(self, source: str, content: bytes) -> None:
        try:
            await super().take(source, content)
            with self.acting(STAFF):
                await self.client(Events).list(ListEvents())
        finally:
            await self.rows("WITH gone AS (DELETE FROM feed_types RETURNING 1) DELETE FROM feed RETURNING 1")
