"""A database of orders that was restored from an older backup gives ids again: what others have of the earlier order
with the same id stays as it is, and the new order is cancelled."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pytest

from mercato.contracts.order_refusals import OrderCancelled
from mercato.contracts.orders import CancelOrder, CancelReason, GetTimeline, Order
from mercato.testing.actors import ALICE, STAFF
from services.orders.harness import MUG_MINOR, OrdersHarness, basket

EARLIER: Final = {
    "paid": ("sandbox:ok", 7, 0),
    "declined": ("sandbox:declined", 10, 3),
    "waiting": (None, 10, 3),
}
"""What became of the order that first had the id: its payment method, and what is on hand and reserved after it."""


async def restore_orders_from_an_older_backup(harness: OrdersHarness) -> None:
    """Orders is as it was before its first order: the next one has the same id."""
    await (await harness.connection()).execute(
        "TRUNCATE orders, order_products, history, refunds, payment_keys, sagas RESTART IDENTITY"
    )


async def restore_inventory_from_an_older_backup(harness: OrdersHarness) -> None:
    await (await harness.connection("inventory")).execute("TRUNCATE reservations")


async def rows(harness: OrdersHarness, service: str, table: str) -> list[dict[str, Any]]:
    connection = await harness.connection(service)
    return sorted((dict(row) for row in await connection.fetch(f"SELECT * FROM {table}")), key=repr)


INVENTORY: Final = (("inventory", "reservations"), ("inventory", "movements"))
MONEY: Final = (
    *(("payments", table) for table in ("payments", "operations", "intents", "transfers")),
    *(("sandbox", table) for table in ("charges", "operations")),
)

Stored = dict[tuple[str, str], list[dict[str, Any]]]


async def stored(harness: OrdersHarness, *tables: tuple[str, str]) -> Stored:
    """All rows of tables of other services."""
    return {(service, table): await rows(harness, service, table) for service, table in tables}


async def assert_kept(harness: OrdersHarness, before: Stored) -> None:
    """Nothing was changed, and nothing came but a tombstone in payments, of the new order."""
    after = await stored(harness, *before)
    payments = after["payments", "payments"]
    after["payments", "payments"] = [row for row in payments if row in before["payments", "payments"]]
    assert after == before
    new = [row for row in payments if row not in before["payments", "payments"]]
    assert [(row["status"], row["authorized_minor"]) for row in new] in ([], [("voided", 0)])


async def cancel(harness: OrdersHarness, order_id: int) -> None:
    with harness.acting(ALICE):
        await harness.orders.cancel(CancelOrder(id=order_id))


async def assert_cancelled(harness: OrdersHarness, order: Order, code: Any) -> None:
    now = await harness.settled(order.id)
    assert (now.status, now.payment, now.refunded_minor) == ("cancelled", "unpaid", 0)
    assert now.reason == CancelReason(code=code)
    assert await harness.saga(order.id) == []


# ------------------------------------------------------------------------------------------------------------ inventory


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_an_order_whose_id_has_a_reservation_of_an_earlier_order_is_cancelled(
    harness: OrdersHarness, earlier: str, method: str | None
):
    earlier_method, on_hand, reserved = EARLIER[earlier]
    product_id = await harness.new_product(10)
    old = await harness.checked_out(earlier_method, (product_id, 3))
    before = await stored(harness, *INVENTORY, *MONEY)
    await restore_orders_from_an_older_backup(harness)

    new = await harness.place(basket((product_id, 2), payment_method=method))

    assert new.id == old.id
    await assert_cancelled(harness, new, "stock_lost")
    await assert_kept(harness, before)
    assert await harness.shelf(product_id) == (on_hand, reserved)


async def test_the_same_request_with_another_key_is_another_order_after_a_restore(harness: OrdersHarness):
    """Neither the id nor the lines make it the earlier order: only the nonce does, which is made of the key."""
    product_id = await harness.new_product(10)
    request = basket((product_id, 3), payment_method="sandbox:ok", idempotency_key="key", fingerprint=b"one")
    old = await harness.settled((await harness.place(request)).id)
    before = await stored(harness, *INVENTORY, *MONEY)
    await restore_orders_from_an_older_backup(harness)

    new = await harness.place(msgspec.structs.replace(request, idempotency_key="another"))

    assert new.id == old.id
    await assert_cancelled(harness, new, "stock_lost")
    await assert_kept(harness, before)


async def test_an_order_is_cancelled_that_is_on_hold_when_the_reservation_becomes_that_of_another(
    harness: OrdersHarness,
):
    """As if inventory and payments were restored to a state that has another order with this id."""
    product_id = await harness.new_product(10)
    order = await harness.checked_out(None, (product_id, 3))
    await (await harness.connection("inventory")).execute("UPDATE reservations SET nonce = nonce / 2")
    before = await stored(harness, *INVENTORY, *MONEY)

    with pytest.raises(OrderCancelled):
        await harness.pay(order.id)

    await assert_cancelled(harness, order, "stock_lost")
    await assert_kept(harness, before)
    assert await harness.bank_operations(order.id) == []


# ------------------------------------------------------------------------------------------------------------- payments


@pytest.mark.parametrize("is_placed_with_method", [True, False])
async def test_an_order_whose_id_has_a_payment_of_an_earlier_order_is_cancelled_and_not_paid(
    harness: OrdersHarness, is_placed_with_method: bool
):
    product_id = await harness.new_product(10)
    old = await harness.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(harness)
    await restore_inventory_from_an_older_backup(harness)
    before = await stored(harness, *MONEY)

    if is_placed_with_method:
        new = await harness.place(basket((product_id, 3), payment_method="sandbox:ok"))
    else:
        new = await harness.checked_out(None, (product_id, 3))
        with pytest.raises(OrderCancelled) as refused:
            await harness.pay(new.id)
        assert refused.value.reason == "payment_lost"

    assert new.id == old.id
    await assert_cancelled(harness, new, "payment_lost")
    assert await stored(harness, *MONEY) == before
    assert (await harness.bank(old.id)).net_minor == 3 * MUG_MINOR
    assert await harness.reservation(new.id) == "released"
    assert await harness.shelf(product_id) == (7, 0)


async def test_an_order_whose_id_has_an_earlier_payment_is_cancelled_also_when_captured_by_hand(harness: OrdersHarness):
    product_id = await harness.new_product(10)
    await harness.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(harness)
    await restore_inventory_from_an_older_backup(harness)
    before = await stored(harness, *MONEY)
    new = await harness.checked_out(None, (product_id, 3))

    with pytest.raises(OrderCancelled):
        await harness.pay(new.id, actor=STAFF, capture=False)

    await assert_cancelled(harness, new, "payment_lost")
    assert await stored(harness, *MONEY) == before


async def test_a_cancel_of_an_order_whose_id_has_a_payment_of_an_earlier_order_refunds_nothing(harness: OrdersHarness):
    product_id = await harness.new_product(10)
    old = await harness.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(harness)
    await restore_inventory_from_an_older_backup(harness)
    before = await stored(harness, *MONEY)
    new = await harness.checked_out(None, (product_id, 3))

    await cancel(harness, new.id)
    now = await harness.settled(new.id)

    assert (now.status, now.payment) == ("cancelled", "unpaid")
    assert await stored(harness, *MONEY) == before
    assert (await harness.bank(old.id)).net_minor == 3 * MUG_MINOR


async def test_the_timeline_of_an_order_shows_nothing_of_an_earlier_one_with_its_id(harness: OrdersHarness):
    product_id = await harness.new_product(10)
    await harness.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(harness)
    new = await harness.place(basket((product_id, 2)))
    await harness.settled(new.id)

    with harness.acting(ALICE):
        entries = (await harness.orders.timeline(GetTimeline(id=new.id))).entries

    assert [entry.what for entry in entries] == ["status pending", "status cancelled"]
