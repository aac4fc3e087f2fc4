"""Checkout: from an order to money and stock, once, whatever a payment does and whoever fails on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec
import pytest

from mercato.chassis.faults import Fault
from mercato.contracts.inventory import ShortLine
from mercato.contracts.orders import CancelCode, CancelReason, Order, Payment, Status
from services.orders.world import MUG_MINOR, Bank, World, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")

Plant = Callable[[str, Fault], Callable[[], None]]
Move = tuple[str, str | None, str]

PLACED: Final[Move] = ("status", None, "pending")
CONFIRMED: Final[list[Move]] = [("payment", "unpaid", "authorized"), ("status", "pending", "confirmed")]
PAID: Final[list[Move]] = [PLACED, *CONFIRMED, ("payment", "authorized", "paid")]
DECLINED: Final[list[Move]] = [PLACED, ("payment", "unpaid", "failed"), ("status", "pending", "cancelled")]
LOST: Final[list[Move]] = [
    PLACED,
    *CONFIRMED,
    ("payment", "authorized", "voided"),
    ("status", "confirmed", "cancelled"),
]


class End(msgspec.Struct, frozen=True):
    """How a checkout ends. `sold` of three pieces have left the shelf for good."""

    status: Status
    payment: Payment
    history: list[Move]
    reservation: str
    sold: int
    captures: int
    code: CancelCode | None = None
    provider_code: str | None = None


BOUGHT: Final = End("confirmed", "paid", PAID, "committed", sold=3, captures=1)

ENDS: Final = {
    "sandbox:ok": BOUGHT,
    "sandbox:lost_answer": BOUGHT,
    "sandbox:error_then_ok": BOUGHT,
    "sandbox:slow:100": BOUGHT,
    "sandbox:declined": End("cancelled", "failed", DECLINED, "released", 0, 0, "payment_declined", "card_declined"),
    "sandbox:insufficient_funds": End(
        "cancelled", "failed", DECLINED, "released", 0, 0, "payment_declined", "insufficient_funds"
    ),
    "sandbox:capture_expired": End(
        "cancelled", "voided", LOST, "committed", 0, 0, "payment_lost", "authorization_expired"
    ),
}
"""By payment method. A reservation that was committed stays so; what came back is a movement of its own."""


@pytest.mark.parametrize("method", ENDS)
async def test_each_payment_method_comes_to_its_end(busy_world: World, method: str):
    end = ENDS[method]
    product_id = await busy_world.new_product(10)

    order = await busy_world.checked_out(method, (product_id, 3))

    await assert_ended(busy_world, order, end, product_id)


async def assert_ended(world: World, order: Order, end: End, product_id: int) -> None:
    assert (order.status, order.payment) == (end.status, end.payment)
    assert sorted_by_version(await world.history(order.id)) == sorted_by_version(end.history)
    code = None if end.code is None else CancelReason(code=end.code, provider_code=end.provider_code)
    assert order.reason == code
    assert await world.reservation(order.id) == end.reservation
    assert await world.shelf(product_id) == (10 - end.sold, 0)
    total = 3 * MUG_MINOR * end.captures
    assert await world.bank(order.id) == Bank(end.captures, total, 0, open_charges=0)
    assert await world.saga(order.id) == ["done"]


def sorted_by_version(moves: list[Move]) -> list[Move]:
    """Two axes that move at once stand in either order."""
    return [moves[0], *sorted(moves[1:3]), *sorted(moves[3:])]


async def test_without_a_method_the_stock_is_held_and_the_order_waits(busy_world: World):
    product_id = await busy_world.new_product(10)

    order = await busy_world.checked_out(None, (product_id, 3))

    assert (order.status, order.payment, order.version) == ("pending", "unpaid", 1)
    assert await busy_world.saga(order.id) == ["awaiting"]
    assert await busy_world.reservation(order.id) == "held"
    assert await busy_world.shelf(product_id) == (10, 3)
    assert await busy_world.payments(order.id) == ()


@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_an_order_that_there_is_not_enough_for_is_cancelled_and_says_what_is_short(
    busy_world: World, method: str | None
):
    some, few, none = [await busy_world.new_product(pieces) for pieces in (10, 2, 0)]

    order = await busy_world.checked_out(method, (none, 1), (some, 10), (few, 3))

    assert (order.status, order.payment) == ("cancelled", "unpaid")
    assert order.reason == CancelReason(
        code="out_of_stock",
        lines=(
            ShortLine(product_id=few, requested=3, available=2),
            ShortLine(product_id=none, requested=1, available=0),
        ),
    )
    assert [await busy_world.shelf(i) for i in (some, few, none)] == [(10, 0), (2, 0), (0, 0)]
    # What would come late, from somebody who was taken for dead, finds the doors closed.
    assert await busy_world.reservation(order.id) == "released"
    assert [p.status for p in await busy_world.payments(order.id)] == (["voided"] if method else [])
    assert await busy_world.bank(order.id) == Bank(captures=0, captured_minor=0, refunded_minor=0, open_charges=0)


async def test_of_many_buyers_exactly_as_many_get_one_as_there_are(busy_world: World):
    product_id = await busy_world.new_product(7)
    requests = [basket((product_id, 1), payment_method="sandbox:ok") for _ in range(30)]

    placed = await asyncio.gather(*(busy_world.place(request) for request in requests))
    orders = [await busy_world.settled(order.id) for order in placed]

    paid = [order for order in orders if order.payment == "paid"]
    refused = [order for order in orders if order.reason and order.reason.code == "out_of_stock"]
    assert (len(paid), len(refused)) == (7, 23)
    assert await busy_world.shelf(product_id) == (0, 0)
    assert [(await busy_world.bank(order.id)).net_minor for order in paid] == [MUG_MINOR] * 7
    assert [(await busy_world.bank(order.id)).captures for order in refused] == [0] * 23


async def test_an_order_that_costs_nothing_is_paid_with_nothing(busy_world: World):
    product_id = await busy_world.new_product(10, price_minor=0)

    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))

    assert (order.status, order.payment, order.total_minor) == ("confirmed", "paid", 0)
    assert (await busy_world.bank(order.id)).net_minor == 0


async def test_settled_answers_at_once_what_it_knows_when_the_time_is_over(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.place(basket((product_id, 1), payment_method="sandbox:slow:3000"))

    waiting = await busy_world.settled(order.id, wait_ms=50)

    assert (waiting.id, waiting.status, waiting.payment) == (order.id, "pending", "unpaid")


# ------------------------------------------------------------------------------------------------------------- crashes

BOTH: Final = ("before", "after")

WAY: Final = (
    *(f"checkout.{call}.{when}_call" for call in ("reserve", "authorize", "commit", "capture") for when in BOTH),
    *(f"checkout.{step}.{when}_commit" for step in ("reserve", "settle") for when in BOTH),
    "orders.place.after_commit",
)
"""Every point that an order passes on its way to `paid`."""

WAY_BACK: Final = (
    *(f"checkout.{call}.{when}_call" for call in ("void", "release", "restock") for when in BOTH),
    *(f"checkout.unwind.{when}_commit" for when in BOTH),
)
"""Every point that the undoing of one passes whose authorization has run out."""


@pytest.mark.parametrize("point", WAY)
async def test_a_step_that_fails_anywhere_is_finished_later_and_done_once(busy_world: World, plant: Plant, point: str):
    await assert_survives(busy_world, plant, point, "sandbox:ok")


@pytest.mark.parametrize("point", WAY_BACK)
async def test_an_undoing_that_fails_anywhere_is_finished_later_and_done_once(
    busy_world: World, plant: Plant, point: str
):
    await assert_survives(busy_world, plant, point, "sandbox:capture_expired")


async def assert_survives(world: World, plant: Plant, point: str, method: str) -> None:
    failures = 0

    async def fail_twice(_point: str) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise RuntimeError("the power fails here")

    product_id = await world.new_product(10)
    plant(point, fail_twice)
    key = f"{point}-{method}"
    placing = basket((product_id, 3), payment_method=method, idempotency_key=key, fingerprint=b"one")
    if point == "orders.place.after_commit":
        await asyncio.gather(world.place(placing), return_exceptions=True)
        failures = 2
    order = await world.settled((await world.place(placing)).id)

    assert failures >= 1, "the point is not on this way"
    await assert_ended(world, order, ENDS[method], product_id)
