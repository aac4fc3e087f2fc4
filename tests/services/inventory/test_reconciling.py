"""What is held for an order that does not want it any more is given back, on the word of orders alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mercato.chassis.contract import Batch, ServiceError, Unavailable
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.contracts.orders import GetOrder, Order, OrderNotFound, Orders, Status
from mercato.services.inventory import store
from mercato.services.inventory.reconciling import Reconciling
from mercato.services.inventory.reserving import Reserving
from services.inventory.world import EPOCH, MUG, World


class FakeOrders:
    """Orders by number, and where they are. `asked` are the numbers that somebody asked for."""

    def __init__(self, statuses: dict[int, Status]) -> None:
        self.statuses = statuses
        self.asked: list[int] = []
        self.failure: ServiceError | None = None

    def build(self, env: Env) -> Service:
        server = Server(Orders, env.clock)
        server.register(Orders.get, self.get)
        return Service(server, env.database)

    async def get(self, batch: Batch[GetOrder]) -> Sequence[Order | ServiceError]:
        if self.failure:
            raise self.failure.copy()
        self.asked += [request.id for request in batch]
        return [self._order(request.id) for request in batch]

    def _order(self, order_id: int) -> Order | ServiceError:
        if order_id not in self.statuses:
            return OrderNotFound(order_id=order_id)
        return Order(
            id=order_id,
            user_id=1,
            status=self.statuses[order_id],
            payment="unpaid",
            fulfilment="unfulfilled",
            currency="USD",
            total_minor=0,
            lines=(),
            created_at=EPOCH,
            updated_at=EPOCH,
            version=1,
        )


async def reconciling(world: World, orders: FakeOrders, quiet_seconds: float = 0.0) -> Reconciling:
    """Of a second process, which reaches orders."""
    rig = await world.another_rig(orders=orders.build)
    return Reconciling(
        rig.host.services["inventory"].database,
        rig.client(Orders),
        Reserving(world.database, 900.0),
        rig.host.telemetry,
        rig.host.clock,
        quiet_seconds=quiet_seconds,
    )


@pytest.mark.parametrize("statuses", [{7: "cancelled"}, {}])
async def test_what_is_held_for_no_living_order_is_given_back(world: World, statuses: dict[int, Status]):
    await world.stock(mug=2)
    await world.reserve(7, for_payment=True, mug=2)

    await (await reconciling(world, FakeOrders(statuses))).look(None)

    assert await world.states() == {7: "released"}
    assert await world.pieces(MUG) == (2, 0)
    assert await world.told("reservation", 7) == [("stock.held", 1), ("stock.released", 2)]


async def test_what_is_held_for_a_living_order_or_ends_by_itself_is_left_alone(world: World):
    await world.stock(mug=9)
    await world.reserve(7, for_payment=True, mug=1)
    await world.reserve(8, for_payment=True, mug=1)
    await world.reserve(9, mug=1)
    orders = FakeOrders({7: "pending", 8: "confirmed", 9: "cancelled"})

    await (await reconciling(world, orders)).look(None)

    assert await world.states() == {7: "held", 8: "held", 9: "held"}
    assert sorted(set(orders.asked)) == [7, 8], "the third has an end of its own"


async def test_without_the_word_of_orders_nothing_is_given_back(world: World):
    await world.stock(mug=2)
    await world.reserve(7, for_payment=True, mug=2)
    orders = FakeOrders({7: "cancelled"})
    orders.failure = Unavailable(service="orders")
    looking = await reconciling(world, orders)

    await looking.look(None)
    assert await world.states() == {7: "held"}

    orders.failure = None
    await looking.look(None)
    assert await world.states() == {7: "released"}


async def test_what_has_just_been_held_is_not_asked_about(world: World):
    await world.stock(mug=2)
    await world.reserve(7, for_payment=True, mug=2)
    orders = FakeOrders({7: "cancelled"})

    await (await reconciling(world, orders, quiet_seconds=600.0)).look(None)

    assert orders.asked == []
    assert await world.states() == {7: "held"}


async def test_every_page_is_looked_at(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "PAGE", 2)
    await world.stock(mug=9)
    for order_id in range(1, 6):
        await world.reserve(order_id, for_payment=True, mug=1)
    looking = await reconciling(world, FakeOrders({2: "pending"}))

    places = [await looking.look(None)]
    while places[-1] is not None:
        places.append(await looking.look(places[-1]))

    assert places == [4, 2, None]
    assert {order_id for order_id, state in (await world.states()).items() if state == "held"} == {2}
