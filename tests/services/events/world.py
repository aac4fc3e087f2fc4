"""A feed that a test writes to as a relay would, and reads as staff would; and a publisher with an outbox."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from chassis.event_world import Told
from mercato.chassis.contract import Actor, Contract, Message, single
from mercato.chassis.db import Database
from mercato.chassis.events import Event, Outgoing, emit
from mercato.chassis.rpc import Server
from mercato.chassis.service import Env, Service
from mercato.chassis.testing import Rig
from mercato.contracts.events import EventPage, Events, EventType, FeedEntry, ListEvents
from mercato.contracts.roles import EVERYBODY

STAFF = Actor("staff", 1)
AT = datetime.datetime(2026, 1, 15, 9, 30, tzinfo=datetime.UTC)


def event(
    id: int, *, source: str = "orders", type: str = "order.placed", subject_id: int = 1, data: str = "{}"
) -> Event:
    return Event(source, id, type, "order", subject_id, id, data, AT)


class Feed:
    """The feed of a rig."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        service = rig.host.services["events"]
        self.database = service.database
        [self.subscription] = service.subscriptions

    async def write(self, *events: Event) -> None:
        async with self.database.transaction() as tx:
            await self.subscription.handle(tx, events)

    async def page(self, *, after: int = 0, limit: int = 100, types: Sequence[EventType] = ()) -> EventPage:
        with self.rig.acting(STAFF):
            return await self.rig.client(Events).list(ListEvents(after=after, limit=limit, types=tuple(types)))

    async def entries(self, *, limit: int = 100, types: Sequence[EventType] = ()) -> list[FeedEntry]:
        """All, page after page."""
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


class Publishing(Contract, name="publisher"):
    wait = single(Nothing, Nothing, allow=EVERYBODY)


def build_publisher(env: Env) -> Service:
    """A service that has an outbox and nothing else."""

    async def wait(request: Nothing) -> Nothing:
        return request

    server = Server(Publishing, env.clock)
    server.register(Publishing.wait, wait)
    return Service(server.complete(), env.database, has_outbox=True)


async def publish(database: Database, subject_id: int, version: int) -> None:
    async with database.transaction() as tx:
        await emit(tx, [Outgoing("thing.changed", "thing", subject_id, version, Told(n=version))])
