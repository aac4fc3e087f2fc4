"""Builds the events service."""

from __future__ import annotations

import asyncio
import functools
from typing import Final

from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.messaging.events import Subscription
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.server import Server
from mercato.contracts.events import Events

from . import store
from .service import EventsService

CONSUMER: Final = "events.feed"
SOURCES: Final = ("inventory", "orders", "payments")
PURGE_EVERY_SECONDS: Final = 60.0


def build(env: Env) -> Service:
    service = EventsService(env.database)
    server = Server(Events, env.clock)
    server.register(Events.list, service.list)
    return Service(
        server.complete(),
        env.database,
        loops=(functools.partial(_purge, env.database),),
        subscriptions=(Subscription(CONSUMER, SOURCES, service.take, handle_rows=service.take_rows),),
    )


async def _purge(database: Database) -> None:
    """Deletes rows that are past their days, a bounded number a transaction."""
    while True:
        async with database.transaction() as tx:
            deleted = await store.purge(tx)
        if deleted < store.PURGED_AT_ONCE:
            await asyncio.sleep(PURGE_EVERY_SECONDS)
