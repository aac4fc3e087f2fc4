"""Makes the orders service out of what the host gives."""

from __future__ import annotations

import asyncio
from typing import Final

from mercato.chassis import idempotency
from mercato.chassis.db import Database
from mercato.chassis.rpc import Server
from mercato.chassis.service import Env, Service
from mercato.contracts.orders import Orders
from mercato.contracts.products import Products
from mercato.contracts.users import Users

from .placing import Placing
from .service import OrdersService

REAP_EVERY_SECONDS: Final = 60.0


def build(env: Env) -> Service:
    """The orders service. Everything that it is made of is made here."""
    placing = Placing(env.database, users=env.client(Users), products=env.client(Products))
    service = OrdersService(env.database, placing)
    server = Server(Orders, env.clock)
    server.register(Orders.place, service.place)
    server.register(Orders.get, service.get)
    server.register(Orders.list, service.list)
    server.register(Orders.move, service.move)
    server.register(Orders.cancel, service.cancel)
    server.register(Orders.history, service.history)

    async def reap_answers() -> None:
        await _reap_answers(env.database)

    return Service(server=server.complete(), database=env.database, loops=(reap_answers,))


async def _reap_answers(database: Database) -> None:
    """Deletes stored answers that are past their day, a bounded number a transaction."""
    while True:
        async with database.transaction() as tx:
            deleted = await idempotency.reap(tx)
        if deleted < idempotency.REAPED_AT_ONCE:
            await asyncio.sleep(REAP_EVERY_SECONDS)
