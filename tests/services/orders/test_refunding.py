"""Refunds and returns: never more than was paid, never more than was sold, once for each key."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Final

import pytest

from mercato.chassis.contract import Forbidden, IdempotencyKeyReused, InvalidRequest, RequestInProgress, ServiceError
from mercato.chassis.faults import Fault
from mercato.contracts.orders import (
    CancelOrder,
    IllegalMove,
    MoveOrder,
    NothingToRefund,
    NotReturnable,
    Order,
    OrderNotFound,
    PaymentInProgress,
    Refund,
    RefundOrder,
    ReturnLine,
    ReturnOrder,
)
from mercato.contracts.payments import PaymentNotFound
from services.orders.world import ALICE, MUG_MINOR, STAFF, World

pytestmark = pytest.mark.asyncio(loop_scope="session")

Plant = Callable[[str, Fault], Callable[[], None]]

TOTAL: Final = 3 * MUG_MINOR

_keys = itertools.count(1)


def new_key() -> str:
    return f"refund-{next(_keys)}"


async def paid(world: World) -> tuple[Order, int]:
    """A paid order of three pieces, and the number of its payment."""
    order = await world.checked_out("sandbox:ok", (await world.new_product(10), 3))
    return order, (await world.payments(order.id))[0].id


async def refund(world: World, payment_id: int, amount: int | None = None, key: str = "", **fields: Any) -> Refund:
    with world.acting(STAFF):
        return await world.orders.refund(
            RefundOrder(payment_id=payment_id, amount_minor=amount, idempotency_key=key or new_key(), **fields)
        )


async def take_back(world: World, order_id: int, *lines: tuple[int, int], key: str = "", **fields: Any) -> Refund:
    with world.acting(STAFF):
        back = tuple(ReturnLine(product_id=i, quantity=quantity) for i, quantity in lines)
        return await world.orders.take_back(
            ReturnOrder(id=order_id, lines=back, idempotency_key=key or new_key(), **fields)
        )


async def forget_keys(world: World) -> None:
    """As if a day had passed."""
    async with world.database.transaction() as tx:
        await tx.execute("DELETE FROM idempotency WHERE operation IN ('orders.refund', 'orders.take_back')")


async def outcome_of(asked: Any) -> Refund | ServiceError:
    try:
        return await asked
    except ServiceError as error:
        return error


# ------------------------------------------------------------------------------------------------------------- refunds


async def test_without_an_amount_all_that_was_paid_is_given_back(busy_world: World):
    order, payment_id = await paid(busy_world)

    given = await refund(busy_world, payment_id, reason="a present")

    assert (given.order_id, given.amount_minor, given.currency, given.status) == (order.id, TOTAL, "USD", "succeeded")
    now = await busy_world.settled(order.id)
    assert (now.status, now.payment, now.refunded_minor) == ("confirmed", "refunded", TOTAL)
    assert (await busy_world.bank(order.id)).refunded_minor == TOTAL


async def test_a_payment_is_given_back_in_parts_until_nothing_is_left(busy_world: World):
    order, payment_id = await paid(busy_world)

    first = await refund(busy_world, payment_id, 1_000)
    second = await refund(busy_world, payment_id, 500)
    partly = await busy_world.settled(order.id)
    with pytest.raises(NothingToRefund) as too_much:
        await refund(busy_world, payment_id, TOTAL - 1_499)
    rest = await refund(busy_world, payment_id)
    with pytest.raises(IllegalMove):
        await refund(busy_world, payment_id, 1)

    assert len({first.id, second.id, rest.id}) == 3
    assert (partly.payment, partly.refunded_minor) == ("partially_refunded", 1_500)
    assert too_much.value.left_minor == TOTAL - 1_500
    assert rest.amount_minor == TOTAL - 1_500
    assert (await busy_world.settled(order.id)).payment == "refunded"
    assert (await busy_world.bank(order.id)).net_minor == 0
    assert (await busy_world.history(order.id))[-3:] == [
        ("payment", "paid", "partially_refunded"),
        ("payment", "partially_refunded", "partially_refunded"),
        ("payment", "partially_refunded", "refunded"),
    ]


async def test_refunds_at_once_never_have_the_same_money(busy_world: World):
    order, payment_id = await paid(busy_world)
    elsewhere = await busy_world.another_process()
    with busy_world.acting(STAFF):
        outcomes = await asyncio.gather(
            *(
                outcome_of(
                    (busy_world.orders, elsewhere)[n % 2].refund(
                        RefundOrder(payment_id=payment_id, amount_minor=1_000, idempotency_key=new_key())
                    )
                )
                for n in range(8)
            )
        )

    given = [o for o in outcomes if isinstance(o, Refund)]
    assert [o.status for o in given] == ["succeeded"] * 3  # 3 750 were paid
    assert {type(o) for o in outcomes if not isinstance(o, Refund)} == {NothingToRefund}
    assert (await busy_world.settled(order.id)).refunded_minor == 3_000
    assert (await busy_world.bank(order.id)).refunded_minor == 3_000


async def test_another_currency_is_refused(busy_world: World):
    _, payment_id = await paid(busy_world)

    with pytest.raises(InvalidRequest):
        await refund(busy_world, payment_id, 1_000, currency="EUR")


async def test_what_was_not_paid_is_not_given_back(busy_world: World):
    order = await busy_world.checked_out(None, (await busy_world.new_product(10), 1))
    reserved = (await busy_world.pay(order.id, actor=STAFF, capture=False)).payment

    with pytest.raises(IllegalMove) as refused:
        await refund(busy_world, reserved.id)
    with pytest.raises(PaymentNotFound):
        await refund(busy_world, 404)

    assert (refused.value.axis, refused.value.current) == ("payment", "authorized")


async def test_a_refund_that_the_bank_declines_is_declined_and_its_amount_is_free_again(busy_world: World):
    order, payment_id = await paid(busy_world)
    bank = await busy_world.connection("sandbox")
    await bank.execute("UPDATE charges SET refunded_minor = captured_minor - 1000 WHERE order_id = $1", order.id)

    declined = await refund(busy_world, payment_id, 2_000)
    given = await refund(busy_world, payment_id, 1_000)

    assert (declined.status, declined.code) == ("declined", "payments.refund_declined")
    assert given.status == "succeeded"
    row = await busy_world.raw(order.id)
    assert (row.payment, row.refunded_minor, row.refund_pending_minor) == ("partially_refunded", 1_000, 0)


async def test_only_staff_refund_and_take_back(busy_world: World):
    order, payment_id = await paid(busy_world)
    with busy_world.acting(ALICE):
        with pytest.raises(Forbidden):
            await busy_world.orders.refund(RefundOrder(payment_id=payment_id, idempotency_key=new_key()))
        with pytest.raises(Forbidden):
            await busy_world.orders.take_back(ReturnOrder(id=order.id, idempotency_key=new_key()))


async def test_an_order_is_not_cancelled_while_a_refund_of_it_is_under_way(busy_world: World, plant: Plant):
    order, payment_id = await paid(busy_world)
    stands, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_point: str) -> None:
        stands.set()
        await go_on.wait()

    lift = plant("refund.refund.before_call", hold)
    refunding = asyncio.ensure_future(refund(busy_world, payment_id, 1_000))
    await stands.wait()
    lift()
    with busy_world.acting(ALICE), pytest.raises(PaymentInProgress):
        await busy_world.orders.cancel(CancelOrder(id=order.id))
    go_on.set()

    assert (await refunding).status == "succeeded"
    with busy_world.acting(ALICE):
        await busy_world.orders.cancel(CancelOrder(id=order.id))
    assert (await busy_world.settled(order.id)).payment == "refunded"
    assert (await busy_world.bank(order.id)).net_minor == 0


# ---------------------------------------------------------------------------------------------------------------- keys


async def test_a_key_that_comes_again_is_one_refund(busy_world: World):
    order, payment_id = await paid(busy_world)
    key = new_key()

    first = await refund(busy_world, payment_id, 1_000, key, fingerprint=b"one")
    again = await refund(busy_world, payment_id, 1_000, key, fingerprint=b"one")

    assert (again.replayed, again.id, again.status) == (True, first.id, "succeeded")
    assert (await busy_world.bank(order.id)).refunded_minor == 1_000


async def test_a_key_of_another_request_is_refused(busy_world: World):
    order, payment_id = await paid(busy_world)
    key = new_key()
    await refund(busy_world, payment_id, 1_000, key, fingerprint=b"one")

    with pytest.raises(IdempotencyKeyReused):
        await refund(busy_world, payment_id, 2_000, key, fingerprint=b"two")

    assert (await busy_world.bank(order.id)).refunded_minor == 1_000


async def test_a_key_is_one_refund_for_ever(busy_world: World):
    order, payment_id = await paid(busy_world)
    key = new_key()
    first = await refund(busy_world, payment_id, 1_000, key, fingerprint=b"one")
    await forget_keys(busy_world)

    again = await refund(busy_world, payment_id, 1_000, key, fingerprint=b"one")
    await forget_keys(busy_world)
    with pytest.raises(IdempotencyKeyReused):
        await refund(busy_world, payment_id, 2_000, key, fingerprint=b"two")

    assert (again.replayed, again.id) == (True, first.id)
    assert (await busy_world.bank(order.id)).refunded_minor == 1_000


async def test_twins_in_two_processes_are_one_refund(busy_world: World):
    order, payment_id = await paid(busy_world)
    elsewhere = await busy_world.another_process()
    request = RefundOrder(payment_id=payment_id, amount_minor=1_000, idempotency_key=new_key(), fingerprint=b"one")

    with busy_world.acting(STAFF):
        outcomes = await asyncio.gather(
            *(outcome_of((busy_world.orders, elsewhere)[n % 2].refund(request)) for n in range(8))
        )

    assert len({o.id for o in outcomes if isinstance(o, Refund)}) == 1
    assert {type(o) for o in outcomes} <= {Refund, RequestInProgress}
    assert (await busy_world.bank(order.id)).refunded_minor == 1_000


# ------------------------------------------------------------------------------------------------------------- returns


async def test_goods_come_back_by_line_and_quantity_and_what_they_cost_is_refunded(busy_world: World):
    mug, lamp = await busy_world.new_product(10), await busy_world.new_product(10, price_minor=4_999)
    order = await busy_world.delivered("sandbox:ok", (mug, 3), (lamp, 2))

    first = await take_back(busy_world, order.id, (mug, 1), (lamp, 2), reason="too dark")
    partly = await busy_world.settled(order.id)
    rest = await take_back(busy_world, order.id)

    assert (first.amount_minor, first.status) == (MUG_MINOR + 2 * 4_999, "succeeded")
    assert (partly.payment, partly.fulfilment) == ("partially_refunded", "delivered")
    assert [line.returned for line in partly.lines] == [1, 2]
    assert rest.lines == (ReturnLine(product_id=mug, quantity=2),)
    assert rest.amount_minor == 2 * MUG_MINOR
    now = await busy_world.settled(order.id)
    assert (now.payment, now.fulfilment, now.status) == ("refunded", "returned", "confirmed")
    assert [await busy_world.shelf(i) for i in (mug, lamp)] == [(10, 0), (10, 0)]
    assert (await busy_world.bank(order.id)).net_minor == 0


async def test_more_than_was_sold_does_not_come_back(busy_world: World):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered("sandbox:ok", (mug, 3))
    await take_back(busy_world, order.id, (mug, 2))

    for lines in ([(mug, 2)], [(mug + 999, 1)]):
        with pytest.raises(NotReturnable) as refused:
            await take_back(busy_world, order.id, *lines)
        assert refused.value.left == (1 if lines[0][0] == mug else 0)
    with pytest.raises(InvalidRequest):
        await take_back(busy_world, order.id, (mug, 1), (mug, 1))

    assert await busy_world.shelf(mug) == (9, 0)
    assert (await busy_world.bank(order.id)).refunded_minor == 2 * MUG_MINOR


async def test_returns_at_once_never_bring_the_same_piece(busy_world: World):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered("sandbox:ok", (mug, 3))
    elsewhere = await busy_world.another_process()
    lines = (ReturnLine(product_id=mug, quantity=2),)
    with busy_world.acting(STAFF):
        outcomes = await asyncio.gather(
            *(
                outcome_of(orders.take_back(ReturnOrder(id=order.id, lines=lines, idempotency_key=new_key())))
                for orders in (busy_world.orders, elsewhere)
            )
        )

    assert sorted(type(o).__name__ for o in outcomes) == ["NotReturnable", "Refund"]
    assert await busy_world.shelf(mug) == (9, 0)
    assert (await busy_world.bank(order.id)).refunded_minor == 2 * MUG_MINOR


async def test_a_return_that_comes_again_is_one_for_ever(busy_world: World):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered("sandbox:ok", (mug, 3))
    key = new_key()
    first = await take_back(busy_world, order.id, (mug, 1), key=key, fingerprint=b"one")
    await forget_keys(busy_world)

    again = await take_back(busy_world, order.id, (mug, 1), key=key, fingerprint=b"one")
    with pytest.raises(IdempotencyKeyReused):
        await take_back(busy_world, order.id, (mug, 2), key=key, fingerprint=b"two")

    assert (again.id, again.replayed) == (first.id, True)
    assert await busy_world.shelf(mug) == (8, 0)


async def test_what_was_not_delivered_does_not_come_back(busy_world: World):
    order, _ = await paid(busy_world)

    with pytest.raises(IllegalMove) as refused:
        await take_back(busy_world, order.id)
    with pytest.raises(OrderNotFound):
        await take_back(busy_world, 404)

    assert (refused.value.axis, refused.value.current) == ("fulfilment", "unfulfilled")


async def test_what_was_given_back_by_hand_is_not_given_back_again(busy_world: World):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered("sandbox:ok", (mug, 3))
    await refund(busy_world, (await busy_world.payments(order.id))[0].id, TOTAL - 100)

    returned = await take_back(busy_world, order.id)

    assert returned.amount_minor == 100
    assert (await busy_world.bank(order.id)).net_minor == 0
    assert await busy_world.shelf(mug) == (10, 0)


async def test_goods_on_account_come_back_without_money(busy_world: World):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered(None, (mug, 3))

    returned = await take_back(busy_world, order.id, (mug, 1))

    assert (returned.amount_minor, returned.status) == (0, "succeeded")
    assert await busy_world.shelf(mug) == (8, 0)
    assert (await busy_world.settled(order.id)).payment == "unpaid"


async def test_a_move_to_returned_takes_back_all_that_is_left(busy_world: World):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered("sandbox:ok", (mug, 3))
    await take_back(busy_world, order.id, (mug, 1))

    with busy_world.acting(STAFF):
        moved = await busy_world.orders.move(MoveOrder(id=order.id, fulfilment="returned"))
        again = await busy_world.orders.move(MoveOrder(id=order.id, fulfilment="returned"))

    async def is_refunded() -> bool:
        return (await busy_world.raw(order.id)).payment == "refunded"

    assert (moved.fulfilment, again.fulfilment) == ("returned", "returned")
    await busy_world.until(is_refunded)
    assert (await busy_world.bank(order.id)).net_minor == 0
    assert await busy_world.shelf(mug) == (10, 0)


# ------------------------------------------------------------------------------------------------------------- crashes

POINTS: Final = (
    *(f"orders.refund.{when}_commit" for when in ("before", "after")),
    *(f"refund.{call}.{when}_call" for call in ("restock", "refund") for when in ("before", "after")),
    *(f"refund.save.{when}_commit" for when in ("before", "after")),
)


@pytest.mark.parametrize("point", POINTS)
async def test_a_return_that_fails_anywhere_is_finished_later_and_done_once(
    busy_world: World, plant: Plant, point: str
):
    mug = await busy_world.new_product(10)
    order = await busy_world.delivered("sandbox:ok", (mug, 3))
    failures = 0

    async def fail_once(_point: str) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise RuntimeError("the power fails here")

    plant(point, fail_once)
    key = new_key()
    await outcome_of(take_back(busy_world, order.id, (mug, 2), key=key, fingerprint=b"one"))
    returned = await take_back(busy_world, order.id, (mug, 2), key=key, fingerprint=b"one")

    assert failures
    assert (returned.status, returned.amount_minor) == ("succeeded", 2 * MUG_MINOR)
    now = await busy_world.raw(order.id)
    assert (now.payment, now.refunded_minor, now.refund_pending_minor) == ("partially_refunded", 2 * MUG_MINOR, 0)
    assert await busy_world.shelf(mug) == (9, 0)
    assert (await busy_world.bank(order.id)).refunded_minor == 2 * MUG_MINOR
