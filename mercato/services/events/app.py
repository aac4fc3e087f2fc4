"""Builds the events service."""

from __future__ import annotations

import asyncio
import functools
from typing import Final

from mercato.chassis import inbox
from mercato.chassis.db import Database
from mercato.chassis.events import Subscription
from mercato.chassis.rpc import Server
from mercato.chassis.service import Env, Service
from mercato.contracts.events import Events

from . import store
from .service import EventsService

CONSUMER: Final = "events.feed"
REAP_EVERY_SECONDS: Final = 60.0


def build(env: Env) -> Service:
    service = EventsService(env.database)
    server = Server(Events, env.clock)
    server.register(Events.list, service.list)
    return Service(
        server.complete(),
        env.database,
        loops=(functools.partial(_reap, env.database),),
        # The key of an entry is its inbox: a second row for each event would say the same.
        subscriptions=(Subscription(CONSUMER, service.take, types=None, has_inbox=False),),
    )


async def _reap(database: Database) -> None:
    """Deletes entries and replayed dead letters that are past their days, a bounded number a transaction."""
    while True:
        async with database.transaction() as tx:
            deleted = max(await store.reap(tx), await inbox.reap_replayed(tx, CONSUMER))
        if deleted < store.REAPED_AT_ONCE:
            await asyncio.sleep(REAP_EVERY_SECONDS)
