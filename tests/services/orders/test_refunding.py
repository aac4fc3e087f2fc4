"""Refunds and returns: never more than was paid, never more than was sold, once for each key."""

from __future__ import annotations

import asyncio
import datetime
import itertools
from typing import Any, Final

import msgspec
import pytest

from mercato.chassis.contract import (
    Actor,
    Forbidden,
    IdempotencyKeyReused,
    InvalidRequest,
    RequestInProgress,
    ServiceError,
)
from mercato.contracts.order_history import History, Timeline
from mercato.contracts.order_refusals import (
    IllegalMove,
    NothingToRefund,
    NotReturnable,
    OrderNotFound,
    PaymentInProgress,
    RefundNotFound,
)
from mercato.contracts.orders import (
    CancelOrder,
    CapturePart,
    GetHistory,
    GetOrder,
    GetRefund,
    GetTimeline,
    ListPaymentRefunds,
    ListRefunds,
    MoveOrder,
    Order,
    PayOrder,
    Refund,
    RefundOrder,
    ReturnLine,
    ReturnOrder,
)
from mercato.contracts.payments import PaymentNotFound
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.injection import FailAt, Inject, Pause
from mercato.testing.waiting import until
from services.orders.harness import MUG_MINOR, OrdersHarness

pytestmark = pytest.mark.asyncio(loop_scope="session")


TOTAL: Final = 3 * MUG_MINOR

_keys = itertools.count(1)


def new_key() -> str:
    return f"refund-{next(_keys)}"


async def paid(harness: OrdersHarness) -> tuple[Order, int]:
    """A paid order of three pieces, and the number of its payment."""
    order = await harness.checked_out("sandbox:ok", (await harness.new_product(10), 3))
    return order, (await harness.payments(order.id))[0].id


async def refund(
    harness: OrdersHarness, payment_id: int, amount: int | None = None, key: str = "", **fields: Any
) -> Refund:
    with harness.acting(STAFF):
        return await harness.orders.refund(
            RefundOrder(payment_id=payment_id, amount_minor=amount, idempotency_key=key or new_key(), **fields)
        )


async def take_back(
    harness: OrdersHarness, order_id: int, *lines: tuple[int, int], key: str = "", **fields: Any
) -> Refund:
    with harness.acting(STAFF):
        back = tuple(ReturnLine(product_id=i, quantity=quantity) for i, quantity in lines)
        return await harness.orders.take_back(
            ReturnOrder(id=order_id, lines=back, idempotency_key=key or new_key(), **fields)
        )


async def a_month_passes(harness: OrdersHarness) -> None:
    """Sets all orders and refunds 30 days back."""
    connection = await harness.connection()
    past = "created_at = created_at - interval '30 days'"
    await connection.execute(f"UPDATE orders SET {past}, updated_at = updated_at - interval '30 days'")
    await connection.execute(f"UPDATE refunds SET {past}, settled_at = settled_at - interval '30 days'")


def a_month_older(refund: Refund) -> Refund:
    """As it is after `a_month_passes`."""
    month = datetime.timedelta(days=30)
    assert refund.created_at is not None
    assert refund.settled_at is not None
    return msgspec.structs.replace(refund, created_at=refund.created_at - month, settled_at=refund.settled_at - month)


async def outcome_of(asked: Any) -> Refund | ServiceError:
    try:
        return await asked
    except ServiceError as error:
        return error


# ------------------------------------------------------------------------------------------------------------- refunds


async def test_a_refund_without_an_amount_is_of_all_that_was_paid(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)

    given = await refund(shared_harness, payment_id, reason="a present")

    assert (given.order_id, given.amount_minor, given.currency, given.status) == (order.id, TOTAL, "USD", "succeeded")
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment, now.refunded_minor) == ("confirmed", "refunded", TOTAL)
    assert (await shared_harness.bank(order.id)).refunded_minor == TOTAL


async def test_a_payment_is_refunded_in_parts_until_nothing_is_left(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)

    first = await refund(shared_harness, payment_id, 1_000)
    second = await refund(shared_harness, payment_id, 500)
    partly = await shared_harness.settled(order.id)
    with pytest.raises(NothingToRefund) as too_much:
        await refund(shared_harness, payment_id, TOTAL - 1_499)
    rest = await refund(shared_harness, payment_id)
    with pytest.raises(IllegalMove):
        await refund(shared_harness, payment_id, 1)

    assert len({first.id, second.id, rest.id}) == 3
    assert (partly.payment, partly.refunded_minor) == ("partially_refunded", 1_500)
    assert too_much.value.left_minor == TOTAL - 1_500
    assert rest.amount_minor == TOTAL - 1_500
    assert (await shared_harness.settled(order.id)).payment == "refunded"
    assert (await shared_harness.bank(order.id)).net_minor == 0
    assert (await shared_harness.history(order.id))[-3:] == [
        ("payment", "paid", "partially_refunded"),
        ("payment", "partially_refunded", "partially_refunded"),
        ("payment", "partially_refunded", "refunded"),
    ]


async def test_concurrent_refunds_never_refund_more_than_was_paid(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    elsewhere = await shared_harness.another_process()
    with shared_harness.acting(STAFF):
        outcomes = await asyncio.gather(
            *(
                outcome_of(
                    (shared_harness.orders, elsewhere)[n % 2].refund(
                        RefundOrder(payment_id=payment_id, amount_minor=1_000, idempotency_key=new_key())
                    )
                )
                for n in range(8)
            )
        )

    given = [o for o in outcomes if isinstance(o, Refund)]
    assert [o.status for o in given] == ["succeeded"] * 3  # 3 750 were paid
    assert {type(o) for o in outcomes if not isinstance(o, Refund)} == {NothingToRefund}
    assert (await shared_harness.settled(order.id)).refunded_minor == 3_000
    assert (await shared_harness.bank(order.id)).refunded_minor == 3_000


async def test_a_refund_in_another_currency_is_refused(shared_harness: OrdersHarness):
    _, payment_id = await paid(shared_harness)

    with pytest.raises(InvalidRequest):
        await refund(shared_harness, payment_id, 1_000, currency="EUR")


async def test_an_unpaid_payment_is_not_refunded(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out(None, (await shared_harness.new_product(10), 1))
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment

    with pytest.raises(IllegalMove) as refused:
        await refund(shared_harness, reserved.id)
    with pytest.raises(PaymentNotFound):
        await refund(shared_harness, 404)

    assert (refused.value.axis, refused.value.current) == ("payment", "authorized")


async def test_a_declined_refund_releases_its_amount(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    bank = await shared_harness.connection("sandbox")
    await bank.execute("UPDATE charges SET refunded_minor = captured_minor - 1000 WHERE order_id = $1", order.id)

    declined = await refund(shared_harness, payment_id, 2_000)
    given = await refund(shared_harness, payment_id, 1_000)

    assert (declined.status, declined.code) == ("declined", "payments.refund_declined")
    assert given.status == "succeeded"
    record = await shared_harness.raw(order.id)
    assert (record.order.payment, record.order.refunded_minor) == ("partially_refunded", 1_000)
    assert record.refund_pending_minor == 0
    rows = "SELECT format('%s %s %s', status, code, settled_at IS NULL) FROM refunds WHERE order_id = $1"
    assert await shared_harness.values(f"{rows} ORDER BY created_at", order.id) == [
        "declined payments.refund_declined f",
        "succeeded  f",
    ]


async def test_customers_may_neither_refund_nor_return(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    with shared_harness.acting(ALICE):
        with pytest.raises(Forbidden):
            await shared_harness.orders.refund(RefundOrder(payment_id=payment_id, idempotency_key=new_key()))
        with pytest.raises(Forbidden):
            await shared_harness.orders.take_back(ReturnOrder(id=order.id, idempotency_key=new_key()))


async def test_a_cancel_while_a_refund_is_under_way_is_refused(shared_harness: OrdersHarness, inject: Inject):
    order, payment_id = await paid(shared_harness)
    pause = Pause()
    lift = inject("refund.refund.before_call", pause)
    refunding = asyncio.ensure_future(refund(shared_harness, payment_id, 1_000))
    await pause.reached.wait()
    lift()
    with shared_harness.acting(ALICE), pytest.raises(PaymentInProgress):
        await shared_harness.orders.cancel(CancelOrder(id=order.id))
    pause.resume.set()

    assert (await refunding).status == "succeeded"
    with shared_harness.acting(ALICE):
        await shared_harness.orders.cancel(CancelOrder(id=order.id))
    assert (await shared_harness.settled(order.id)).payment == "refunded"
    assert (await shared_harness.bank(order.id)).net_minor == 0


# ---------------------------------------------------------------------------------------------------------------- keys


async def test_a_repeated_key_is_one_refund(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    key = new_key()

    first = await refund(shared_harness, payment_id, 1_000, key, fingerprint=b"one")
    again = await refund(shared_harness, payment_id, 1_000, key, fingerprint=b"one")

    assert (again.replayed, again.id, again.status) == (True, first.id, "succeeded")
    assert (await shared_harness.bank(order.id)).refunded_minor == 1_000


async def test_the_same_key_with_another_request_is_refused(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    key = new_key()
    await refund(shared_harness, payment_id, 1_000, key, fingerprint=b"one")

    with pytest.raises(IdempotencyKeyReused):
        await refund(shared_harness, payment_id, 2_000, key, fingerprint=b"two")

    assert (await shared_harness.bank(order.id)).refunded_minor == 1_000


async def test_a_key_is_one_refund_after_30_days(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    key = new_key()
    first = await refund(shared_harness, payment_id, 1_000, key, fingerprint=b"one", reason="a scratch")
    await a_month_passes(shared_harness)

    again = await refund(shared_harness, payment_id, 1_000, key, fingerprint=b"one", reason="a scratch")
    with pytest.raises(IdempotencyKeyReused):
        await refund(shared_harness, payment_id, 2_000, key, fingerprint=b"two")

    assert again == a_month_older(msgspec.structs.replace(first, replayed=True))
    assert (await shared_harness.bank(order.id)).refunded_minor == 1_000
    assert (await shared_harness.settled(order.id)).refunded_minor == 1_000
    assert await shared_harness.values("SELECT count(*) FROM refunds WHERE order_id = $1", order.id) == [1]


async def test_the_key_of_a_refund_is_refused_for_another_order(shared_harness: OrdersHarness):
    first, first_payment = await paid(shared_harness)
    second, second_payment = await paid(shared_harness)
    key = new_key()
    await refund(shared_harness, first_payment, 1_000, key, fingerprint=b"first")

    with pytest.raises(IdempotencyKeyReused):
        await refund(shared_harness, second_payment, 1_000, key, fingerprint=b"second")

    assert [(await shared_harness.bank(order.id)).refunded_minor for order in (first, second)] == [1_000, 0]
    assert (await shared_harness.raw(second.id)).refund_pending_minor == 0


async def test_one_key_for_the_refunds_of_two_orders_at_once_makes_one_of_them(shared_harness: OrdersHarness):
    orders = [await paid(shared_harness) for _ in range(2)]
    elsewhere = await shared_harness.another_process()
    key = new_key()
    with shared_harness.acting(STAFF):
        outcomes = await asyncio.gather(
            *(
                outcome_of(
                    client.refund(
                        RefundOrder(payment_id=payment_id, idempotency_key=key, fingerprint=b"%d" % payment_id)
                    )
                )
                for client, (_, payment_id) in zip((shared_harness.orders, elsewhere), orders, strict=True)
            )
        )

    assert [type(o) for o in outcomes].count(Refund) == 1
    assert {type(o) for o in outcomes} <= {Refund, IdempotencyKeyReused, RequestInProgress}
    refunded = [(await shared_harness.bank(order.id)).refunded_minor for order, _ in orders]
    assert sorted(refunded) == [0, TOTAL]


async def test_a_refused_refund_leaves_its_key_free(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    key = new_key()
    with pytest.raises(NothingToRefund):
        await refund(shared_harness, payment_id, TOTAL + 1, key, fingerprint=b"one")

    assert (await refund(shared_harness, payment_id, TOTAL, key, fingerprint=b"two")).status == "succeeded"
    assert (await shared_harness.bank(order.id)).refunded_minor == TOTAL


async def test_the_refund_of_an_order_with_a_total_of_0_is_refused(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:ok", (await shared_harness.new_product(10, price_minor=0), 1))
    [payment] = await shared_harness.payments(order.id)

    with pytest.raises(NothingToRefund) as refused:
        await refund(shared_harness, payment.id)

    assert (refused.value.wanted_minor, refused.value.left_minor) == (0, 0)
    assert await shared_harness.bank_operations(order.id) == []


async def test_the_refund_of_a_declined_payment_of_a_paid_order_is_refused(shared_harness: OrdersHarness):
    """The order is paid, with another payment than the one that is named."""
    order = await shared_harness.checked_out("sandbox:declined", (await shared_harness.new_product(10), 1))
    [declined] = await shared_harness.payments(order.id)
    await shared_harness.pay(order.id)

    with pytest.raises(NothingToRefund):
        await refund(shared_harness, declined.id)

    assert (await shared_harness.bank(order.id)).refunded_minor == 0


async def test_eight_duplicates_in_two_processes_are_one_refund(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    elsewhere = await shared_harness.another_process()
    request = RefundOrder(payment_id=payment_id, amount_minor=1_000, idempotency_key=new_key(), fingerprint=b"one")

    with shared_harness.acting(STAFF):
        outcomes = await asyncio.gather(
            *(outcome_of((shared_harness.orders, elsewhere)[n % 2].refund(request)) for n in range(8))
        )

    assert len({o.id for o in outcomes if isinstance(o, Refund)}) == 1
    assert {type(o) for o in outcomes} <= {Refund, RequestInProgress}
    assert (await shared_harness.bank(order.id)).refunded_minor == 1_000


# ------------------------------------------------------------------------------------------------------------- returns


async def test_returned_goods_are_refunded_by_line_and_quantity(shared_harness: OrdersHarness):
    mug, lamp = await shared_harness.new_product(10), await shared_harness.new_product(10, price_minor=4_999)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3), (lamp, 2))

    first = await take_back(shared_harness, order.id, (mug, 1), (lamp, 2), reason="too dark")
    partly = await shared_harness.settled(order.id)
    rest = await take_back(shared_harness, order.id)

    assert (first.amount_minor, first.status) == (MUG_MINOR + 2 * 4_999, "succeeded")
    assert (partly.payment, partly.fulfilment) == ("partially_refunded", "delivered")
    assert [line.returned for line in partly.lines] == [1, 2]
    assert first.lines == (
        ReturnLine(line_id=1, product_id=mug, quantity=1),
        ReturnLine(line_id=2, product_id=lamp, quantity=2),
    )
    assert rest.lines == (ReturnLine(line_id=1, product_id=mug, quantity=2),)
    assert rest.amount_minor == 2 * MUG_MINOR
    now = await shared_harness.settled(order.id)
    assert (now.payment, now.fulfilment, now.status) == ("refunded", "returned", "confirmed")
    assert [await shared_harness.shelf(i) for i in (mug, lamp)] == [(10, 0), (10, 0)]
    assert (await shared_harness.bank(order.id)).net_minor == 0


async def take_back_lines(harness: OrdersHarness, order_id: int, *lines: ReturnLine) -> Refund:
    with harness.acting(STAFF):
        return await harness.orders.take_back(ReturnOrder(id=order_id, lines=lines, idempotency_key=new_key()))


@pytest.mark.parametrize("by", ["line", "product", "both"])
async def test_a_returned_line_is_named_by_its_id_its_product_or_both(shared_harness: OrdersHarness, by: str):
    mug, lamp = await shared_harness.new_product(10), await shared_harness.new_product(10, price_minor=4_999)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3), (lamp, 2))
    named = {"line": {"line_id": 2}, "product": {"product_id": lamp}, "both": {"line_id": 2, "product_id": lamp}}[by]

    returned = await take_back_lines(shared_harness, order.id, ReturnLine(quantity=1, **named))

    assert returned.lines == (ReturnLine(line_id=2, product_id=lamp, quantity=1),)
    assert returned.amount_minor == 4_999
    assert [line.returned for line in (await shared_harness.settled(order.id)).lines] == [0, 1]
    assert [await shared_harness.shelf(i) for i in (mug, lamp)] == [(7, 0), (9, 0)]


@pytest.mark.parametrize(
    "wrong", [{}, {"line_id": 3}, {"line_id": 1, "product_id": 2}, {"line_id": 3, "product_id": 1}]
)
async def test_a_return_that_names_no_line_of_the_order_changes_nothing(
    shared_harness: OrdersHarness, wrong: dict[str, int]
):
    """`product_id` counts the products of the test here."""
    products = {1: await shared_harness.new_product(10), 2: await shared_harness.new_product(10)}
    order = await shared_harness.delivered("sandbox:ok", (products[1], 3), (products[2], 2))
    named = {name: products[value] if name == "product_id" else value for name, value in wrong.items()}

    with pytest.raises(InvalidRequest) as refused:
        await take_back_lines(
            shared_harness, order.id, ReturnLine(quantity=1, line_id=1), ReturnLine(quantity=1, **named)
        )

    assert [error.field for error in refused.value.errors] == ["items[1]"]
    assert [line.returned for line in (await shared_harness.settled(order.id)).lines] == [0, 0]
    assert await shared_harness.values("SELECT count(*) FROM refunds WHERE order_id = $1", order.id) == [0]


async def test_partial_returns_of_a_line_whose_total_does_not_divide_add_up_to_its_total(shared_harness: OrdersHarness):
    """Lines have no discount yet: the total is set as a discount would leave it, with the payment to match."""
    mug = await shared_harness.new_product(10, price_minor=1_000)
    order = await shared_harness.checked_out(None, (mug, 3))
    connection = await shared_harness.connection()
    await connection.execute(
        """
        UPDATE orders
           SET total_minor = 2999,
               lines = jsonb_set(jsonb_set(lines::jsonb, '{0,discount_minor}', '1'), '{0,total_minor}', '2999')::json
         WHERE id = $1
        """,
        order.id,
    )
    await shared_harness.pay(order.id)
    await shared_harness.settled(order.id)
    with shared_harness.acting(STAFF):
        for fulfilment in ("shipped", "delivered"):
            await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment=fulfilment))

    amounts = [(await take_back(shared_harness, order.id, (mug, 1))).amount_minor for _ in range(3)]

    assert amounts == [999, 1_000, 1_000]
    now = await shared_harness.settled(order.id)
    assert (now.payment, now.fulfilment, now.refunded_minor) == ("refunded", "returned", 2_999)
    assert (await shared_harness.bank(order.id)).net_minor == 0


async def test_goods_of_an_order_with_a_total_of_0_are_returned_without_the_provider(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10, price_minor=0)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))

    returned = await take_back(shared_harness, order.id)

    assert (returned.amount_minor, returned.status) == (0, "succeeded")
    now = await shared_harness.settled(order.id)
    assert (now.payment, now.fulfilment) == ("paid", "returned")
    assert await shared_harness.shelf(mug) == (10, 0)
    assert await shared_harness.bank_operations(order.id) == []


async def test_more_than_was_sold_is_not_returned(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    await take_back(shared_harness, order.id, (mug, 2))

    for lines in ([(mug, 2)], [(mug + 999, 1)]):
        with pytest.raises(NotReturnable) as refused:
            await take_back(shared_harness, order.id, *lines)
        assert refused.value.left == (1 if lines[0][0] == mug else 0)
    with pytest.raises(InvalidRequest):
        await take_back(shared_harness, order.id, (mug, 1), (mug, 1))

    assert await shared_harness.shelf(mug) == (9, 0)
    assert (await shared_harness.bank(order.id)).refunded_minor == 2 * MUG_MINOR


async def test_concurrent_returns_never_return_the_same_piece(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    elsewhere = await shared_harness.another_process()
    lines = (ReturnLine(product_id=mug, quantity=2),)
    with shared_harness.acting(STAFF):
        outcomes = await asyncio.gather(
            *(
                outcome_of(orders.take_back(ReturnOrder(id=order.id, lines=lines, idempotency_key=new_key())))
                for orders in (shared_harness.orders, elsewhere)
            )
        )

    assert sorted(type(o).__name__ for o in outcomes) == ["NotReturnable", "Refund"]
    assert await shared_harness.shelf(mug) == (9, 0)
    assert (await shared_harness.bank(order.id)).refunded_minor == 2 * MUG_MINOR


async def test_a_key_is_one_return_after_30_days(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    key = new_key()
    first = await take_back(shared_harness, order.id, (mug, 1), key=key, fingerprint=b"one")
    await a_month_passes(shared_harness)

    again = await take_back(shared_harness, order.id, (mug, 1), key=key, fingerprint=b"one")
    with pytest.raises(IdempotencyKeyReused):
        await take_back(shared_harness, order.id, (mug, 2), key=key, fingerprint=b"two")

    assert again == a_month_older(msgspec.structs.replace(first, replayed=True))
    assert await shared_harness.shelf(mug) == (8, 0)
    assert (await shared_harness.bank(order.id)).refunded_minor == MUG_MINOR
    assert [line.returned for line in (await shared_harness.settled(order.id)).lines] == [1]


async def test_goods_that_were_not_delivered_are_not_returned(shared_harness: OrdersHarness):
    order, _ = await paid(shared_harness)

    with pytest.raises(IllegalMove) as refused:
        await take_back(shared_harness, order.id)
    with pytest.raises(OrderNotFound):
        await take_back(shared_harness, 404)

    assert (refused.value.axis, refused.value.current) == ("fulfilment", "unfulfilled")


async def test_a_return_refunds_only_what_was_not_refunded_by_hand(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    await refund(shared_harness, (await shared_harness.payments(order.id))[0].id, TOTAL - 100)

    returned = await take_back(shared_harness, order.id)

    assert returned.amount_minor == 100
    assert (await shared_harness.bank(order.id)).net_minor == 0
    assert await shared_harness.shelf(mug) == (10, 0)


async def test_a_limited_refund_says_what_was_asked_what_was_given_and_why(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    await refund(shared_harness, (await shared_harness.payments(order.id))[0].id, TOTAL - 100)
    key = new_key()

    returned = await take_back(shared_harness, order.id, (mug, 2), key=key)
    nothing = await take_back(shared_harness, order.id, (mug, 1))

    paid = "37.50 USD was paid for the order, and"
    limits = [
        f"asked for 25.00 USD, refunded 1.00 USD: {paid} 36.50 USD of it was refunded before",
        f"asked for 12.50 USD, refunded 0.00 USD: {paid} 37.50 USD of it was refunded before",
    ]
    assert [(each.asked_minor, each.amount_minor) for each in (returned, nothing)] == [(2_500, 100), (1_250, 0)]
    assert [returned.limit_reason, nothing.limit_reason] == limits
    again = await take_back(shared_harness, order.id, (mug, 2), key=key)
    assert again == msgspec.structs.replace(returned, replayed=True)
    for actor in (STAFF, ALICE):
        assert [each.limit_reason for each in await listed(shared_harness, order.id, actor)] == ["", *limits]
        with shared_harness.acting(actor):
            history = await shared_harness.orders.history(GetHistory(id=order.id))
            timeline = await shared_harness.orders.timeline(GetTimeline(id=order.id))
        limited = [(entry.axis, entry.after, entry.limit_reason) for entry in history.entries if entry.limit_reason]
        assert limited == [
            ("fulfilment", "delivered", limits[0]),
            ("payment", "refunded", limits[0]),
            ("fulfilment", "returned", limits[1]),
        ]
        assert sorted(entry.detail for entry in timeline.entries if "asked for" in entry.detail) == sorted(
            [limits[0], limits[0], limits[1]]
        )


async def test_a_return_of_what_was_captured_in_part_says_how_much_was_paid(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (mug, 3))
    with shared_harness.acting(STAFF):
        await shared_harness.orders.pay(PayOrder(id=order.id, method="sandbox:ok", capture=False))
        [payment] = await shared_harness.payments(order.id)
        await shared_harness.orders.capture_part(CapturePart(payment_id=payment.id, amount_minor=TOTAL - 500))
        await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="shipped"))
        await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="delivered"))

    returned = await take_back(shared_harness, order.id)

    assert (returned.asked_minor, returned.amount_minor) == (TOTAL, TOTAL - 500)
    assert returned.limit_reason == "asked for 37.50 USD, refunded 32.50 USD: 32.50 USD was paid for the order"


async def test_returned_goods_of_an_unpaid_order_are_not_refunded(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered(None, (mug, 3))

    returned = await take_back(shared_harness, order.id, (mug, 1))

    assert (returned.amount_minor, returned.status) == (0, "succeeded")
    assert await shared_harness.shelf(mug) == (8, 0)
    assert (await shared_harness.settled(order.id)).payment == "unpaid"


async def test_a_move_to_returned_returns_all_that_is_left(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    await take_back(shared_harness, order.id, (mug, 1))

    with shared_harness.acting(STAFF):
        moved = await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="returned"))
        again = await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="returned"))

    async def is_refunded() -> bool:
        return (await shared_harness.raw(order.id)).order.payment == "refunded"

    assert (moved.fulfilment, again.fulfilment) == ("returned", "returned")
    await until(is_refunded)
    assert (await shared_harness.bank(order.id)).net_minor == 0
    assert await shared_harness.shelf(mug) == (10, 0)


# ------------------------------------------------------------------------------------------------------------- crashes

POINTS: Final = (
    *(f"orders.refund.{when}_commit" for when in ("before", "after")),
    *(f"refund.{call}.{when}_call" for call in ("restock", "refund") for when in ("before", "after")),
    *(f"refund.save.{when}_commit" for when in ("before", "after")),
)


@pytest.mark.parametrize("point", POINTS)
async def test_a_return_that_fails_at_any_point_is_finished_later_and_done_once(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (mug, 3))
    failing = FailAt(1)
    inject(point, failing)
    key = new_key()
    await outcome_of(take_back(shared_harness, order.id, (mug, 2), key=key, fingerprint=b"one"))
    returned = await take_back(shared_harness, order.id, (mug, 2), key=key, fingerprint=b"one")

    assert failing.arrived
    assert (returned.status, returned.amount_minor) == ("succeeded", 2 * MUG_MINOR)
    record = await shared_harness.raw(order.id)
    assert (record.order.payment, record.order.refunded_minor) == ("partially_refunded", 2 * MUG_MINOR)
    assert record.refund_pending_minor == 0
    assert await shared_harness.saga(order.id, "refund") == []
    assert await shared_harness.shelf(mug) == (9, 0)
    assert (await shared_harness.bank(order.id)).refunded_minor == 2 * MUG_MINOR


# ------------------------------------------------------------------------------------------- what a full refund forbids


@pytest.mark.parametrize("wanted", [{"fulfilment": "shipped"}, {"status": "completed"}])
async def test_what_was_refunded_before_it_left_can_only_be_cancelled(
    shared_harness: OrdersHarness, wanted: dict[str, Any]
):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:ok", (mug, 3))
    payment_id = (await shared_harness.payments(order.id))[0].id
    await refund(shared_harness, payment_id, MUG_MINOR)
    await refund(shared_harness, payment_id)

    with shared_harness.acting(STAFF), pytest.raises(IllegalMove, match="all that was paid was refunded") as refused:
        await shared_harness.orders.move(MoveOrder(id=order.id, **wanted))

    assert next(iter(wanted.values())) not in refused.value.legal
    with shared_harness.acting(STAFF):
        await shared_harness.orders.cancel(CancelOrder(id=order.id))
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment, now.fulfilment) == ("cancelled", "refunded", "unfulfilled")
    assert await shared_harness.shelf(mug) == (10, 0)
    assert (await shared_harness.bank(order.id)).net_minor == 0


async def test_what_has_left_is_delivered_and_comes_back_although_it_was_refunded(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:ok", (mug, 3))
    with shared_harness.acting(STAFF):
        await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="shipped"))
    await refund(shared_harness, (await shared_harness.payments(order.id))[0].id)

    with shared_harness.acting(STAFF):
        await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="delivered"))
    await take_back(shared_harness, order.id)

    now = await shared_harness.settled(order.id)
    assert (now.payment, now.fulfilment) == ("refunded", "returned")
    assert await shared_harness.shelf(mug) == (10, 0)


@pytest.mark.parametrize("wanted", [{"fulfilment": "shipped"}, {"status": "completed"}])
async def test_an_order_is_not_sent_while_all_of_it_is_being_refunded(
    shared_harness: OrdersHarness, inject: Inject, wanted: dict[str, Any]
):
    order, payment_id = await paid(shared_harness)
    pause = Pause()
    lift = inject("refund.refund.before_call", pause)
    asked = asyncio.ensure_future(refund(shared_harness, payment_id))
    await pause.reached.wait()

    with shared_harness.acting(STAFF), pytest.raises(PaymentInProgress):
        await shared_harness.orders.move(MoveOrder(id=order.id, **wanted))

    lift()
    pause.resume.set()
    assert (await asked).status == "succeeded"
    now = (await shared_harness.raw(order.id)).order
    assert (now.status, now.payment, now.fulfilment) == ("confirmed", "refunded", "unfulfilled")


# -------------------------------------------------------------------------------------------------------------- notes

NOTE: Final = "suspected of fraud, case 4711"


async def texts_of(harness: OrdersHarness, order_id: int, actor: Actor) -> str:
    """All that an account can read of an order."""
    with harness.acting(actor):
        shown = (
            await harness.orders.get(GetOrder(id=order_id)),
            await harness.orders.history(GetHistory(id=order_id)),
            await harness.orders.timeline(GetTimeline(id=order_id)),
            await harness.orders.refunds(ListRefunds(order_id=order_id)),
        )
    return msgspec.json.encode(shown).decode()


async def refund_with_note(harness: OrdersHarness) -> int:
    order, payment_id = await paid(harness)
    given = await refund(harness, payment_id, 100, reason="scratched", internal_note=NOTE)
    assert given.internal_note == NOTE
    return order.id


async def return_with_note(harness: OrdersHarness) -> int:
    product_id = await harness.new_product(10)
    order = await harness.delivered("sandbox:ok", (product_id, 2))
    given = await take_back(harness, order.id, (product_id, 1), reason="scratched", internal_note=NOTE)
    assert given.internal_note == NOTE
    return order.id


async def cancel_with_note(harness: OrdersHarness) -> int:
    order, _ = await paid(harness)
    with harness.acting(STAFF):
        await harness.orders.cancel(CancelOrder(id=order.id, reason="scratched", internal_note=NOTE))
    await harness.settled(order.id)
    return order.id


@pytest.mark.parametrize(
    ("act", "notes"),
    # A refund: its row, its move in history and timeline. A return with its refund: two moves in each.
    [(refund_with_note, 3), (return_with_note, 5), (cancel_with_note, 3)],
    ids=["refund", "return", "cancel"],
)
async def test_a_note_for_staff_is_shown_to_staff_alone(shared_harness: OrdersHarness, act: Any, notes: int):
    order_id = await act(shared_harness)

    to_staff, to_customer = [await texts_of(shared_harness, order_id, actor) for actor in (STAFF, ALICE)]

    assert (to_staff.count(NOTE), to_customer.count(NOTE)) == (notes, 0)
    assert "scratched" in to_customer
    of_order = [event for event in await shared_harness.events() if event.subject_id == order_id]
    assert of_order
    assert NOTE not in repr(of_order)


async def test_a_customer_gives_no_note_for_staff(shared_harness: OrdersHarness):
    order, _ = await paid(shared_harness)
    with shared_harness.acting(ALICE), pytest.raises(Forbidden):
        await shared_harness.orders.cancel(CancelOrder(id=order.id, internal_note=NOTE))
    assert (await shared_harness.settled(order.id)).status == "confirmed"


async def test_history_and_timeline_show_customers_no_accounts_of_staff(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (product_id, 1))

    def by(history: History, timeline: Timeline) -> tuple[set[tuple[str, int]], set[str]]:
        made = {(entry.actor_role, entry.actor_id) for entry in history.entries}
        return made, {entry.by for entry in timeline.entries}

    seen = {}
    for actor in (STAFF, ALICE):
        with shared_harness.acting(actor):
            seen[actor] = by(
                await shared_harness.orders.history(GetHistory(id=order.id)),
                await shared_harness.orders.timeline(GetTimeline(id=order.id)),
            )

    placed, moved, shop = ("customer", ALICE.id), ("staff", STAFF.id), ("service", 0)
    assert seen[STAFF] == ({placed, moved, shop}, {f"customer {ALICE.id}", f"staff {STAFF.id}", "service"})
    assert seen[ALICE] == ({placed, ("staff", 0), shop}, {f"customer {ALICE.id}", "staff", "service"})


# ------------------------------------------------------------------------------------------------------------- listing


async def listed(harness: OrdersHarness, order_id: int, actor: Actor = STAFF) -> tuple[Refund, ...]:
    with harness.acting(actor):
        return (await harness.orders.refunds(ListRefunds(order_id=order_id))).refunds


async def test_refunds_and_returns_are_listed_by_time_as_they_were_answered(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.delivered("sandbox:ok", (product_id, 3))
    [payment] = await shared_harness.payments(order.id)

    part = await refund(shared_harness, payment.id, 100, reason="scratched")
    back = await take_back(shared_harness, order.id, (product_id, 1), reason="too small")

    first, second = await listed(shared_harness, order.id)
    assert first == part
    assert second == msgspec.structs.replace(back, payment_id=payment.id)
    assert [(each.asked_minor, each.limit_reason) for each in (first, second)] == [(100, ""), (MUG_MINOR, "")]
    assert (first.amount_minor, first.reason, first.payment_id) == (100, "scratched", payment.id)
    assert [line.quantity for line in second.lines] == [1]
    assert {(each.actor_role, each.actor_id, each.status) for each in (first, second)} == {
        (STAFF.role, STAFF.id, "succeeded")
    }
    for each in (first, second):
        assert each.created_at is not None
        assert each.settled_at is not None
        assert each.created_at <= each.settled_at
    with shared_harness.acting(STAFF):
        of_payment = await shared_harness.orders.payment_refunds(ListPaymentRefunds(payment_id=payment.id))
    assert of_payment.refunds == (first, second)


async def test_customers_see_the_refunds_of_their_orders_without_the_accounts_of_staff(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    given = await refund(shared_harness, payment_id, 100)

    [seen] = await listed(shared_harness, order.id, ALICE)

    assert given.actor_id == STAFF.id
    assert seen == msgspec.structs.replace(given, actor_id=0)
    with pytest.raises(OrderNotFound):
        await listed(shared_harness, order.id, BOB)
    with shared_harness.acting(BOB), pytest.raises(PaymentNotFound):
        await shared_harness.orders.payment_refunds(ListPaymentRefunds(payment_id=payment_id))


async def one(harness: OrdersHarness, refund_id: str, actor: Actor, order_id: int | None = None) -> Refund:
    with harness.acting(actor):
        return await harness.orders.one_refund(GetRefund(id=refund_id, order_id=order_id))


async def test_one_refund_is_read_by_staff_and_by_the_customer_of_its_order(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    first = await refund(shared_harness, payment_id, 100, internal_note="called the bank")
    other = await refund(shared_harness, payment_id, 200)

    assert await one(shared_harness, first.id, STAFF) == first
    assert await one(shared_harness, other.id, STAFF, order.id) == other
    assert await one(shared_harness, first.id, ALICE) == msgspec.structs.replace(first, actor_id=0, internal_note="")
    for refund_id, actor, order_id in ((first.id, BOB, None), (first.id, BOB, order.id), ("0" * 24, ALICE, None)):
        with pytest.raises(RefundNotFound) as refused:
            await one(shared_harness, refund_id, actor, order_id)
        assert refused.value.refund_id == refund_id


async def test_the_refunds_that_each_order_has_are_read_with_the_order(shared_harness: OrdersHarness):
    mug = await shared_harness.new_product(10)
    for _ in range(2):
        order = await shared_harness.delivered("sandbox:ok", (mug, 1))
        with shared_harness.acting(STAFF):
            await shared_harness.orders.move(MoveOrder(id=order.id, fulfilment="returned"))
        await until(lambda id_=order.id: is_settled(shared_harness, id_))

        rest = await one(shared_harness, "rest", ALICE, order.id)

        assert (rest.order_id, rest.amount_minor, rest.status) == (order.id, MUG_MINOR, "succeeded")
    with pytest.raises(RefundNotFound):
        await one(shared_harness, "rest", STAFF)


async def is_settled(harness: OrdersHarness, order_id: int) -> bool:
    return all(refund.status != "pending" for refund in await listed(harness, order_id))


async def test_an_order_of_which_nothing_was_given_back_has_no_refunds(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    assert await listed(shared_harness, order.id, ALICE) == ()
    with shared_harness.acting(ALICE):
        of_payment = await shared_harness.orders.payment_refunds(ListPaymentRefunds(payment_id=payment_id))
    assert of_payment.refunds == ()


async def test_what_cancelling_has_given_back_is_listed_with_the_refunds_before_it(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    part = await refund(shared_harness, payment_id, 1_000)
    with shared_harness.acting(ALICE):
        await shared_harness.orders.cancel(CancelOrder(id=order.id, reason="ordered twice"))
    await shared_harness.settled(order.id)

    first, rest = await listed(shared_harness, order.id)

    assert first == part
    assert (rest.id, rest.amount_minor, rest.status, rest.reason) == (
        "cancel",
        TOTAL - 1_000,
        "succeeded",
        "ordered twice",
    )
    assert (rest.payment_id, rest.actor_role, rest.actor_id) == (payment_id, ALICE.role, ALICE.id)
    assert rest.settled_at is not None
    assert sum(each.amount_minor for each in (first, rest)) == (await shared_harness.bank(order.id)).refunded_minor


async def test_goods_that_come_back_unpaid_are_listed_without_a_payment(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.delivered(None, (product_id, 2))
    await take_back(shared_harness, order.id, (product_id, 1))

    [back] = await listed(shared_harness, order.id)

    assert (back.amount_minor, back.payment_id, [line.quantity for line in back.lines]) == (0, None, [1])


async def test_a_declined_refund_is_listed_with_why(shared_harness: OrdersHarness):
    order, payment_id = await paid(shared_harness)
    await shared_harness.rows(
        "UPDATE charges SET refunded_minor = captured_minor WHERE order_id = $1", order.id, of="sandbox"
    )
    given = await refund(shared_harness, payment_id, 100)

    [declined] = await listed(shared_harness, order.id)

    assert declined == given
    assert (declined.status, declined.code) == ("declined", "payments.refund_declined")
    assert declined.payment_id == payment_id
