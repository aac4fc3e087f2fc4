"""What is held for an order that does not want it any more is given back, on the word of orders alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mercato.chassis.contract import SERVICE_ROLE, Actor, Unavailable
from mercato.contracts.orders import GetOrder, Order, Orders, Status
from mercato.services.inventory import store
from mercato.services.inventory.reconciling import Reconciling
from mercato.services.inventory.reserving import Reserving
from mercato.testing.builders import MUG, order
from mercato.testing.stubs import StubService, stub_orders
from services.inventory.harness import InventoryHarness


def orders_in(statuses: Mapping[int, Status]) -> StubService[GetOrder, Order]:
    return stub_orders(order(order_id, status) for order_id, status in statuses.items())


async def reconciling(
    harness: InventoryHarness, orders: StubService[GetOrder, Order], quiet_seconds: float = 0.0
) -> Reconciling:
    """Of a second process, which reaches orders."""
    host = await harness.another_host({"orders": orders.build})
    return Reconciling(
        host.services["inventory"].database,
        host.client(Orders),
        Reserving(harness.database, 900.0),
        host.telemetry,
        quiet_seconds=quiet_seconds,
    )


async def look(harness: InventoryHarness, looking: Reconciling, place: int | None = None) -> int | None:
    """As the periodic task does: in the name of the service."""
    with harness.acting(Actor(SERVICE_ROLE)):
        return await looking.look(place)


@pytest.mark.parametrize("statuses", [{7: "cancelled"}, {}])
async def test_what_is_held_for_no_living_order_is_given_back(harness: InventoryHarness, statuses: dict[int, Status]):
    await harness.stock(mug=2)
    await harness.reserve(7, for_payment=True, mug=2)

    await look(harness, await reconciling(harness, orders_in(statuses)))

    assert await harness.states() == {7: "released"}
    assert await harness.pieces(MUG) == (2, 0)
    assert await harness.emitted("reservation", 7) == [("stock.held", 1), ("stock.released", 2)]


async def test_what_is_held_for_a_living_order_or_ends_by_itself_is_left_alone(harness: InventoryHarness):
    await harness.stock(mug=9)
    await harness.reserve(7, for_payment=True, mug=1)
    await harness.reserve(8, for_payment=True, mug=1)
    await harness.reserve(9, mug=1)
    orders = orders_in({7: "pending", 8: "confirmed", 9: "cancelled"})

    await look(harness, await reconciling(harness, orders))

    assert await harness.states() == {7: "held", 8: "held", 9: "held"}
    assert sorted({id_ for batch in orders.batches for id_ in batch}) == [7, 8], "the third has an end of its own"


async def test_without_the_word_of_orders_nothing_is_given_back(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, for_payment=True, mug=2)
    orders = orders_in({7: "cancelled"})
    orders.failure = Unavailable(service="orders")
    looking = await reconciling(harness, orders)

    await look(harness, looking)
    assert await harness.states() == {7: "held"}

    orders.failure = None
    await look(harness, looking)
    assert await harness.states() == {7: "released"}


async def test_what_has_just_been_held_is_not_asked_about(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, for_payment=True, mug=2)
    orders = orders_in({7: "cancelled"})

    await look(harness, await reconciling(harness, orders, quiet_seconds=600.0))

    assert orders.batches == []
    assert await harness.states() == {7: "held"}


async def test_every_page_is_looked_at(harness: InventoryHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "PAGE", 2)
    await harness.stock(mug=9)
    for order_id in range(1, 6):
        await harness.reserve(order_id, for_payment=True, mug=1)
    looking = await reconciling(harness, orders_in({2: "pending"}))

    places = [await look(harness, looking)]
    while places[-1] is not None:
        places.append(await look(harness, looking, places[-1]))

    assert places == [4, 2, None]
    assert {order_id for order_id, state in (await harness.states()).items() if state == "held"} == {2}
