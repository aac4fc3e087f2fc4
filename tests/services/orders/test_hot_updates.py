"""Updates that change no indexed column are HOT: they write no index entry, under load as on an empty page."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from mercato.contracts.orders import MoveOrder, RefundOrder, ReturnLine, ReturnOrder
from mercato.testing.actors import STAFF
from mercato.testing.waiting import until
from services.orders.harness import OrdersHarness

ORDERS: Final = 48


class Updates(msgspec.Struct, frozen=True):
    """Of a table: how many updates, how many of them were HOT, and how many found their page full.

    A page is full of row versions that another snapshot still keeps: the more, the slower the machine.
    """

    all: int
    hot: int
    moved: int

    @property
    def indexed(self) -> int:
        """Those that changed a column which an index has: neither HOT nor in need of another page."""
        return self.all - self.hot - self.moved


async def updates(connection: Any) -> dict[str, Updates]:
    rows = await connection.fetch(
        "SELECT relname, n_tup_upd, n_tup_hot_upd, n_tup_newpage_upd FROM pg_stat_user_tables"
    )
    return {table: Updates(*counts) for table, *counts in rows}


async def flush_statistics(harness: OrdersHarness, connection: Any) -> None:
    """Ends the connections of the service: each reports what it has counted when it ends, otherwise seconds later."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    pids = [row["pid"] for row in await connection.fetch(f"SELECT pid, pg_terminate_backend(pid) {others}")]

    async def are_gone() -> bool:
        return await connection.fetchval(f"SELECT count(*) {others} AND pid = ANY($1::integer[])", pids) == 0

    await until(are_gone)


async def sell_and_take_back(harness: OrdersHarness, product_id: int) -> None:
    """An order that waits, is declined, is paid, refunded in parts, delivered, and returned in parts."""
    order = await harness.checked_out(None, (product_id, 3))
    await asyncio.gather(harness.pay(order.id, "sandbox:declined"), return_exceptions=True)
    await harness.settled(order.id)
    payment = (await harness.pay(order.id)).payment
    await harness.settled(order.id)
    with harness.acting(STAFF):
        for n in range(3):
            key = f"refund-{order.id}-{n}"
            await harness.orders.refund(RefundOrder(payment_id=payment.id, amount_minor=100, idempotency_key=key))
        await harness.orders.move(MoveOrder(id=order.id, fulfilment="shipped"))
        await harness.orders.move(MoveOrder(id=order.id, fulfilment="delivered"))
        for n in range(2):
            line, key = ReturnLine(line_id=1, quantity=1), f"return-{order.id}-{n}"
            await harness.orders.take_back(ReturnOrder(id=order.id, lines=(line,), idempotency_key=key))


async def moves_of_axes(connection: Any) -> int:
    """How many transitions have moved an order along an axis. The others are one more partial refund or return."""
    return await connection.fetchval(
        """
        SELECT count(*)
          FROM history h
          JOIN history b ON b.order_id = h.order_id AND b.version = h.version - 1
         WHERE (h.status, h.payment, h.fulfilment) <> (b.status, b.payment, b.fulfilment)
        """
    )


async def test_only_updates_of_indexed_columns_are_not_hot(harness: OrdersHarness):
    connection = await harness.connection()
    product_id = await harness.new_product()
    before = await updates(connection)
    await asyncio.gather(*(sell_and_take_back(harness, product_id) for _ in range(ORDERS)))
    await flush_statistics(harness, connection)
    after = await updates(connection)

    made = {
        table: Updates(after[table].all - u.all, after[table].hot - u.hot, after[table].moved - u.moved)
        for table, u in before.items()
    }
    moves = await moves_of_axes(connection)
    assert moves == 4 * ORDERS  # paid, partially refunded, shipped, delivered
    # Payments begun, refunds reserved, goods returned, and the further partial refunds and returns.
    assert made["orders"].all == moves + (2 + 5 + 2 + 2 + 4) * ORDERS
    assert made["orders"].indexed <= moves
    assert made["refunds"].all == 5 * ORDERS
    assert made["refunds"].indexed == 0
    # A saga waits, is redirected and runs (HOT), waits again, is redirected and runs (HOT), and is deleted.
    assert made["sagas"].indexed <= made["sagas"].all - 2 * ORDERS
    assert made["saga_drivers"].indexed == 0
    for table in ("history", "order_products", "payment_keys"):
        assert made[table].all == 0
