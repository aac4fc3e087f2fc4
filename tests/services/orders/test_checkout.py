"""Checkout: from an order to money and stock, once, whatever a payment does and whichever process fails on the way."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
import pytest

from mercato.contracts.inventory import ShortLine
from mercato.contracts.order_refusals import IllegalMove
from mercato.contracts.orders import CancelCode, CancelReason, CapturePart, Order, Payment, Status
from mercato.contracts.payments import CaptureAmountChanged
from mercato.services.orders import rules
from mercato.testing.actors import STAFF
from mercato.testing.injection import FailAt, Inject
from mercato.testing.waiting import until
from services.orders.harness import MUG_MINOR, Bank, OrdersHarness, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")

Move = tuple[str, str | None, str]

PLACED: Final[Move] = ("status", None, "pending")
CONFIRMED: Final[Move] = ("status", "pending", "confirmed")


class End(msgspec.Struct, frozen=True):
    """How a checkout ends. Of three pieces, `sold` have left the shelf and `held` are reserved."""

    status: Status
    payment: Payment
    history: list[Move]
    reservation: str
    sold: int
    held: int
    captures: int
    sagas: list[str]
    operations: list[tuple[str, str]]
    """Of the bank: kind and status."""
    code: CancelCode | None = None
    provider_code: str | None = None


BOUGHT: Final = End(
    "confirmed",
    "paid",
    [PLACED, ("payment", "unpaid", "paid"), CONFIRMED],
    "committed",
    sold=3,
    held=0,
    captures=1,
    sagas=[],
    operations=[("charge", "succeeded")],
)
PAYABLE: Final = End(
    "pending",
    "unpaid",
    [PLACED],
    "held",
    sold=0,
    held=3,
    captures=0,
    sagas=["awaiting"],
    operations=[("charge", "declined")],
)
"""A payment was declined: the order can be paid in another way."""

ENDS: Final = {
    "sandbox:ok": BOUGHT,
    "sandbox:lost_answer": BOUGHT,
    "sandbox:error_then_ok": BOUGHT,
    "sandbox:slow:100": BOUGHT,
    "sandbox:declined": PAYABLE,
    "sandbox:insufficient_funds": PAYABLE,
    "sandbox:capture_expired": PAYABLE,
}
"""By payment method, of an order that is placed with it."""

CAPTURED_BY_HAND: Final = msgspec.structs.replace(
    BOUGHT,
    history=[PLACED, ("payment", "unpaid", "authorized"), CONFIRMED, ("payment", "authorized", "paid")],
    operations=[("authorize", "succeeded"), ("capture", "succeeded")],
)
LOST: Final = End(
    "cancelled",
    "voided",
    [
        PLACED,
        ("payment", "unpaid", "authorized"),
        CONFIRMED,
        ("payment", "authorized", "voided"),
        ("status", "confirmed", "cancelled"),
    ],
    # A reservation that was committed stays so; what came back is a movement of its own.
    "committed",
    sold=0,
    held=0,
    captures=0,
    sagas=[],
    operations=[("authorize", "succeeded"), ("capture", "declined")],
    code="payment_lost",
    provider_code="authorization_expired",
)
"""The authorization has run out before staff captured it."""


@pytest.mark.parametrize("method", ENDS)
async def test_an_order_placed_with_each_payment_method_ends_as_it_should(shared_harness: OrdersHarness, method: str):
    end = ENDS[method]
    product_id = await shared_harness.new_product(10)

    order = await shared_harness.checked_out(method, (product_id, 3))

    await assert_ended(shared_harness, order, end, product_id)


async def assert_ended(harness: OrdersHarness, order: Order, end: End, product_id: int) -> None:
    assert (order.status, order.payment) == (end.status, end.payment)
    assert sorted_by_version(await harness.history(order.id)) == end.history
    code = None if end.code is None else CancelReason(code=end.code, provider_code=end.provider_code)
    assert order.reason == code
    assert await harness.reservation(order.id) == end.reservation
    assert await harness.shelf(product_id) == (10 - end.sold, end.held)
    total = 3 * MUG_MINOR * end.captures
    assert await harness.bank(order.id) == Bank(end.captures, total, 0, open_charges=0)
    assert await harness.bank_operations(order.id) == end.operations
    assert await harness.saga(order.id) == end.sagas


def sorted_by_version(moves: list[Move]) -> list[Move]:
    """Two axes that move at once stand in either order."""
    return [*moves[:1], *sorted(moves[1:3]), *sorted(moves[3:])]


@pytest.mark.parametrize("method", ["sandbox:declined", "sandbox:insufficient_funds"])
async def test_an_order_whose_first_payment_was_declined_is_paid_in_another_way(
    shared_harness: OrdersHarness, method: str
):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(method, (product_id, 3))

    paid = await shared_harness.pay(order.id)

    assert (paid.payment.attempt, paid.payment.status) == (2, "captured")
    end = msgspec.structs.replace(BOUGHT, operations=[("charge", "declined"), ("charge", "succeeded")])
    await assert_ended(shared_harness, await shared_harness.settled(order.id), end, product_id)
    assert (await shared_harness.raw(order.id)).payment_attempt == 2


async def test_a_paid_order_is_one_transition_with_two_events(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:ok", (await shared_harness.new_product(10), 3))

    rows = "SELECT format('%s %s', version, events) FROM history WHERE order_id = $1 ORDER BY version"
    assert await shared_harness.values(rows, order.id) == ["1 {order.placed}", "2 {order.confirmed,order.paid}"]
    assert await shared_harness.emitted(order.id) == [
        ("order.placed", order.id),
        ("order.confirmed", order.id),
        ("order.paid", order.id),
    ]


async def test_an_order_placed_without_a_method_waits_with_its_stock_held(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)

    order = await shared_harness.checked_out(None, (product_id, 3))

    assert (order.status, order.payment, order.version) == ("pending", "unpaid", 1)
    assert await shared_harness.saga(order.id) == ["awaiting"]
    assert await shared_harness.reservation(order.id) == "held"
    assert await shared_harness.shelf(product_id) == (10, 3)
    assert await shared_harness.payments(order.id) == ()


@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_an_order_without_enough_stock_is_cancelled_with_the_short_lines(
    shared_harness: OrdersHarness, method: str | None
):
    some, few, none = [await shared_harness.new_product(pieces) for pieces in (10, 2, 0)]

    order = await shared_harness.checked_out(method, (none, 1), (some, 10), (few, 3))

    assert (order.status, order.payment) == ("cancelled", "unpaid")
    assert order.reason == CancelReason(
        code="out_of_stock",
        lines=(
            ShortLine(product_id=few, requested=3, available=2),
            ShortLine(product_id=none, requested=1, available=0),
        ),
    )
    assert [await shared_harness.shelf(i) for i in (some, few, none)] == [(10, 0), (2, 0), (0, 0)]
    # Tombstones refuse a reserve or a charge that arrives late, from a driver that was fenced.
    assert await shared_harness.reservation(order.id) == "released"
    assert [p.status for p in await shared_harness.payments(order.id)] == (["voided"] if method else [])
    assert await shared_harness.bank(order.id) == Bank(captures=0, captured_minor=0, refunded_minor=0, open_charges=0)


async def test_thirty_concurrent_buyers_of_seven_pieces_do_not_oversell(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(7)
    requests = [basket((product_id, 1), payment_method="sandbox:ok") for _ in range(30)]

    placed = await asyncio.gather(*(shared_harness.place(request) for request in requests))
    orders = [await shared_harness.settled(order.id) for order in placed]

    paid = [order for order in orders if order.payment == "paid"]
    refused = [order for order in orders if order.reason and order.reason.code == "out_of_stock"]
    assert (len(paid), len(refused)) == (7, 23)
    assert await shared_harness.shelf(product_id) == (0, 0)
    assert [(await shared_harness.bank(order.id)).net_minor for order in paid] == [MUG_MINOR] * 7
    assert [(await shared_harness.bank(order.id)).captures for order in refused] == [0] * 23


# ------------------------------------------------------------------------------------------------------------- total 0


@pytest.mark.parametrize("method", [None, "sandbox:ok", "sandbox:declined"])
async def test_an_order_with_a_total_of_0_is_paid_and_the_provider_is_not_called(
    shared_harness: OrdersHarness, method: str | None
):
    product_id = await shared_harness.new_product(10, price_minor=0)

    order = await shared_harness.checked_out(method, (product_id, 3))

    assert (order.status, order.payment, order.total_minor) == ("confirmed", "paid", 0)
    assert [(p.status, p.captured_minor) for p in await shared_harness.payments(order.id)] == (
        [("captured", 0)] if method else []
    )
    assert await shared_harness.bank_operations(order.id) == []
    assert await shared_harness.shelf(product_id) == (7, 0)
    assert await shared_harness.saga(order.id) == []


@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_a_paid_order_with_a_total_of_0_is_not_paid_again(shared_harness: OrdersHarness, method: str | None):
    order = await shared_harness.checked_out(method, (await shared_harness.new_product(10, price_minor=0), 3))

    with pytest.raises(IllegalMove):
        await shared_harness.pay(order.id)

    assert await shared_harness.bank_operations(order.id) == []


# ------------------------------------------------------------------------------------------------------------ settled


async def test_settled_answers_with_the_order_as_it_is_when_its_time_is_over(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.place(basket((product_id, 1), payment_method="sandbox:slow:3000"))

    waiting = await shared_harness.settled(order.id, wait_ms=50)

    assert (waiting.id, waiting.status, waiting.payment) == (order.id, "pending", "unpaid")


async def test_a_slow_payment_is_looked_at_again_when_it_is_settled(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.place(basket((product_id, 1), payment_method="sandbox:slow:60000"))

    async def is_put_off() -> bool:
        return await shared_harness.values(WAKES, order.id) == [True]

    await until(is_put_off, "the next try is a minute later")


WAKES: Final = "SELECT wake_at - now() BETWEEN '50 seconds' AND '70 seconds' FROM sagas WHERE subject_id = $1"


# ------------------------------------------------------------------------------------------------------------- crashes

BOTH: Final = ("before", "after")

CHARGED: Final = (
    *(f"checkout.{call}.{when}_call" for call in ("reserve", "charge", "commit") for when in BOTH),
    *(f"checkout.reserve.{when}_commit" for when in BOTH),
    "orders.place.after_commit",
)
"""Every point that an order with a payment method passes on its way to `paid`."""

AUTHORIZED: Final = (
    *(f"checkout.{call}.{when}_call" for call in ("reserve", "authorize", "commit", "capture") for when in BOTH),
    *(f"checkout.{step}.{when}_commit" for step in ("reserve", "settle") for when in BOTH),
)
"""Every point that an order passes which is authorized, and captured by hand."""

UNDONE: Final = (
    *(f"checkout.{call}.{when}_call" for call in ("void", "release", "restock") for when in BOTH),
    *(f"checkout.unwind.{when}_commit" for when in BOTH),
)
"""Every point that the undoing of one passes whose authorization has run out. A refund: `test_cancelling.py`."""


@pytest.mark.parametrize("point", CHARGED)
async def test_a_step_that_fails_at_any_point_is_repeated_and_charges_once(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    product_id = await shared_harness.new_product(10)
    failing = FailAt(1, 2)
    inject(point, failing)
    placing = basket((product_id, 3), payment_method="sandbox:ok", idempotency_key=point, fingerprint=b"one")
    if point == "orders.place.after_commit":
        failing.arrived = 1
        await asyncio.gather(shared_harness.place(placing), return_exceptions=True)
    order = await shared_harness.settled((await shared_harness.place(placing)).id)

    assert failing.arrived, "the point is not on this way"
    await assert_ended(shared_harness, order, BOUGHT, product_id)


@pytest.mark.parametrize("point", AUTHORIZED)
async def test_a_manual_capture_that_fails_at_any_point_is_repeated_and_captures_once(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    order, product_id = await capture_by_hand(shared_harness, inject, point, "sandbox:ok")

    await assert_ended(shared_harness, order, CAPTURED_BY_HAND, product_id)


@pytest.mark.parametrize("point", AUTHORIZED)
async def test_a_part_is_captured_once_whatever_fails_and_comes_again(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    order, _ = await capture_by_hand(shared_harness, inject, point, "sandbox:ok", amount_minor=2_000)
    [payment] = await shared_harness.payments(order.id)
    with shared_harness.acting(STAFF):
        again = await shared_harness.orders.capture_part(CapturePart(payment_id=payment.id, amount_minor=2_000))
        for other in (1_999, None):
            with pytest.raises(CaptureAmountChanged) as refused:
                await shared_harness.orders.capture_part(CapturePart(payment_id=payment.id, amount_minor=other))
            assert refused.value.captured_minor == 2_000

    assert again.payment == payment
    assert (order.status, order.payment, rules.paid_minor(order), rules.due_minor(order)) == (
        "confirmed",
        "paid",
        2_000,
        0,
    )
    assert await shared_harness.bank(order.id) == Bank(1, 2_000, 0, open_charges=0)
    assert await shared_harness.bank_operations(order.id) == CAPTURED_BY_HAND.operations


@pytest.mark.parametrize("point", UNDONE)
async def test_an_undoing_that_fails_at_any_point_is_repeated_and_done_once(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    order, product_id = await capture_by_hand(shared_harness, inject, point, "sandbox:capture_expired")

    await assert_ended(shared_harness, order, LOST, product_id)


async def capture_by_hand(
    harness: OrdersHarness, inject: Inject, point: str, method: str, amount_minor: int | None = None
) -> tuple[Order, int]:
    """An order that was authorized, and captured by staff, while a fault happens at a point."""
    product_id = await harness.new_product(10)
    failing = FailAt(1, 2)
    inject(point, failing)
    order = await harness.checked_out(None, (product_id, 3))
    payment = (await harness.pay(order.id, method, actor=STAFF, capture=False)).payment
    await harness.settled(order.id)
    with harness.acting(STAFF):
        asked = CapturePart(payment_id=payment.id, amount_minor=amount_minor)
        await asyncio.gather(harness.orders.capture_part(asked), return_exceptions=True)
    assert failing.arrived, "the point is not on this way"
    return await harness.settled(order.id), product_id
