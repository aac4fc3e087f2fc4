"""Stock that is held for an order that does not want it any more is released, once, by what orders knows."""

from __future__ import annotations

import pytest

from mercato.chassis.contract import Unavailable
from mercato.contracts.inventory import Inventory, ReserveStock, StockLine
from mercato.contracts.orders import CancelOrder
from mercato.services.inventory import store as inventory_store
from mercato.services.orders.reconciling import HoldReconciling
from mercato.testing.actors import SERVICE, STAFF
from mercato.testing.builders import MUG
from services.orders.harness import PLENTY, OrdersHarness

UNKNOWN_ORDER = 900_000


def reconciling(harness: OrdersHarness, quiet_seconds: float = 0.0) -> HoldReconciling:
    inventory = harness.client(Inventory)
    return HoldReconciling(harness.database, inventory, harness.host.telemetry, quiet_seconds=quiet_seconds)


async def look(harness: OrdersHarness, place: int | None = None, quiet_seconds: float = 0.0) -> int | None:
    """As the periodic task does: in the name of the service."""
    with harness.acting(SERVICE):
        return await reconciling(harness, quiet_seconds).release_page(place)


async def hold(harness: OrdersHarness, order_id: int, nonce: int) -> None:
    """Holds a mug for an order without an end, as a checkout does."""
    request = ReserveStock(
        order_id=order_id,
        lines=(StockLine(product_id=MUG, quantity=1),),
        for_payment=True,
        idempotency_key=f"order:{order_id}:reserve",
        order_nonce=nonce,
    )
    with harness.acting(SERVICE):
        assert (await harness.client(Inventory).reserve(request)).state == "held"


async def cancelled_with_a_hold(harness: OrdersHarness) -> int:
    """A cancelled order whose stock is held again, as no code of ours leaves it."""
    order = await harness.checked_out(None, (MUG, 1))
    with harness.acting(STAFF):
        await harness.orders.cancel(CancelOrder(id=order.id))
    await harness.settled(order.id)
    nonce = (await harness.raw(order.id)).nonce
    await harness.rows("DELETE FROM reservations WHERE order_id = $1", order.id, of="inventory")
    await hold(harness, order.id, nonce)
    return order.id


def released(harness: OrdersHarness) -> float:
    labels = {"kind": "hold_released"}
    return harness.host.telemetry.registry.get_sample_value("mercato_reconciliation_repaired_total", labels) or 0.0


async def test_the_stock_of_a_cancelled_order_is_released_and_counted(harness: OrdersHarness):
    order_id = await cancelled_with_a_hold(harness)
    assert await harness.shelf() == (PLENTY, 1)

    await look(harness)

    assert await harness.reservation(order_id) == "released"
    assert await harness.shelf() == (PLENTY, 0)
    assert released(harness) == 1


async def test_the_stock_of_an_order_that_is_not_there_is_released(harness: OrdersHarness):
    await hold(harness, UNKNOWN_ORDER, nonce=7)

    await look(harness)

    assert await harness.reservation(UNKNOWN_ORDER) == "released"


async def test_the_stock_of_an_earlier_order_with_the_same_id_is_released(harness: OrdersHarness):
    order = await harness.checked_out(None, (MUG, 1))
    await harness.rows("DELETE FROM reservations WHERE order_id = $1", order.id, of="inventory")
    await harness.rows("UPDATE levels SET reserved = 0", of="inventory")
    await hold(harness, order.id, (await harness.raw(order.id)).nonce ^ 1)

    await look(harness)

    assert await harness.reservation(order.id) == "released"
    assert released(harness) == 1


async def test_the_stock_of_a_living_order_stays_held(harness: OrdersHarness):
    order = await harness.checked_out(None, (MUG, 1))
    await harness.rows("UPDATE reservations SET expires_at = NULL", of="inventory")

    await look(harness)

    assert await harness.reservation(order.id) == "held"
    assert released(harness) == 0


async def test_what_has_just_been_held_is_left_alone(harness: OrdersHarness):
    await hold(harness, UNKNOWN_ORDER, nonce=7)

    await look(harness, quiet_seconds=600.0)

    assert await harness.reservation(UNKNOWN_ORDER) == "held"


async def test_every_page_is_scanned(harness: OrdersHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inventory_store, "PAGE", 2)
    order_ids = [UNKNOWN_ORDER + n for n in range(5)]
    for order_id in order_ids:
        await hold(harness, order_id, nonce=7)

    places = [await look(harness)]
    while places[-1] is not None:
        places.append(await look(harness, places[-1]))

    assert len(places) == 3
    assert {await harness.reservation(order_id) for order_id in order_ids} == {"released"}


async def test_without_inventory_nothing_happens_until_it_is_back(harness: OrdersHarness):
    await hold(harness, UNKNOWN_ORDER, nonce=7)
    inventory = harness.host.services["inventory"].database
    await inventory.close()
    with harness.acting(SERVICE), pytest.raises(Unavailable):
        await reconciling(harness).release_page(None)
    await inventory.open()

    await look(harness)

    assert await harness.reservation(UNKNOWN_ORDER) == "released"
