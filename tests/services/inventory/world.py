"""An inventory service whose catalogue a test owns, any number of hosts on its database, and looks into its tables."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Final, cast

import asyncpg

from mercato.chassis.contract import SERVICE_ROLE, Actor, Batch, ServiceError
from mercato.chassis.hosting.service import Build, Env, Service
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.server import Server
from mercato.contracts.inventory import (
    CommitStock,
    GetLevel,
    Inventory,
    Level,
    ReleaseStock,
    Reservation,
    ReserveStock,
    ReturnStock,
    SetLevel,
    StockLine,
)
from mercato.contracts.products import GetProduct, Product, ProductNotFound, Products
from mercato.services.inventory import app
from mercato.testing.harness import Rig, migrations_folder
from mercato.testing.outbox import EVENTS

STAFF: Final = Actor("staff", 9)
SHOP: Final = Actor(SERVICE_ROLE)
EPOCH: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
NONCE: Final = 2**62 + 1
"""Of every order, where a test says nothing else."""
MUG: Final = 1
LAMP: Final = 2
UNKNOWN: Final = 999
POLLS: Final = 1_000
POLL_SECONDS: Final = 0.01

LINES: Final = """
    SELECT order_id, state, l.product_id, l.quantity, l.level_version, coalesce(l.returned, 0) AS returned
      FROM reservations r, unnest(r.product_ids, r.quantities, r.level_versions, r.returned)
           AS l (product_id, quantity, level_version, returned)
"""
"""The lines of all reservations."""

CHANGES: Final = f"""
    SELECT product_id, level_version, delta FROM movements
    UNION ALL SELECT product_id, level_version, -quantity FROM ({LINES}) n WHERE state = 'committed'
"""
"""Everything that has changed `on_hand`."""

SOUND: Final = {
    "S1 bounds": "SELECT product_id FROM levels WHERE on_hand < 0 OR reserved < 0 OR reserved > on_hand",
    "S2 on_hand is the sum of the movements less what was sold": f"""
        SELECT l.product_id FROM levels l
          LEFT JOIN (SELECT product_id, sum(delta) AS q FROM ({CHANGES}) c GROUP BY 1) m USING (product_id)
         WHERE l.on_hand <> coalesce(m.q, 0)
        """,
    "S3 reserved is what is held": f"""
        SELECT l.product_id FROM levels l
          LEFT JOIN (SELECT product_id, sum(quantity) AS q FROM ({LINES}) n WHERE state = 'held' GROUP BY 1) r
         USING (product_id)
         WHERE l.reserved <> coalesce(r.q, 0)
        """,
    "S4 never oversold": f"""
        SELECT product_id
          FROM (SELECT product_id, sum(sum(delta)) OVER (PARTITION BY product_id ORDER BY level_version) AS run
                  FROM ({CHANGES}) c GROUP BY product_id, level_version) t
         WHERE run < 0
        """,
    "S7 each committed line has a version that its level has had": f"""
        SELECT order_id FROM ({LINES}) n LEFT JOIN levels l USING (product_id)
         WHERE state = 'committed' AND coalesce(level_version NOT BETWEEN 1 AND l.version, true)
        """,
    "movements have a version that their level has had": """
        SELECT id FROM movements LEFT JOIN levels l USING (product_id)
         WHERE coalesce(level_version NOT BETWEEN 1 AND l.version, true)
        """,
    "what came back is what the lines say": f"""
        SELECT order_id FROM ({LINES}) n
          LEFT JOIN (SELECT order_id, product_id, sum(delta) AS q FROM movements WHERE kind = 'return' GROUP BY 1, 2) m
         USING (order_id, product_id)
         WHERE n.returned <> coalesce(m.q, 0)
        """,
    "events of a subject rise": f"""
        SELECT id
          FROM (SELECT id, version, subject, lag(version) OVER (PARTITION BY subject, subject_id ORDER BY id) AS p
                  FROM {EVENTS}) t
         WHERE version < p OR (version = p AND subject = 'reservation')
        """,
}
"""What holds at every moment, as queries that find what contradicts it."""


class FakeProducts:
    """What is in `known` is in the catalogue. `asked` are the ids that somebody asked for."""

    def __init__(self) -> None:
        self.known = set(range(1, 31))
        self.asked: list[int] = []
        self.failure: ServiceError | None = None

    def build(self, env: Env) -> Service:
        server = Server(Products, env.clock)
        server.register(Products.get, self.get)
        return Service(server, env.database)

    async def get(self, batch: Batch[GetProduct]) -> Sequence[Product | ServiceError]:
        if self.failure:
            raise self.failure.copy()
        self.asked += [request.id for request in batch]
        return [_product(r.id) if r.id in self.known else ProductNotFound(product_id=r.id) for r in batch]


def _product(product_id: int) -> Product:
    return Product(
        id=product_id,
        sku=f"SKU-{product_id}",
        name=f"Thing {product_id}",
        description="",
        price_minor=100,
        currency="USD",
        category="things",
        status="active",
        created_at=EPOCH,
        updated_at=EPOCH,
        version=1,
    )


def lines(**quantities: int) -> tuple[StockLine, ...]:
    """`lines(mug=2, lamp=1)`; other products by number: `lines(p7=1)`."""
    ids = {"mug": MUG, "lamp": LAMP}
    return tuple(StockLine(product_id=ids.get(n) or int(n[1:]), quantity=q) for n, q in quantities.items())


def reserve(order_id: int, *, for_payment: bool = False, nonce: int = NONCE, **quantities: int) -> ReserveStock:
    return ReserveStock(
        order_id=order_id,
        lines=lines(**quantities),
        for_payment=for_payment,
        idempotency_key=f"reserve:{order_id}",
        order_nonce=nonce,
    )


def commit(order_id: int, nonce: int = NONCE) -> CommitStock:
    return CommitStock(order_id=order_id, idempotency_key=f"commit:{order_id}", order_nonce=nonce)


def release(order_id: int, nonce: int = NONCE) -> ReleaseStock:
    return ReleaseStock(order_id=order_id, idempotency_key=f"release:{order_id}", order_nonce=nonce)


def give_back(order_id: int, reference: str = "return 1", nonce: int = NONCE, **quantities: int) -> ReturnStock:
    return ReturnStock(
        order_id=order_id,
        lines=lines(**quantities),
        reference=reference,
        idempotency_key=f"{order_id}:{reference}",
        order_nonce=nonce,
    )


class World:
    """An inventory service, and the products that it asks."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.products = FakeProducts()
        self.acting = rig.acting
        self._closing = contextlib.AsyncExitStack()
        self._numbers = itertools.count(1)

    async def open(self) -> World:
        self.dsn = self.rig.dsns["inventory"] = await self.rig.cluster.fresh_database(
            "inventory", migrations_folder(app.build)
        )
        self.rig.dsns["products"] = self.dsn  # the fake has no tables
        await self.rig.open(products=self.products.build, inventory=app.build)
        self.inventory = self.rig.client(Inventory)
        self.database: Database = self.rig.host.services["inventory"].database
        return self

    async def close(self) -> None:
        await self._closing.aclose()

    async def another_rig(self, **others: Build) -> Rig:
        """A second rig on the same databases, as another process would be; with `others`, fakes without tables."""
        made = Rig(self.rig.cluster, self.rig.transport, self.rig.options)
        made.dsns = self.rig.dsns | dict.fromkeys(others, self.dsn)
        await made.open(products=self.products.build, inventory=app.build, **others)
        self._closing.push_async_callback(made.host.close)
        return made

    async def connection(self) -> Any:
        """A connection of the test's own, to look into tables and to hold locks by hand."""
        made = await cast(Any, asyncpg).connect(self.dsn)
        self._closing.push_async_callback(made.close)
        return made

    # ------------------------------------------------------------------------------------------------ shorthands

    async def stock(self, **quantities: int) -> None:
        with self.acting(STAFF):
            for line in lines(**quantities):
                await self.inventory.set(SetLevel(product_id=line.product_id, on_hand=line.quantity))

    async def level(self, product_id: int = MUG) -> Level:
        with self.acting(STAFF):
            return await self.inventory.levels(GetLevel(product_id=product_id))

    async def pieces(self, product_id: int = MUG) -> tuple[int, int]:
        """On hand, reserved."""
        level = await self.level(product_id)
        assert level.available == level.on_hand - level.reserved
        return level.on_hand, level.reserved

    async def reserve(self, order_id: int, *, for_payment: bool = False, **quantities: int) -> Reservation:
        with self.acting(SHOP):
            return await self.inventory.reserve(reserve(order_id, for_payment=for_payment, **quantities))

    async def reserve_many(self, *requests: ReserveStock) -> Sequence[Reservation | ServiceError]:
        with self.acting(SHOP):
            return await self.inventory.reserve.many(requests)

    async def commit(self, order_id: int) -> Reservation:
        with self.acting(SHOP):
            return await self.inventory.commit(commit(order_id))

    async def release(self, order_id: int) -> Reservation:
        with self.acting(SHOP):
            return await self.inventory.release(release(order_id))

    async def restock(self, order_id: int, reference: str = "return 1", **quantities: int) -> Reservation:
        with self.acting(SHOP):
            return await self.inventory.restock(give_back(order_id, reference, **quantities))

    async def let_time_pass(self, order_id: int) -> None:
        """Moves the end of a hold into the past, by the database's clock."""
        await (await self.connection()).execute(
            "UPDATE reservations SET expires_at = now() - interval '1 second' WHERE order_id = $1", order_id
        )

    async def let_days_pass(self, days: int) -> None:
        """Makes everything so many days older, and runs what deletes by age."""
        connection = await self.connection()
        async with connection.transaction():
            await connection.execute(
                f"""
                ALTER TABLE movements DISABLE TRIGGER movements_stay;
                UPDATE movements SET at = at - interval '{days} days';
                ALTER TABLE movements ENABLE TRIGGER movements_stay;
                UPDATE reservations SET created_at = created_at - interval '{days} days',
                       updated_at = updated_at - interval '{days} days', ended_at = ended_at - interval '{days} days';
                UPDATE idempotency SET expires_at = expires_at - interval '{days} days'
                """
            )
        async with self.database.transaction() as tx:
            await idempotency.reap(tx)

    async def values(self, sql: str, *values: object) -> list[Any]:
        async with self.database.read() as tx:
            return await tx.fetch_values(object, sql, *values)

    async def states(self) -> dict[int, str]:
        rows = await (await self.connection()).fetch("SELECT order_id, state FROM reservations")
        return {row["order_id"]: row["state"] for row in rows}

    async def movements(self, product_id: int = MUG) -> list[tuple[str, int]]:
        rows = await (await self.connection()).fetch(
            "SELECT kind, delta FROM movements WHERE product_id = $1 ORDER BY id", product_id
        )
        return [(row["kind"], row["delta"]) for row in rows]

    async def told(self, subject: str, subject_id: int) -> list[tuple[str, int]]:
        """Types and versions of the events of a subject."""
        rows = await (await self.connection()).fetch(
            f"SELECT type, version FROM {EVENTS} WHERE subject = $1 AND subject_id = $2 ORDER BY id",
            subject,
            subject_id,
        )
        return [(row["type"], row["version"]) for row in rows]

    async def unsound(self) -> dict[str, list[Any]]:
        """What contradicts itself in the tables. Empty, or something is badly wrong."""
        found = {name: await self.values(sql) for name, sql in SOUND.items()}
        return {name: rows for name, rows in found.items() if rows}

    async def until(self, holds: Callable[[], Awaitable[object]]) -> None:
        for _ in range(POLLS):
            if await holds():
                return
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError("what the test waits for does not happen")

    async def until_waiting(self, statements: int = 1) -> None:
        """Waits until so many statements in this database wait for a lock."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

        async def waiting() -> bool:
            return (await self.values(sql))[0] >= statements

        await self.until(waiting)


@contextlib.asynccontextmanager
async def opened(rig: Rig) -> AsyncGenerator[World]:
    world = await World(rig).open()
    try:
        yield world
        assert await world.unsound() == {}
    finally:
        await world.close()
