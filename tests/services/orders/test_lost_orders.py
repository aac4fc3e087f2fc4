"""The database of orders alone was restored from an older backup, and a customer repeats a request with its key: what
was charged for the lost order is not charged again."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pytest

from mercato.chassis.contract import ANONYMOUS_ACTOR, RequestInProgress
from mercato.contracts.order_refusals import OrderLost, PaymentDeclined
from mercato.contracts.orders import CancelOrder, GetOrder, Order, PlacedOrder, PlaceLine, PlaceOrder
from mercato.operations.ids import advance
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import quote
from services.orders.harness import MUG_MINOR, OrdersHarness, basket

FORGET: Final = "TRUNCATE orders, order_products, history, refunds, payment_keys, sagas RESTART IDENTITY"
PIECES: Final = 10


async def restore(harness: OrdersHarness, **how: Any) -> None:
    """As the next start of a shop finds it whose orders are as they were before the first one."""
    await (await harness.connection()).execute(FORGET)
    await advance(harness.dsns, **how)


def keyed(product_id: int, key: str = "key", **fields: Any) -> PlaceOrder:
    return basket(
        (product_id, 2), **{"payment_method": "sandbox:ok", "idempotency_key": key, "fingerprint": b"one", **fields}
    )


async def charges(harness: OrdersHarness) -> list[tuple[int, int]]:
    """Of the bank: order and amount of each charge that succeeded."""
    done = "SELECT order_id, amount_minor FROM operations WHERE kind = 'charge' AND status = 'succeeded' ORDER BY id"
    return [(order_id, amount) for order_id, amount in await harness.rows(done, of="sandbox")]


async def test_the_repeated_key_gives_the_paid_order_its_id_again_and_charges_nothing(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id))).id)
    await restore(harness)

    new = await harness.settled((await harness.place(keyed(product_id))).id)

    assert (new.id, new.status, new.payment) == (old.id, "confirmed", "paid")
    assert await charges(harness) == [(old.id, 2 * MUG_MINOR)]
    assert await harness.shelf(product_id) == (PIECES - 2, 0)
    with harness.acting(ALICE):
        replayed = await harness.orders.place(keyed(product_id))
    assert (replayed.order.id, replayed.replayed) == (old.id, True)


async def test_an_order_that_was_paid_after_it_was_placed_is_found_by_the_key_that_placed_it(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    request = keyed(product_id, payment_method=None)
    old = await harness.place(request)
    with pytest.raises(PaymentDeclined):
        await harness.pay(old.id, "sandbox:declined")
    await harness.pay(old.id, "sandbox:ok")
    await harness.settled(old.id)
    await restore(harness)

    new = await harness.settled((await harness.place(request)).id)

    assert (new.id, new.payment) == (old.id, "paid")
    assert await charges(harness) == [(old.id, 2 * MUG_MINOR)]


async def test_orders_of_other_keys_and_without_one_are_new_in_the_same_batch(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id))).id)
    await restore(harness)
    without_key = basket((product_id, 1), payment_method="sandbox:ok")

    answers = await harness.place_many([keyed(product_id, "another"), keyed(product_id), without_key])

    ids = [answer.order.id for answer in answers if isinstance(answer, PlacedOrder)]
    assert ids[1] == old.id
    assert len(set(ids)) == 3
    assert [(await harness.settled(i)).payment for i in ids] == ["paid"] * 3
    assert sorted(order_id for order_id, _ in await charges(harness)) == sorted([*ids])


async def test_the_key_of_another_account_is_another_order(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id))).id)
    await restore(harness)

    bobs = await harness.place(msgspec.structs.replace(keyed(product_id), user_id=BOB.id), BOB)

    assert bobs.id > old.id
    assert (await harness.settled(bobs.id)).payment == "paid"


async def test_a_guest_gets_the_same_access_token_again(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    request = msgspec.structs.replace(keyed(product_id), guest=True)
    with harness.acting(ANONYMOUS_ACTOR):
        old = await harness.orders.place(request)
    await harness.settled(old.order.id)
    await restore(harness)

    with harness.acting(ANONYMOUS_ACTOR):
        new = await harness.orders.place(request)
        seen = await harness.orders.get(GetOrder(id=new.order.id, access_token=old.access_token))

    assert (new.order.id, new.access_token) == (old.order.id, old.access_token)
    assert seen.id == old.order.id
    await harness.settled(new.order.id)
    assert await charges(harness) == [(old.order.id, 2 * MUG_MINOR)]


async def test_an_order_whose_payment_failed_is_placed_as_a_new_one(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id, payment_method="sandbox:declined"))).id)
    await restore(harness)

    new = await harness.settled((await harness.place(keyed(product_id))).id)

    assert new.id > old.id
    assert new.payment == "paid"
    assert await charges(harness) == [(new.id, 2 * MUG_MINOR)]


async def cancel(harness: OrdersHarness, order: Order, product_id: int) -> None:
    with harness.acting(ALICE):
        await harness.orders.cancel(CancelOrder(id=order.id))
    await harness.settled(order.id)


async def reprice(harness: OrdersHarness, order: Order, product_id: int) -> None:
    harness.products.answers[product_id] = quote(product_id, MUG_MINOR + 1)


async def claim(harness: OrdersHarness, order: Order, product_id: int) -> None:
    await (await harness.connection("payments")).execute("UPDATE payments SET user_id = 77")


async def authorize(harness: OrdersHarness, order: Order, product_id: int) -> None:
    sql = "UPDATE payments SET status = 'authorized', captured_minor = 0"
    await (await harness.connection("payments")).execute(sql)


@pytest.mark.parametrize(
    ("meanwhile", "field"),
    [(cancel, "payment"), (reprice, "total"), (claim, "user_id"), (authorize, "payment")],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_what_is_not_the_order_that_was_paid_is_refused_and_names_in_what(
    harness: OrdersHarness, meanwhile: Any, field: str
):
    product_id = await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id))).id)
    [payment] = await harness.payments(old.id)
    await meanwhile(harness, old, product_id)
    await restore(harness)

    with pytest.raises(OrderLost) as refused:
        await harness.place(keyed(product_id))

    assert (refused.value.order_id, refused.value.payment_id, refused.value.field) == (old.id, payment.id, field)
    assert await charges(harness) == [(old.id, 2 * MUG_MINOR)]
    assert await harness.values("SELECT count(*) FROM orders") == [0]


async def test_other_lines_with_the_same_total_are_refused(harness: OrdersHarness):
    product_id, other_id = await harness.new_product(PIECES), await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id))).id)
    await restore(harness)
    lines = (PlaceLine(product_id=other_id, quantity=2),)

    with pytest.raises(OrderLost) as refused:
        await harness.place(msgspec.structs.replace(keyed(product_id), lines=lines, fingerprint=b"two"))

    assert (refused.value.order_id, refused.value.field) == (old.id, "lines")


async def test_an_id_that_another_order_has_by_now_is_not_taken_from_it(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    old = await harness.settled((await harness.place(keyed(product_id))).id)
    await restore(harness)
    other = await harness.place(basket((product_id, 1)))
    await (await harness.connection()).execute(f"UPDATE orders SET id = {old.id} WHERE id = {other.id}")

    with pytest.raises(OrderLost) as refused:
        await harness.place(keyed(product_id))

    assert refused.value.field == "id"


async def test_a_charge_whose_outcome_is_not_known_yet_has_the_request_sent_again(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    await harness.settled((await harness.place(keyed(product_id))).id)
    await (await harness.connection("payments")).execute(
        "UPDATE payments SET status = 'pending', captured_minor = 0, authorized_minor = 0"
    )
    await restore(harness)

    with pytest.raises(RequestInProgress):
        await harness.place(keyed(product_id))

    with harness.acting(STAFF):
        assert await harness.values("SELECT count(*) FROM orders") == [0]


async def test_a_list_of_lost_orders_is_longer_than_a_page(harness: OrdersHarness):
    product_id = await harness.new_product(PIECES)
    old = [await harness.settled((await harness.place(keyed(product_id, f"key-{n}"))).id) for n in range(5)]
    await restore(harness, listed_at_once=2)

    lost = await harness.values("SELECT order_id FROM lost_orders ORDER BY order_id")

    assert lost == [order.id for order in old]
