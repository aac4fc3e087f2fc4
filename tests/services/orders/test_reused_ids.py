"""A database of orders that was restored from an older backup gives ids again: what others have of the earlier order
with the same id stays as it is, and the new order is cancelled."""

from __future__ import annotations

from typing import Any, Final

import pytest

from mercato.contracts.orders import (
    CancelOrder,
    CancelReason,
    GetTimeline,
    Order,
    OrderCancelled,
)
from services.orders.world import ALICE, MUG_MINOR, STAFF, World, basket

EARLIER: Final = {
    "paid": ("sandbox:ok", 7, 0),
    "declined": ("sandbox:declined", 10, 3),
    "waiting": (None, 10, 3),
}
"""What became of the order that first had the id: its payment method, and what is on hand and reserved after it."""


async def restore_orders_from_an_older_backup(world: World) -> None:
    """Orders is as it was before its first order: the next one has the same id."""
    await (await world.connection()).execute(
        "TRUNCATE orders, order_products, history, refunds, payment_keys, sagas RESTART IDENTITY"
    )


async def restore_inventory_from_an_older_backup(world: World) -> None:
    await (await world.connection("inventory")).execute("TRUNCATE reservations")


async def rows(world: World, service: str, table: str) -> list[dict[str, Any]]:
    connection = await world.connection(service)
    return sorted((dict(row) for row in await connection.fetch(f"SELECT * FROM {table}")), key=repr)


INVENTORY: Final = (("inventory", "reservations"), ("inventory", "movements"))
MONEY: Final = (
    *(("payments", table) for table in ("payments", "operations", "intents", "transfers")),
    *(("sandbox", table) for table in ("charges", "operations")),
)

Stored = dict[tuple[str, str], list[dict[str, Any]]]


async def stored(world: World, *tables: tuple[str, str]) -> Stored:
    """All rows of tables of other services."""
    return {(service, table): await rows(world, service, table) for service, table in tables}


async def assert_kept(world: World, before: Stored) -> None:
    """Nothing was changed, and nothing came but a tombstone in payments, of the new order."""
    after = await stored(world, *before)
    payments = after["payments", "payments"]
    after["payments", "payments"] = [row for row in payments if row in before["payments", "payments"]]
    assert after == before
    new = [row for row in payments if row not in before["payments", "payments"]]
    assert [(row["status"], row["authorized_minor"]) for row in new] in ([], [("voided", 0)])


async def cancel(world: World, order_id: int) -> None:
    with world.acting(ALICE):
        await world.orders.cancel(CancelOrder(id=order_id))


async def assert_cancelled(world: World, order: Order, code: Any) -> None:
    now = await world.settled(order.id)
    assert (now.status, now.payment, now.refunded_minor) == ("cancelled", "unpaid", 0)
    assert now.reason == CancelReason(code=code)
    assert await world.saga(order.id) == []


# ------------------------------------------------------------------------------------------------------------ inventory


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_an_order_whose_id_has_a_reservation_of_an_earlier_order_is_cancelled(
    world: World, earlier: str, method: str | None
):
    earlier_method, on_hand, reserved = EARLIER[earlier]
    product_id = await world.new_product(10)
    old = await world.checked_out(earlier_method, (product_id, 3))
    before = await stored(world, *INVENTORY, *MONEY)
    await restore_orders_from_an_older_backup(world)

    new = await world.place(basket((product_id, 2), payment_method=method))

    assert new.id == old.id
    await assert_cancelled(world, new, "stock_lost")
    await assert_kept(world, before)
    assert await world.shelf(product_id) == (on_hand, reserved)


async def test_the_same_request_with_the_same_key_is_another_order_after_a_restore(world: World):
    """Neither the id, nor the lines, nor the key of the client make it the earlier order: only the nonce does."""
    product_id = await world.new_product(10)
    request = basket((product_id, 3), payment_method="sandbox:ok", idempotency_key="key", fingerprint=b"one")
    old = await world.settled((await world.place(request)).id)
    before = await stored(world, *INVENTORY, *MONEY)
    await restore_orders_from_an_older_backup(world)

    new = await world.place(request)

    assert new.id == old.id
    await assert_cancelled(world, new, "stock_lost")
    await assert_kept(world, before)


async def test_an_order_is_cancelled_that_is_on_hold_when_the_reservation_becomes_that_of_another(world: World):
    """As if inventory and payments were restored to a state that has another order with this id."""
    product_id = await world.new_product(10)
    order = await world.checked_out(None, (product_id, 3))
    await (await world.connection("inventory")).execute("UPDATE reservations SET nonce = nonce / 2")
    before = await stored(world, *INVENTORY, *MONEY)

    with pytest.raises(OrderCancelled):
        await world.pay(order.id)

    await assert_cancelled(world, order, "stock_lost")
    await assert_kept(world, before)
    assert await world.bank_operations(order.id) == []


# ------------------------------------------------------------------------------------------------------------- payments


@pytest.mark.parametrize("is_placed_with_method", [True, False])
async def test_an_order_whose_id_has_a_payment_of_an_earlier_order_is_cancelled_and_not_paid(
    world: World, is_placed_with_method: bool
):
    product_id = await world.new_product(10)
    old = await world.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(world)
    await restore_inventory_from_an_older_backup(world)
    before = await stored(world, *MONEY)

    if is_placed_with_method:
        new = await world.place(basket((product_id, 3), payment_method="sandbox:ok"))
    else:
        new = await world.checked_out(None, (product_id, 3))
        with pytest.raises(OrderCancelled) as refused:
            await world.pay(new.id)
        assert refused.value.reason == "payment_lost"

    assert new.id == old.id
    await assert_cancelled(world, new, "payment_lost")
    assert await stored(world, *MONEY) == before
    assert (await world.bank(old.id)).net_minor == 3 * MUG_MINOR
    assert await world.reservation(new.id) == "released"
    assert await world.shelf(product_id) == (7, 0)


async def test_an_order_whose_id_has_an_earlier_payment_is_cancelled_also_when_captured_by_hand(world: World):
    product_id = await world.new_product(10)
    await world.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(world)
    await restore_inventory_from_an_older_backup(world)
    before = await stored(world, *MONEY)
    new = await world.checked_out(None, (product_id, 3))

    with pytest.raises(OrderCancelled):
        await world.pay(new.id, actor=STAFF, capture=False)

    await assert_cancelled(world, new, "payment_lost")
    assert await stored(world, *MONEY) == before


async def test_a_cancel_of_an_order_whose_id_has_a_payment_of_an_earlier_order_refunds_nothing(world: World):
    product_id = await world.new_product(10)
    old = await world.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(world)
    await restore_inventory_from_an_older_backup(world)
    before = await stored(world, *MONEY)
    new = await world.checked_out(None, (product_id, 3))

    await cancel(world, new.id)
    now = await world.settled(new.id)

    assert (now.status, now.payment) == ("cancelled", "unpaid")
    assert await stored(world, *MONEY) == before
    assert (await world.bank(old.id)).net_minor == 3 * MUG_MINOR


async def test_the_timeline_of_an_order_shows_nothing_of_an_earlier_one_with_its_id(world: World):
    product_id = await world.new_product(10)
    await world.checked_out("sandbox:ok", (product_id, 3))
    await restore_orders_from_an_older_backup(world)
    new = await world.place(basket((product_id, 2)))
    await world.settled(new.id)

    with world.acting(ALICE):
        entries = (await world.orders.timeline(GetTimeline(id=new.id))).entries

    assert [entry.what for entry in entries] == ["status pending", "status cancelled"]
