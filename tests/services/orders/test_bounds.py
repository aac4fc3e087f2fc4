"""What the open orders of one customer may be: their number, and what they hold of a product."""

from __future__ import annotations

import asyncio
import types
from typing import Any

import pytest

from mercato.chassis.contract import Actor, ServiceError
from mercato.contracts.inventory import ShortLine
from mercato.contracts.order_refusals import TooManyOpenOrders
from mercato.contracts.orders import CancelOrder, MoveOrder, Order, Orders, PlacedOrder, PlaceLine, PlaceOrder
from mercato.services.orders.rules import ANY_NUMBER, BuyerLimits, Limited, limited
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.injection import FailAt, Inject
from mercato.testing.waiting import until
from services.orders.harness import OrdersHarness, mugs

COUNTED = pytest.mark.options(orders_customer_open_orders=3)
ONE = pytest.mark.options(orders_customer_open_orders=1)
HELD = pytest.mark.options(orders_customer_held_units=10, orders_customer_held_percent=20)


def of(product_id: int, quantity: int, user: Actor = ALICE, **fields: Any) -> PlaceOrder:
    return PlaceOrder(user_id=user.id, lines=(PlaceLine(product_id=product_id, quantity=quantity),), **fields)


async def placed_or_refused(harness: OrdersHarness, count: int, actor: Actor = ALICE, user: Actor = ALICE) -> list[int]:
    """How many of so many orders in one call were placed, and how many refused."""
    outcomes = await harness.place_many([mugs(user_id=user.id)] * count, actor)
    assert {type(outcome) for outcome in outcomes} <= {PlacedOrder, TooManyOpenOrders}
    placed = sum(isinstance(outcome, PlacedOrder) for outcome in outcomes)
    return [placed, count - placed]


async def end(harness: OrdersHarness, order: Order, how: str) -> Order:
    """The order when it is paid, cancelled, expired, or sold on account."""
    if how == "paid":
        await harness.pay(order.id)
    elif how == "cancelled":
        with harness.acting(ALICE):
            await harness.orders.cancel(CancelOrder(id=order.id))
    elif how == "confirmed":
        with harness.acting(STAFF):
            await harness.orders.move(MoveOrder(id=order.id, status="confirmed"))
    else:
        await harness.settled(order.id)
        await harness.rows("UPDATE sagas SET wake_at = now() WHERE subject_id = $1", order.id)

        async def is_over() -> bool:
            return await harness.saga(order.id) == []

        await until(is_over)
    return await harness.settled(order.id)


async def race(harness: OrdersHarness, clients: list[Orders], requests: list[PlaceOrder]) -> list[object]:
    """Outcomes of requests that all wait for one lock before any may count."""
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute("SELECT pg_advisory_xact_lock(-$1::bigint)", ALICE.id)
        with harness.acting(ALICE):
            calls = [
                asyncio.ensure_future(clients[i % len(clients)].place(request)) for i, request in enumerate(requests)
            ]
        await harness.until_blocked(2, by=calls)
    return await asyncio.gather(*calls, return_exceptions=True)


# -------------------------------------------------------------------------------------------------------- open orders


@COUNTED
async def test_a_customer_has_so_many_open_orders_and_no_more(harness: OrdersHarness):
    for _ in range(3):
        await harness.place()
    with pytest.raises(TooManyOpenOrders) as refused:
        await harness.place()

    assert (refused.value.user_id, refused.value.limit) == (ALICE.id, 3)
    assert "pay or cancel" in str(refused.value)
    assert await harness.count("orders") == await harness.count("sagas") == await harness.count("history") == 3
    assert await placed_or_refused(harness, 1, BOB, BOB) == [1, 0]


@COUNTED
async def test_orders_of_one_batch_count_together(harness: OrdersHarness):
    assert await placed_or_refused(harness, 5) == [3, 2]
    outcomes = await harness.place_many([mugs(), mugs(user_id=BOB.id), mugs()], STAFF)
    assert [type(outcome) for outcome in outcomes] == [PlacedOrder] * 3


@COUNTED
async def test_concurrent_orders_on_two_hosts_do_not_pass_the_limit_together(harness: OrdersHarness):
    clients = [harness.orders, await harness.another_process()]
    outcomes = await race(harness, clients, [mugs()] * 12)

    assert sum(isinstance(one, PlacedOrder) for one in outcomes) == 3
    assert sum(isinstance(one, TooManyOpenOrders) for one in outcomes) == 9
    assert await harness.count("orders") == 3


@ONE
@pytest.mark.parametrize("how", ["paid", "cancelled", "expired", "confirmed"])
async def test_an_order_that_is_not_open_any_more_frees_its_place(harness: OrdersHarness, how: str):
    first = await harness.place()
    assert await placed_or_refused(harness, 1) == [0, 1]
    ended = await end(harness, first, how)

    assert ended.status != "pending"
    assert await placed_or_refused(harness, 2) == [1, 1]


@ONE
async def test_a_key_gets_its_old_answer_when_the_limit_is_reached(harness: OrdersHarness):
    first = await harness.place(mugs(key="key"))
    with pytest.raises(TooManyOpenOrders):
        await harness.place(mugs(key="another"))
    assert await harness.place(mugs(key="key")) == first


@ONE
async def test_one_key_at_the_same_moment_on_two_hosts_is_one_order_at_the_limit(harness: OrdersHarness):
    clients = [harness.orders, await harness.another_process()]
    outcomes = await race(harness, clients, [mugs(key="key")] * 2)

    assert [type(one) for one in outcomes] == [PlacedOrder] * 2, outcomes
    assert len({one.order.id for one in outcomes if isinstance(one, PlacedOrder)}) == 1
    assert sorted(one.replayed for one in outcomes if isinstance(one, PlacedOrder)) == [False, True]


@ONE
async def test_a_key_that_was_refused_may_be_sent_again(harness: OrdersHarness):
    first = await harness.place()
    with pytest.raises(TooManyOpenOrders):
        await harness.place(mugs(key="key"))
    await end(harness, first, "cancelled")
    assert (await harness.place(mugs(key="key"))).id > first.id


@pytest.mark.options(orders_customer_open_orders=1, orders_staff_open_orders=3)
async def test_staff_have_a_limit_of_their_own_for_each_customer(harness: OrdersHarness):
    assert await placed_or_refused(harness, 2) == [1, 1]
    assert await placed_or_refused(harness, 4, STAFF) == [2, 2]
    assert await placed_or_refused(harness, 1) == [0, 1]
    assert await placed_or_refused(harness, 4, STAFF, BOB) == [3, 1]


@ONE
async def test_a_declined_payment_leaves_its_order_open(harness: OrdersHarness):
    await harness.checked_out("sandbox:declined", (1, 1))
    assert await placed_or_refused(harness, 1) == [0, 1]


# --------------------------------------------------------------------------------------------------------- held units


@HELD
async def test_open_orders_of_a_customer_hold_their_share_and_no_more(harness: OrdersHarness):
    product_id = await harness.new_product(100)
    fates = [
        await harness.settled((await harness.place(of(product_id, quantity, user), user)).id)
        for user, quantity in ((ALICE, 15), (ALICE, 6), (ALICE, 5), (ALICE, 1), (BOB, 20))
    ]

    assert [order.status for order in fates] == ["pending", "cancelled", "pending", "cancelled", "pending"]
    reason = fates[1].reason
    assert reason is not None
    assert reason.code == "hold_limit"
    assert reason.lines == (ShortLine(product_id=product_id, requested=6, available=5),)
    assert reason.message == (
        f"Open orders of one customer may hold at most 20 pieces of product {product_id}. "
        "Pay or cancel open orders, or order less."
    )
    assert await harness.shelf(product_id) == (100, 40)


@HELD
@pytest.mark.parametrize(("on_hand", "share"), [(9, 9), (12, 10), (50, 10), (55, 11)])
async def test_the_share_is_never_less_than_the_pieces(harness: OrdersHarness, on_hand: int, share: int):
    product_id = await harness.new_product(on_hand)
    outcomes = await harness.place_many([of(product_id, 1)] * share + [of(product_id, 1)] * 2)
    orders = [await harness.settled(one.order.id) for one in outcomes if isinstance(one, PlacedOrder)]

    assert [order.status for order in orders].count("pending") == share
    assert await harness.shelf(product_id) == (on_hand, share)


@HELD
async def test_concurrent_orders_on_two_hosts_do_not_hold_more_than_the_share_together(harness: OrdersHarness):
    product_id = await harness.new_product(100)
    clients = [harness.orders, await harness.another_process()]
    outcomes = await race(harness, clients, [of(product_id, 5)] * 12)
    orders = [await harness.settled(one.order.id) for one in outcomes if isinstance(one, PlacedOrder)]

    assert len(orders) == 12
    assert sorted(order.status for order in orders) == ["cancelled"] * 8 + ["pending"] * 4
    assert await harness.shelf(product_id) == (100, 20)


@HELD
@pytest.mark.parametrize("how", ["paid", "cancelled", "expired"])
async def test_an_order_that_is_not_open_any_more_frees_its_units(harness: OrdersHarness, how: str):
    product_id = await harness.new_product(100)
    await harness.place(of(product_id, 1))  # stays open, and counts
    first = await harness.place(of(product_id, 19))
    assert (await harness.settled((await harness.place(of(product_id, 1))).id)).status == "cancelled"
    await end(harness, first, how)
    share = 81 // 5 if how == "paid" else 20
    orders = [await harness.settled((await harness.place(of(product_id, n))).id) for n in (share, share - 1)]

    assert [order.status for order in orders] == ["cancelled", "pending"]
    assert await harness.shelf(product_id) == (81 if how == "paid" else 100, share)


@HELD
async def test_other_products_of_an_order_are_not_held_where_one_is_too_many(harness: OrdersHarness):
    some, many = await harness.new_product(100), await harness.new_product(100)
    lines = (PlaceLine(product_id=many, quantity=21), PlaceLine(product_id=some, quantity=20))
    order = await harness.settled((await harness.place(PlaceOrder(user_id=ALICE.id, lines=lines))).id)

    assert order.reason is not None
    assert [line.product_id for line in order.reason.lines] == [many]
    assert [await harness.shelf(i) for i in (some, many)] == [(100, 0), (100, 0)]


@HELD
async def test_an_order_that_pays_at_once_is_bounded_too(harness: OrdersHarness):
    """A payment that is declined leaves its stock held."""
    product_id = await harness.new_product(100)
    order = await harness.checked_out("sandbox:ok", (product_id, 21))
    assert order.reason is not None
    assert order.reason.code == "hold_limit"
    assert (await harness.bank(order.id)).captures == 0
    assert (await harness.checked_out("sandbox:ok", (product_id, 20))).payment == "paid"


@pytest.mark.options(orders_customer_held_units=5, orders_staff_held_units=8)
async def test_staff_have_a_bound_of_units_of_their_own(harness: OrdersHarness):
    product_id = await harness.new_product(100)
    fates = [
        await harness.settled((await harness.place(of(product_id, quantity), actor)).id)
        for actor, quantity in ((ALICE, 6), (STAFF, 6), (ALICE, 1), (STAFF, 3), (STAFF, 2))
    ]
    assert [order.status for order in fates] == ["cancelled", "pending", "cancelled", "cancelled", "pending"]


@HELD
async def test_what_staff_order_is_not_bounded_by_default(harness: OrdersHarness):
    product_id = await harness.new_product(100)
    order = await harness.settled((await harness.place(of(product_id, 100), STAFF)).id)
    assert order.status == "pending"


@pytest.mark.options(
    orders_customer_held_units=10,
    orders_customer_held_percent=20,
    orders_lease_seconds=0.5,
    orders_sweep_seconds=0.1,
)
@pytest.mark.parametrize("point", ["checkout.reserve.before_call", "checkout.reserve.after_call"])
async def test_a_checkout_that_dies_around_its_hold_leaves_no_count_behind(
    harness: OrdersHarness, inject: Inject, point: str
):
    product_id = await harness.new_product(100)
    inject(point, FailAt(1))
    first = await harness.settled((await harness.place(of(product_id, 20))).id)
    assert first.status == "pending"
    assert await harness.shelf(product_id) == (100, 20)
    assert (await harness.settled((await harness.place(of(product_id, 1))).id)).status == "cancelled"
    inject("checkout.release.after_call", FailAt(1))
    await end(harness, first, "cancelled")

    assert (await harness.settled((await harness.place(of(product_id, 20))).id)).status == "pending"
    assert await harness.shelf(product_id) == (100, 20)


# -------------------------------------------------------------------------------------------------------------- rules


def order_of(user_id: int, **quantities: int) -> Any:
    """What `limited` reads of an order."""
    lines = [types.SimpleNamespace(product_id=int(name[1:]), quantity=n) for name, n in quantities.items()]
    return types.SimpleNamespace(user_id=user_id, lines=lines)


def test_a_batch_without_limits_counts_no_user():
    assert limited([(order_of(1, p1=1), BuyerLimits()), (order_of(2, p1=1), BuyerLimits())]) == ([], [Limited()] * 2)


def test_what_an_order_finds_before_it_in_its_batch():
    customers = BuyerLimits(open_orders=5, held_units=10)
    batch = [(order_of(7, p1=2), customers), (order_of(3, p1=9), customers), (order_of(7, p2=1, p1=1), customers)]
    users, bounds = limited(batch)
    assert users == [3, 7]
    assert bounds == [Limited(2, 4, (0,)), Limited(1, 4, (0,)), Limited(2, 3, (0, 2))]


def test_an_order_with_a_lower_limit_takes_no_place_of_one_with_a_higher():
    customers, staff, free = BuyerLimits(open_orders=1), BuyerLimits(open_orders=2), BuyerLimits(held_units=1)
    batch = [(order_of(1), customers), (order_of(1), staff), (order_of(1), free)]
    assert [bound.most_open for bound in limited(batch)[1]] == [-2, 0, ANY_NUMBER]


def test_refusals_are_errors_of_the_contract():
    assert issubclass(TooManyOpenOrders, ServiceError)
    assert TooManyOpenOrders.code == "orders.too_many_open"
