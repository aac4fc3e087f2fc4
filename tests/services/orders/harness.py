"""Orders with real stock and money (inventory, payments and the bank); its users and its catalogue are stubs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from mercato.chassis.contract import Actor, ServiceError
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
from mercato.services.inventory import app as inventory
from mercato.services.orders import app
from mercato.services.orders.read_store import OrderRecord, get
from mercato.services.payments import app as payments
from mercato.simulators.bank import app as sandbox
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import LAMP, MUG, quote
from mercato.testing.harness import ServiceHarness
from mercato.testing.proxy import TcpProxy
from mercato.testing.stubs import stub_quotes, stub_users

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


class Bank(msgspec.Struct, frozen=True):
    """What the bank has done for one order. Amounts in minor units."""

    captures: int
    captured_minor: int
    refunded_minor: int
    open_charges: int

    @property
    def net_minor(self) -> int:
        return self.captured_minor - self.refunded_minor


class OrdersHarness(ServiceHarness):
    """`orders` is the client."""

    service = "orders"
    defaults = {  # noqa: RUF012  # not changed
        # Alice places most orders of these tests. The bounds of one customer have tests of their own.
        "orders_customer_open_orders": 0,
        "orders_customer_held_units": 0,
        "orders_customer_held_percent": 0,
    }

    async def start(self) -> None:
        self.users = stub_users([ALICE.id, BOB.id])
        self.products = stub_quotes([quote(MUG, MUG_MINOR), quote(LAMP, 4_999)])
        self._product_ids = itertools.count(5_001)
        services = {
            "inventory": inventory.build,
            "sandbox": sandbox.build,
            "payments": payments.build,
            "orders": app.build,
        }
        await self.open(services, stubs={"users": self.users.build, "products": self.products.build})
        await self.stock({MUG: PLENTY, LAMP: PLENTY})
        self.orders = self.client(Orders)

    async def stock(self, on_hand: Mapping[int, int]) -> None:
        """Puts so many pieces of new products in stock."""
        for product_id, pieces in on_hand.items():
            await self.rows(
                """
                WITH level AS (INSERT INTO levels (product_id, on_hand, version) VALUES ($1, $2, 1))
                INSERT INTO movements (product_id, kind, delta, level_version, actor_role, actor_id)
                VALUES ($1, 'receipt', $2, 1, 'staff', 9)
                """,
                product_id,
                pieces,
                of="inventory",
            )

    async def another_process(self, dsn: str | None = None) -> Orders:
        """The client of a second host on the same databases, or with another way to its own."""
        host = await self.another_host(dsns={"orders": dsn} if dsn else None)
        return host.client(Orders)

    async def proxy(self) -> TcpProxy:
        """In front of the database of orders; closed with this harness."""
        made = TcpProxy(self.dsn)
        await made.open()
        self.closing.push_async_callback(made.close)
        return made

    # ------------------------------------------------------------------------------------------------------ requests

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
        self.products.answers[product_id] = quote(product_id, price_minor)
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
            return (await self.client(Payments).list(ListPayments(order_id=order_id))).payments

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

    # --------------------------------------------------------------------------------------------- what became of them

    async def bank(self, order_id: int) -> Bank:
        """What the ledger of the bank says of an order."""
        [row] = await self.rows(
            """
            SELECT count(*) FILTER (WHERE kind IN ('charge', 'capture') AND status = 'succeeded'),
                   coalesce(sum(amount_minor) FILTER (WHERE kind IN ('charge', 'capture') AND status = 'succeeded'), 0)
                       ::bigint,
                   coalesce(sum(amount_minor) FILTER (WHERE kind = 'refund' AND status = 'succeeded'), 0)::bigint,
                   (SELECT count(*) FROM charges WHERE order_id = $1 AND state = 'open')
              FROM operations WHERE order_id = $1
            """,
            order_id,
            of="sandbox",
        )
        return Bank(*row)

    async def bank_operations(self, order_id: int) -> list[tuple[str, str]]:
        """Kind and status of every operation of an order at the bank, in order."""
        found = await self.rows(
            "SELECT kind, status FROM operations WHERE order_id = $1 ORDER BY id", order_id, of="sandbox"
        )
        return [(kind, status) for kind, status in found]

    async def shelf(self, product_id: int = MUG) -> tuple[int, int]:
        """How many pieces of a product are in stock, and how many of them are reserved."""
        levels = "SELECT on_hand, reserved FROM levels WHERE product_id = $1"
        [(on_hand, reserved)] = await self.rows(levels, product_id, of="inventory")
        return on_hand, reserved

    async def reservation(self, order_id: int) -> str | None:
        """The state of an order's stock; None without a reservation."""
        found = await self.values("SELECT state FROM reservations WHERE order_id = $1", order_id, of="inventory")
        return found[0] if found else None

    async def saga(self, order_id: int, kind: str = "checkout") -> list[str]:
        """The steps of an order's sagas; none where all are finished."""
        return await self.values("SELECT step FROM sagas WHERE subject_id = $1 AND kind = $2", order_id, kind)

    async def emitted(self, *order_ids: int) -> list[tuple[str, int]]:
        """Types and order ids of the events of this service, in order: of all orders, or of these."""
        return [(e.type, e.subject_id) for e in await self.events() if not order_ids or e.subject_id in order_ids]

    async def raw(self, order_id: int) -> OrderRecord:
        async with self.database.read() as tx:
            return (await get(tx, [order_id]))[order_id]

    def counted(self, name: str) -> float:
        """The value of a counter of the orders service in the metrics."""
        value = self.host.telemetry.registry.get_sample_value(f"{name}_total", {"service": "orders"})
        assert value is not None, name
        return value
