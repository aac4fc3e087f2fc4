"""An orders service whose buyers and catalogue a test owns, any number of hosts on its database, and a cable to cut.

Stock and money are real: inventory, payments and the sandbox, each on a database of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

import asyncpg
import msgspec

from mercato.chassis.contract import Actor, Batch, ServiceError
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.service import Build, Env, Service
from mercato.chassis.postgres.database import Database, Row
from mercato.chassis.rpc.server import Server
from mercato.contracts.orders import (
    AwaitOrder,
    GetHistory,
    GetOrder,
    MoveOrder,
    Order,
    Orders,
    PaidOrder,
    PayOrder,
    PlacedOrder,
    PlaceLine,
    PlaceOrder,
)
from mercato.contracts.payments import ListPayments, Payment, Payments
from mercato.contracts.products import ProductNotFound, Products, Quote, QuoteProduct
from mercato.contracts.users import GetUser, User, UserNotFound, Users
from mercato.services.inventory import app as inventory
from mercato.services.orders import app
from mercato.services.orders.store import OrderRecord, get
from mercato.services.payments import app as payments
from mercato.simulators.bank import app as sandbox
from mercato.testing.harness import TEST_SECRET, Rig, migrations_folder
from mercato.testing.outbox import EVENTS

T = TypeVar("T")

ALICE: Final = Actor("customer", 1)
BOB: Final = Actor("customer", 2)
STAFF: Final = Actor("staff", 9)
EPOCH: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
MUG: Final = 1
LAMP: Final = 2
POLLS: Final = 5_000
POLL_SECONDS: Final = 0.01
PLENTY: Final = 1_000_000
MUG_MINOR: Final = 1_250
SETTLED_MS: Final = 20_000

PATHS: Final = {
    ("status", "pending"): (),
    ("status", "confirmed"): (("status", "confirmed"),),
    ("status", "completed"): (("status", "confirmed"), ("status", "completed")),
    ("status", "cancelled"): (("status", "cancelled"),),
    ("fulfilment", "unfulfilled"): (("status", "confirmed"),),
    ("fulfilment", "shipped"): (("status", "confirmed"), ("fulfilment", "shipped")),
    ("fulfilment", "delivered"): (("status", "confirmed"), ("fulfilment", "shipped"), ("fulfilment", "delivered")),
    ("fulfilment", "returned"): (
        ("status", "confirmed"),
        ("fulfilment", "shipped"),
        ("fulfilment", "delivered"),
        ("fulfilment", "returned"),
    ),
}
"""The moves that bring a new order to a state."""


class FakeUsers:
    """Everybody in `known` exists. `sizes` are those of the batches that came."""

    def __init__(self) -> None:
        self.known = {ALICE.id, BOB.id}
        self.failure: ServiceError | None = None
        self.sizes: list[int] = []

    def build(self, env: Env) -> Service:
        server = Server(Users, env.clock)
        server.register(Users.get, self.get)
        return Service(server, env.database)

    async def get(self, batch: Batch[GetUser]) -> Sequence[User | ServiceError]:
        self.sizes.append(len(batch))
        if self.failure:
            raise self.failure.copy()
        return [self._user(request.id) for request in batch]

    def _user(self, user_id: int) -> User | ServiceError:
        if user_id not in self.known:
            return UserNotFound(user_id=user_id)
        return User(
            id=user_id,
            email=f"{user_id}@example.com",
            name=str(user_id),
            role="customer",
            created_at=EPOCH,
            updated_at=EPOCH,
            version=1,
        )


class FakeProducts:
    """What is in `quotes` is for sale. `sizes` are those of the batches that came."""

    def __init__(self) -> None:
        self.quotes: dict[int, Quote | ServiceError] = {MUG: quote(MUG, MUG_MINOR), LAMP: quote(LAMP, 4_999)}
        self.failure: ServiceError | None = None
        self.before_answer: Callable[[], Awaitable[None]] | None = None
        self.sizes: list[int] = []

    def build(self, env: Env) -> Service:
        server = Server(Products, env.clock)
        server.register(Products.quote, self.quote)
        return Service(server, env.database)

    async def quote(self, batch: Batch[QuoteProduct]) -> Sequence[Quote | ServiceError]:
        self.sizes.append(len(batch))
        if self.failure:
            raise self.failure.copy()
        if self.before_answer:
            await self.before_answer()
        return [self.quotes.get(request.id) or ProductNotFound(product_id=request.id) for request in batch]


def quote(product_id: int, price_minor: int, currency: str = "USD") -> Quote:
    return Quote(
        id=product_id, sku=f"SKU-{product_id}", name=f"Thing {product_id}", price_minor=price_minor, currency=currency
    )


def mugs(quantity: int = 1, *, key: str | None = None, fingerprint: bytes = b"mugs", user_id: int = 1) -> PlaceOrder:
    """An order of mugs. The same `fingerprint` means the same request."""
    return PlaceOrder(
        user_id=user_id,
        lines=(PlaceLine(product_id=MUG, quantity=quantity),),
        idempotency_key=key,
        fingerprint=fingerprint if key else b"",
    )


def basket(*lines: tuple[int, int], **fields: Any) -> PlaceOrder:
    """An order of Alice's of so many pieces of some products."""
    return PlaceOrder(
        user_id=ALICE.id, lines=tuple(PlaceLine(product_id=i, quantity=quantity) for i, quantity in lines), **fields
    )


class EmittedRow(Row):
    type: str
    subject_id: int


class Bank(msgspec.Struct, frozen=True):
    """What the bank has done for one order. Amounts in minor units."""

    captures: int
    captured_minor: int
    refunded_minor: int
    open_charges: int

    @property
    def net_minor(self) -> int:
        return self.captured_minor - self.refunded_minor


class World:
    """An orders service and the two that it asks."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.users = FakeUsers()
        self.products = FakeProducts()
        self.acting = rig.acting
        self._closing = contextlib.AsyncExitStack()
        self._eyes: dict[str, Any] = {}
        self._product_ids = itertools.count(5_001)

    async def open(self, **options: object) -> World:
        """`options` as an operator sets them: `inventory_hold_seconds=1`."""
        self.rig.options.update({f"MERCATO_{name.upper()}": str(value) for name, value in options.items()})
        self.dsn = self.rig.dsns["orders"] = await self.rig.cluster.fresh_database(
            "orders", migrations_folder(app.build)
        )
        self.rig.dsns["users"] = self.rig.dsns["products"] = self.dsn  # the fakes have no tables
        await self.rig.open(**self.builds)
        await self.stock({MUG: PLENTY, LAMP: PLENTY})
        self.orders = self.rig.client(Orders)
        self.database: Database = self.rig.host.services["orders"].database
        return self

    async def close(self) -> None:
        await self._closing.aclose()

    @property
    def builds(self) -> dict[str, Build]:
        return {
            "users": self.users.build,
            "products": self.products.build,
            "inventory": inventory.build,
            "sandbox": sandbox.build,
            "payments": payments.build,
            "orders": app.build,
        }

    async def stock(self, on_hand: Mapping[int, int]) -> None:
        """Puts so many pieces of products that nobody has counted yet on the shelf."""
        connection = await self._looking("inventory")
        for product_id, pieces in on_hand.items():
            await connection.execute(
                """
                WITH level AS (INSERT INTO levels (product_id, on_hand, version) VALUES ($1, $2, 1))
                INSERT INTO movements (product_id, kind, delta, level_version, actor_role, actor_id)
                VALUES ($1, 'receipt', $2, 1, 'staff', 9)
                """,
                product_id,
                pieces,
            )

    async def another_process(self, dsn: str | None = None) -> Orders:
        """The client of a second host, as in a process of its own, on the same database."""
        host = Host(
            self.builds,
            {**self.rig.dsns, "orders": dsn or self.dsn},
            secret=TEST_SECRET,
            transport=self.rig.transport,
            options=self.rig.options,
        )
        await host.open()
        self._closing.push_async_callback(host.close)
        return host.client(Orders)

    async def connection(self, service: str = "orders") -> Any:
        """A connection of the test's own, to look into tables and to hold locks by hand."""
        made = await cast(Any, asyncpg).connect(self.rig.dsns[service])
        self._closing.push_async_callback(made.close)
        return made

    async def cable(self) -> Cable:
        made = Cable(self.dsn)
        await made.open()
        self._closing.push_async_callback(made.close)
        return made

    # ------------------------------------------------------------------------------------------------ shorthands

    async def place(self, request: PlaceOrder | None = None, actor: Actor = ALICE) -> Order:
        with self.acting(actor):
            return (await self.orders.place(request or mugs())).order

    async def place_many(
        self, requests: Sequence[PlaceOrder], actor: Actor = ALICE
    ) -> Sequence[PlacedOrder | ServiceError]:
        with self.acting(actor):
            return await self.orders.place.many(requests)

    async def settled(self, order_id: int, wait_ms: int = SETTLED_MS) -> Order:
        """An order for which nothing is under way any more."""
        with self.acting(STAFF):
            return await self.orders.settled(AwaitOrder(id=order_id, wait_ms=wait_ms))

    async def new_product(self, pieces: int = PLENTY, price_minor: int = MUG_MINOR) -> int:
        """A product of the test's own, so many pieces of which are on the shelf."""
        product_id = next(self._product_ids)
        self.products.quotes[product_id] = quote(product_id, price_minor)
        await self.stock({product_id: pieces})
        return product_id

    async def checked_out(self, method: str | None, *lines: tuple[int, int], **fields: Any) -> Order:
        """An order of Alice's with this payment method, when its checkout has come to rest."""
        return await self.settled((await self.place(basket(*lines, payment_method=method, **fields))).id)

    async def delivered(self, method: str | None, *lines: tuple[int, int]) -> Order:
        """An order that has come to its buyer."""
        order = await self.checked_out(method, *lines)
        with self.acting(STAFF):
            if method is None:
                await self.orders.move(MoveOrder(id=order.id, status="confirmed"))
            await self.orders.move(MoveOrder(id=order.id, fulfilment="shipped"))
            return await self.orders.move(MoveOrder(id=order.id, fulfilment="delivered"))

    async def payments(self, order_id: int) -> tuple[Payment, ...]:
        """The payments of an order, the newest first."""
        with self.acting(STAFF):
            return (await self.rig.client(Payments).list(ListPayments(order_id=order_id))).payments

    async def pay(self, order_id: int, method: str = "sandbox:ok", actor: Actor = ALICE, **fields: Any) -> PaidOrder:
        with self.acting(actor):
            return await self.orders.pay(PayOrder(id=order_id, method=method, **fields))

    async def history(self, order_id: int) -> list[tuple[str, str | None, str]]:
        """Axis, before, after; in order."""
        with self.acting(STAFF):
            entries = (await self.orders.history(GetHistory(id=order_id))).entries
        return [(entry.axis, entry.before, entry.after) for entry in entries]

    async def placed_in(self, axis: str, state: str) -> Order:
        """A new order of Alice's that staff have moved to a state."""
        order = await self.place()
        with self.acting(STAFF):
            for moved, to in PATHS[axis, state]:
                await self.orders.move(cast(Any, MoveOrder)(id=order.id, **{moved: to}))
            return await self.orders.get(GetOrder(id=order.id))

    # ------------------------------------------------------------------------------------------ what others have of it

    async def bank(self, order_id: int) -> Bank:
        """What the bank's own books say of an order."""
        connection = await self._looking("sandbox")
        row = await connection.fetchrow(
            """
            SELECT count(*) FILTER (WHERE kind IN ('charge', 'capture') AND status = 'succeeded') AS captures,
                   coalesce(sum(amount_minor) FILTER (WHERE kind IN ('charge', 'capture') AND status = 'succeeded'), 0)
                       ::bigint AS captured_minor,
                   coalesce(sum(amount_minor) FILTER (WHERE kind = 'refund' AND status = 'succeeded'), 0)::bigint
                       AS refunded_minor,
                   (SELECT count(*) FROM charges WHERE order_id = $1 AND state = 'open') AS open_charges
              FROM operations WHERE order_id = $1
            """,
            order_id,
        )
        return Bank(**row)

    async def bank_operations(self, order_id: int) -> list[tuple[str, str]]:
        """Kind and status of all that the bank was ever asked for an order, in order."""
        connection = await self._looking("sandbox")
        rows = await connection.fetch("SELECT kind, status FROM operations WHERE order_id = $1 ORDER BY id", order_id)
        return [(row["kind"], row["status"]) for row in rows]

    async def shelf(self, product_id: int = MUG) -> tuple[int, int]:
        """How many pieces of a product there are, and how many of them are reserved."""
        row = await (await self._looking("inventory")).fetchrow(
            "SELECT on_hand, reserved FROM levels WHERE product_id = $1", product_id
        )
        return row["on_hand"], row["reserved"]

    async def reservation(self, order_id: int) -> str | None:
        """The state of an order's stock."""
        connection = await self._looking("inventory")
        return await connection.fetchval("SELECT state FROM reservations WHERE order_id = $1", order_id)

    async def saga(self, order_id: int, kind: str = "checkout") -> list[str]:
        """At which steps the sagas of an order are; none where all are finished."""
        return await self.values("SELECT step FROM sagas WHERE subject_id = $1 AND kind = $2", order_id, kind)

    async def _looking(self, service: str) -> Any:
        if service not in self._eyes:
            self._eyes[service] = await self.connection(service)
        return self._eyes[service]

    async def emitted(self, *order_ids: int) -> list[tuple[str, int]]:
        """Types and order ids of the events of this service, in order: of all orders, or of these."""
        async with self.database.read() as tx:
            rows = await tx.fetch(EmittedRow, f"SELECT type, subject_id FROM {EVENTS} ORDER BY id")
        return [(row.type, row.subject_id) for row in rows if not order_ids or row.subject_id in order_ids]

    async def count(self, table: str) -> int:
        return (await self.values(f"SELECT count(*) FROM {table}"))[0]

    async def values(self, sql: str, *values: object) -> list[Any]:
        async with self.database.read() as tx:
            return await tx.fetch_values(object, sql, *values)

    async def raw(self, order_id: int) -> OrderRecord:
        async with self.database.read() as tx:
            return (await get(tx, [order_id]))[order_id]

    def counted(self, name: str) -> float:
        """What a counter of the orders service has come to, as the metrics show it."""
        value = self.rig.host.telemetry.registry.get_sample_value(f"{name}_total", {"service": "orders"})
        assert value is not None, name
        return value

    def safely(self, calls: int = 1) -> int:
        """How often a safe operation arrives that is called so often: `loopback` sends it twice."""
        return calls * (2 if self.rig.transport == "loopback" else 1)

    async def until(self, holds: Callable[[], Awaitable[object]]) -> None:
        for _ in range(POLLS):
            if await holds():
                return
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError("what the test waits for does not happen")

    async def until_waiting(self, statements: int = 1) -> None:
        """Waits until so many statements in this database wait for a lock."""

        async def waiting() -> bool:
            return (
                await self.values(
                    """
                    SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock'
                    """
                )
            )[0] >= statements

        await self.until(waiting)


class Late:
    """A fault: a task that comes to its point waits there, until the test lets it go on."""

    def __init__(self) -> None:
        self.stands = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, _point: str) -> None:
        self.stands.set()
        await self.go_on.wait()


@contextlib.asynccontextmanager
async def opened(rig: Rig, **options: object) -> AsyncGenerator[World]:
    world = await World(rig).open(**options)
    try:
        yield world
    finally:
        await world.close()


class Cable:
    """The connection between a service and PostgreSQL, which a test cuts at a COMMIT.

    `cut` is "before" (the server never hears it) or "after" (it has committed, and its answer is lost); None cuts
    nothing.
    """

    def __init__(self, dsn: str) -> None:
        self._target = urlsplit(dsn)
        self.cut: str | None = None
        self.cuts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        user = self._target.netloc.rpartition("@")[0]
        self.dsn = f"postgresql://{user}@127.0.0.1:{port}{self._target.path}?sslmode=disable"

    async def close(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            far_reader, far_writer = await self._reach()
            try:
                await self._carry(reader, writer, far_reader, far_writer)
            finally:
                writer.transport.abort()
                far_writer.transport.abort()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        folder = parse_qs(self._target.query).get("host", [""])[0]
        if folder.startswith("/"):
            port = parse_qs(self._target.query).get("port", ["5432"])[0]
            return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.{port}")
        return await asyncio.open_connection(self._target.hostname, self._target.port)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        back = asyncio.create_task(self._pump(far_reader, writer))
        try:
            while data := await reader.read(65_536):
                if not (self.cut and data.endswith(b"COMMIT\x00")):
                    far_writer.write(data)
                    continue
                self.cuts += 1
                if self.cut == "after":
                    back.cancel()
                    await asyncio.gather(back, return_exceptions=True)
                    far_writer.write(data)
                    assert b"COMMIT" in await far_reader.read(1_024)
                return
        finally:
            back.cancel()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()
