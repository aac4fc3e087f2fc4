"""Builds the products service."""

from __future__ import annotations

import functools
from typing import Final

from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.contracts.products import Products

from . import demo
from .consumers import IN_STOCK
from .service import FILL_LIMIT, ProductsService

FILL_SECONDS: Final = 60.0
"""The pause between two searches for products that an older version of the service has written without terms."""


def build(env: Env) -> Service:
    service = ProductsService(env.database)
    server = Server(Products, env.clock)
    server.register(Products.create, service.create)
    server.register(Products.get, service.get)
    server.register(Products.update, service.update)
    server.register(Products.archive, service.archive)
    server.register(Products.search, service.search)
    server.register(Products.quote, service.quote)
    server.register(Products.find, service.find)
    server.register(Products.restore, service.restore)
    server.register(Products.categories, service.categories)
    return Service(
        server.complete(),
        env.database,
        subscriptions=(IN_STOCK,),
        has_outbox=True,
        tasks=(PeriodicTask("terms", service.fill_terms, every_seconds=FILL_SECONDS, limit=FILL_LIMIT),),
        seed_demo=functools.partial(demo.seed, env.database),
    )
