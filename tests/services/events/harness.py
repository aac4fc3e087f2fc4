"""The feed of events, rows to write to it, and a source with an outbox."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from chassis.messaging.harness import Changed, place
from mercato.chassis.contract import Contract, Message, single
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.messaging.events import Event, Outgoing, SourceRow, Subscription
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Database
from mercato.chassis.postgres.outbox_row import OutboxEvent
from mercato.chassis.rpc.server import Server
from mercato.contracts.events import EventPage, Events, EventType, FeedEntry, ListEvents
from mercato.contracts.roles import ALL_ROLES
from mercato.services.events.app import build
from mercato.testing.actors import STAFF
from mercato.testing.harness import ServiceHarness

AT = datetime.datetime(2026, 1, 15, 9, 30, tzinfo=datetime.UTC)


def event(
    id: int, *, source: str = "orders", type: str = "order.placed", subject_id: int = 1, data: str = "{}"
) -> Event:
    """The event of an outbox row that has no other."""
    return Event(source, place(id), type, "order", subject_id, id, data, AT)


def row(id: int, *types: str, source: str = "orders") -> SourceRow:
    """An outbox row with an event of each type; versions are places."""
    events = [OutboxEvent(type_, "order", 1, n, msgspec.Raw(b"{}")) for n, type_ in enumerate(types, 1)]
    return SourceRow(source=source, id=id, at=AT, events=outbox_row.pack(events)[0])


def name(id: int, number: int = 1, *, source: str = "orders") -> str:
    return f"{source}:{place(id, number)}"


class FeedHarness(ServiceHarness):
    """The events service. A test writes to the feed as its consumer does, and reads it as staff do."""

    service = "events"

    async def start(self) -> None:
        await self.open({"events": build})

    @property
    def subscription(self) -> Subscription:
        [only] = self.host.services[self.service].subscriptions
        return only

    async def write(self, *events: Event) -> None:
        async with self.database.transaction() as tx:
            await self.subscription.handle(tx, events)

    async def write_rows(self, *page: SourceRow) -> int:
        assert self.subscription.handle_rows
        async with self.database.transaction() as tx:
            return await self.subscription.handle_rows(tx, page)

    async def page(self, *, after: int = 0, limit: int = 100, types: Sequence[EventType] = ()) -> EventPage:
        with self.acting(STAFF):
            return await self.client(Events).list(ListEvents(after=after, limit=limit, types=tuple(types)))

    async def entries(self, *, limit: int = 100, types: Sequence[EventType] = ()) -> list[FeedEntry]:
        """All entries, page after page."""
        found: list[FeedEntry] = []
        after = 0
        while (page := await self.page(after=after, limit=limit, types=types)).entries:
            found += page.entries
            after = page.next_after
        return found

    async def ids(self, *, limit: int = 100, types: Sequence[EventType] = ()) -> list[str]:
        return [entry.id for entry in await self.entries(limit=limit, types=types)]


# ------------------------------------------------------------------------------------------------------- publisher


class Nothing(Message):
    pass


class Publishing(Contract, name="orders"):
    wait = single(Nothing, Nothing, allow=ALL_ROLES)

    events: ClassVar = {"thing.changed": Changed}


def build_publisher(env: Env) -> Service:
    """A service that has an outbox and nothing else."""

    async def wait(request: Nothing) -> Nothing:
        return request

    server = Server(Publishing, env.clock)
    server.register(Publishing.wait, wait)
    return Service(server.complete(), env.database, has_outbox=True)


async def publish(database: Database, subject_id: int, version: int) -> None:
    async with database.transaction() as tx:
        tx.emit([Outgoing("thing.changed", "thing", subject_id, version, Changed(n=version))])
