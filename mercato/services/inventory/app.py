"""Builds the inventory service."""

from __future__ import annotations

import functools
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.hosting.periodic import PeriodicTask, cleaning
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.rpc.server import Server
from mercato.contracts.inventory import Inventory
from mercato.contracts.products import Products

from . import demo
from .counting import Adjusting, Counting
from .reserving import EXPIRED_AT_ONCE, Reserving
from .service import Reading

LONGEST_HOLD_SECONDS: Final = 30 * 86_400
LONGEST_PAUSE_SECONDS: Final = 3_600


class Options(msgspec.Struct, frozen=True):
    """The settings for operators: `MERCATO_INVENTORY_HOLD_SECONDS` and so on."""

    hold_seconds: Annotated[float, Meta(ge=0.01, le=LONGEST_HOLD_SECONDS)] = 900.0
    """How long stock is held for an order whose payment has not begun."""
    expire_every_seconds: Annotated[float, Meta(ge=0.01, le=LONGEST_PAUSE_SECONDS)] = 1.0
    """The pause between two searches for expired reservations."""


def build(env: Env) -> Service:
    """The inventory service with all its parts."""
    options = env.options(Options)
    products = env.client(Products)
    reserving = Reserving(env.database, options.hold_seconds)
    counting, reading = Counting(env.database, products), Reading(env.database, products)
    server = Server(Inventory, env.clock)
    server.register(Inventory.reserve, reserving.reserve)
    server.register(Inventory.commit, reserving.commit)
    server.register(Inventory.release, reserving.release)
    server.register(Inventory.restock, reserving.restock)
    server.register(Inventory.set, counting.set)
    server.register(Inventory.adjust, Adjusting(env.database, products).run)
    server.register(Inventory.levels, reading.levels)
    server.register(Inventory.list, reading.list)
    server.register(Inventory.holds, reading.holds)
    server.register(Inventory.trace, reading.trace)
    return Service(
        server=server.complete(),
        database=env.database,
        tasks=(
            PeriodicTask("expire", reserving.expire, options.expire_every_seconds, limit=EXPIRED_AT_ONCE),
            PeriodicTask(
                "forget keys",
                cleaning(env.database, idempotency.purge_expired),
                idempotency.PURGE_EVERY_SECONDS,
                limit=idempotency.PURGED_AT_ONCE,
            ),
        ),
        has_outbox=True,
        seed_demo=functools.partial(demo.seed, env.database),
    )
