"""Builds the events service."""

from __future__ import annotations

from typing import Final

from mercato.chassis.hosting.periodic import PeriodicTask, cleaning
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.messaging.events import Subscription
from mercato.chassis.rpc.server import Server
from mercato.contracts.events import Events

from . import store
from .service import EventsService

CONSUMER: Final = "events.feed"
SOURCES: Final = ("inventory", "orders", "payments", "products")
PURGE_EVERY_SECONDS: Final = 60.0


def build(env: Env) -> Service:
    service = EventsService(env.database)
    server = Server(Events, env.clock)
    server.register(Events.list, service.list)
    server.register(Events.follow, service.follow)
    env.database.on_commit.append(service.wake)
    return Service(
        server.complete(),
        env.database,
        tasks=(
            PeriodicTask("purge", cleaning(env.database, store.purge), PURGE_EVERY_SECONDS, limit=store.PURGED_AT_ONCE),
        ),
        subscriptions=(Subscription(CONSUMER, SOURCES, service.take, handle_rows=service.take_rows),),
        drain=service.drain,
    )
