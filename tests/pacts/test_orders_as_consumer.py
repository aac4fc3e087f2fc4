"""What orders needs of users, products, inventory and payments: the real service, whose providers Pact plays."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor, InvalidRequest
from mercato.contracts.inventory import HoldPage, Inventory
from mercato.contracts.order_refusals import PaymentDeclined
from mercato.contracts.orders import (
    NAMED_BY_SKU,
    AwaitOrder,
    CancelOrder,
    CapturePart,
    ClaimOrder,
    GetTimeline,
    MoveOrder,
    MovePayment,
    Order,
    Orders,
    PaidOrder,
    PayOrder,
    PlacedOrder,
    PlaceLine,
    PlaceOrder,
    RefundOrder,
    ReturnOrder,
)
from mercato.contracts.payments import CheckedMethod
from mercato.contracts.products import ProductArchived, ProductNotFound, SkuNotFound
from mercato.contracts.users import UserNotFound
from mercato.services.orders.reconciling import HoldReconciling
from mercato.testing.actors import SERVICE, STAFF
from mercato.testing.cluster import Cluster
from mercato.testing.waiting import until
from pacts import orders_needs as needs
from pacts.book import PactBook
from pacts.consumers import ConsumerHarness
from pacts.rpc import Idle

CONSUMER: Final = "orders"

pytestmark = pytest.mark.asyncio(loop_scope="session")

BUYER: Final = Actor("customer", needs.BUYER)
SETTLED_MS: Final = 20_000


class OrdersConsumer(ConsumerHarness):
    """`orders` is the client. The buyer is `needs.BUYER`."""

    async def start(self) -> None:
        await super().start()
        self.orders = self.client(Orders)

    async def place(self, method: str | None = None, actor: Actor = BUYER, **fields: Any) -> PlacedOrder:
        lines = fields.pop("lines", (PlaceLine(product_id=needs.MUG, quantity=needs.QUANTITY),))
        with self.acting(actor):
            return await self.orders.place(
                PlaceOrder(user_id=needs.BUYER, lines=lines, payment_method=method, **fields)
            )

    async def settled(self, order_id: int) -> Order:
        with self.acting(STAFF):
            return await self.orders.settled(AwaitOrder(id=order_id, wait_ms=SETTLED_MS))

    async def checked_out(self, method: str | None = None, actor: Actor = BUYER, **fields: Any) -> Order:
        """An order whose checkout has come to rest."""
        return await self.settled((await self.place(method, actor, **fields)).order.id)

    async def next_id(self, order_id: int) -> None:
        """The next order has this id, that of the example of a payment."""
        await self.values("SELECT setval('orders_id_seq', $1, false)", order_id)

    async def paid(self, order_id: int) -> Order:
        """A paid order."""
        await self.next_id(order_id)
        async with self.expects(*PAID):
            return await self.checked_out(needs.METHOD)

    async def authorized(self, order_id: int) -> Order:
        """An order of staff's whose payment waits for its capture."""
        await self.next_id(order_id)
        async with self.expects(needs.BUYER_FOUND, needs.QUOTE, needs.HELD_FOR_STAFF):
            order = await self.checked_out(actor=STAFF)
        pays = needs.listed(7_314, "the authorized payment of an order is listed", "authorized")
        async with self.expects(needs.HELD_BY_STAFF_FOR_PAYMENT, needs.AUTHORIZED, needs.SOLD, pays):
            with self.acting(STAFF):
                await self.orders.pay(PayOrder(id=order.id, method=needs.METHOD, capture=False))
            return await self.settled(order.id)


PAID: Final = (
    needs.BUYER_FOUND,
    needs.QUOTE,
    needs.HELD_FOR_PAYMENT,
    needs.CHARGED,
    needs.SOLD,
)
HELD: Final = (needs.BUYER_FOUND, needs.QUOTE, needs.HELD)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def consumer(cluster: Cluster, book: PactBook) -> AsyncGenerator[OrdersConsumer]:
    idle: dict[str, Idle] = {
        "inventory.holds": lambda _: HoldPage(holds=()),
        "payments.check_method": lambda request: CheckedMethod(method=request.method or needs.METHOD),
    }
    async with OrdersConsumer(cluster, "orders", book, idle).running(orders_reconcile_seconds=3_600) as made:
        yield made


async def test_an_order_is_placed_and_paid_at_once(consumer: OrdersConsumer):
    async with consumer.expects(*PAID):
        order = await consumer.checked_out(needs.METHOD)
    assert (order.status, order.payment, order.total_minor) == ("confirmed", "paid", needs.TOTAL_MINOR)


async def test_an_order_that_is_not_paid_holds_its_stock(consumer: OrdersConsumer):
    async with consumer.expects(*HELD):
        order = await consumer.checked_out()
    assert (order.status, order.payment) == ("pending", "unpaid")


async def test_an_order_by_sku_has_the_product_of_the_sku(consumer: OrdersConsumer):
    line = PlaceLine(product_id=NAMED_BY_SKU, quantity=needs.QUANTITY, sku=f"PACT-{needs.MUG}")
    async with consumer.expects(needs.FOUND_BY_SKU, *HELD):
        order = await consumer.checked_out(lines=(line,))
    assert order.lines[0].product_id == needs.MUG


async def test_an_order_of_an_unknown_sku_is_refused(consumer: OrdersConsumer):
    line = PlaceLine(product_id=NAMED_BY_SKU, sku="NO-SUCH-SKU")
    async with consumer.expects(needs.SKU_UNKNOWN):
        with pytest.raises(SkuNotFound):
            await consumer.place(lines=(line,))


async def test_an_order_of_an_unknown_buyer_is_refused(consumer: OrdersConsumer):
    async with consumer.expects(needs.BUYER_UNKNOWN, needs.QUOTE):
        with pytest.raises(UserNotFound):
            await consumer.place(actor=STAFF)


async def test_an_order_of_an_unknown_product_is_refused(consumer: OrdersConsumer):
    async with consumer.expects(needs.BUYER_FOUND, needs.QUOTE_OF_NOTHING):
        with pytest.raises(ProductNotFound):
            await consumer.place()


async def test_an_order_of_an_archived_product_is_refused(consumer: OrdersConsumer):
    async with consumer.expects(needs.BUYER_FOUND, needs.QUOTE_OF_ARCHIVED):
        with pytest.raises(ProductArchived):
            await consumer.place()


async def test_a_payment_method_is_checked_before_the_order_is_placed(consumer: OrdersConsumer):
    # Orders remembers methods for a minute: no other test names this one.
    method = "sandbox:insufficient_funds"
    declined = needs.charge(
        7_319,
        "a charge without funds is declined",
        needs.payment(7_319, "failed", code="insufficient_funds", **needs.NOTHING_TAKEN),
        method,
    )
    known = (needs.BUYER_FOUND, needs.QUOTE, needs.checked(method), needs.HELD_FOR_PAYMENT)
    async with consumer.expects(*known, declined):
        order = await consumer.checked_out(method)
    assert order.payment == "unpaid"


async def test_an_order_is_paid_by_the_default_method(consumer: OrdersConsumer):
    async with consumer.expects(*HELD):
        order = await consumer.checked_out()
    pays = needs.listed(7_320, "the payment by the default method is listed", "captured", **needs.CAPTURED)
    async with consumer.expects(needs.checked(None), needs.HELD_FOR_PAYMENT, needs.CHARGED, needs.SOLD, pays):
        with consumer.acting(BUYER):
            paid = await consumer.orders.pay(PayOrder(id=order.id))
    assert paid.payment.status == "captured"


async def test_an_order_with_an_unknown_payment_method_is_refused(consumer: OrdersConsumer):
    async with consumer.expects(needs.METHOD_UNKNOWN):
        with pytest.raises(InvalidRequest):
            await consumer.place("nobank:x")


async def test_an_order_without_stock_is_cancelled_and_says_what_there_is(consumer: OrdersConsumer):
    async with consumer.expects(needs.BUYER_FOUND, needs.QUOTE, needs.OUT_OF_STOCK, needs.RELEASE_OF_NOTHING):
        order = await consumer.checked_out()
    assert order.reason is not None
    assert order.reason.code == "out_of_stock"
    assert [line.available for line in order.reason.lines] == [1]


async def test_an_order_above_the_bound_of_its_customer_is_cancelled_and_says_the_bound(consumer: OrdersConsumer):
    async with consumer.expects(needs.BUYER_FOUND, needs.QUOTE, needs.HOLD_LIMIT, needs.RELEASE_OF_NOTHING):
        order = await consumer.checked_out()
    assert order.reason is not None
    assert order.reason.code == "hold_limit"
    assert "at most 10 pieces" in order.reason.message


async def test_an_order_whose_stock_was_released_before_is_cancelled(consumer: OrdersConsumer):
    known = (needs.BUYER_FOUND, needs.QUOTE)
    async with consumer.expects(*known, needs.HOLD_EXPIRED, needs.RELEASE_OF_NOTHING, needs.VOID_OF_NOTHING):
        order = await consumer.checked_out(needs.METHOD)
    assert order.reason is not None
    assert order.reason.code == "stock_lost"


async def test_an_order_whose_id_another_order_had_is_cancelled(consumer: OrdersConsumer):
    known = (needs.BUYER_FOUND, needs.QUOTE)
    async with consumer.expects(*known, needs.RESERVED_BY_ANOTHER, needs.RELEASE_OF_NOTHING, needs.VOID_OF_NOTHING):
        order = await consumer.checked_out(needs.METHOD)
    assert order.reason is not None
    assert order.reason.code == "stock_lost"


async def test_an_order_whose_payment_is_declined_says_why(consumer: OrdersConsumer):
    method = "sandbox:declined"
    known = (needs.BUYER_FOUND, needs.QUOTE, needs.HELD_FOR_PAYMENT, needs.DECLINED)
    async with consumer.expects(*known):
        order = await consumer.checked_out(method)
    assert (order.status, order.payment) == ("pending", "unpaid")
    pays = needs.listed(7_315, "the failed payment of an order is listed", "failed", code="card_declined")
    async with consumer.expects(pays):
        with consumer.acting(BUYER), pytest.raises(PaymentDeclined) as raised:
            await consumer.orders.settled(AwaitOrder(id=order.id, wait_ms=SETTLED_MS, refusals=True))
    assert raised.value.provider_code == "card_declined"


async def test_an_order_whose_stock_cannot_be_sold_gets_its_money_back(consumer: OrdersConsumer):
    known = (needs.BUYER_FOUND, needs.QUOTE, needs.HELD_FOR_PAYMENT, needs.CHARGED)
    undone = (needs.SALE_OF_RELEASED, needs.VOID_OF_CAPTURED, needs.REFUND_BY_CANCELLING, needs.RELEASE_OF_NOTHING)
    async with consumer.expects(*known, *undone):
        order = await consumer.checked_out(needs.METHOD)
    assert order.reason is not None
    assert order.reason.code == "stock_lost"


async def test_an_order_waits_for_a_charge_that_is_processing(consumer: OrdersConsumer):
    method = "sandbox:slow:60000"
    known = (needs.BUYER_FOUND, needs.QUOTE, needs.HELD_FOR_PAYMENT, needs.CHARGE_PENDING)
    async with consumer.expects(*known):
        order = (await consumer.place(method)).order
        await until_saga(consumer, order.id, "reserve", "tries > 0")
    await forget(consumer, order.id)


async def until_saga(consumer: OrdersConsumer, order_id: int, step: str, condition: str) -> None:
    async def is_so() -> bool:
        return await consumer.values(f"SELECT step FROM sagas WHERE subject_id = $1 AND {condition}", order_id) == [
            step
        ]

    await until(is_so)


async def forget(consumer: OrdersConsumer, order_id: int) -> None:
    """Nothing continues this order beside the next tests."""
    await consumer.rows("DELETE FROM sagas WHERE subject_id = $1 RETURNING 1", order_id)


async def test_staff_authorize_a_payment(consumer: OrdersConsumer):
    order = await consumer.authorized(7_400_000)
    assert (order.status, order.payment) == ("confirmed", "authorized")


async def test_staff_capture_a_payment(consumer: OrdersConsumer):
    order = await consumer.authorized(7_401_000)
    payment = needs.read(order.id, "authorized", "capture it")
    async with consumer.expects(payment, needs.SOLD, needs.CAPTURE):
        with consumer.acting(STAFF):
            await consumer.orders.capture(MovePayment(payment_id=order.id))
        captured = await consumer.settled(order.id)
    assert captured.payment == "paid"


async def test_staff_capture_a_part_of_a_payment(consumer: OrdersConsumer):
    order = await consumer.authorized(7_402_000)
    payment = needs.read(order.id, "authorized", "capture a part")
    async with consumer.expects(payment, needs.SOLD, needs.CAPTURE_PART):
        with consumer.acting(STAFF):
            await consumer.orders.capture_part(CapturePart(payment_id=order.id, amount_minor=needs.PART_MINOR))
        captured = await consumer.settled(order.id)
    assert (captured.payment, captured.waived_minor) == ("paid", needs.TOTAL_MINOR - needs.PART_MINOR)


async def test_staff_void_a_payment_and_the_goods_are_restocked(consumer: OrdersConsumer):
    order = await consumer.authorized(7_403_000)
    payment = needs.read(order.id, "authorized", "void it")
    undone = (needs.VOIDED, needs.RELEASE_OF_SOLD, needs.RESTOCKED)
    async with consumer.expects(payment, *undone):
        with consumer.acting(STAFF):
            await consumer.orders.void(MovePayment(payment_id=order.id))
        voided = await consumer.settled(order.id)
    assert (voided.status, voided.payment) == ("cancelled", "voided")


async def test_a_buyer_pays_an_order_that_was_placed_before(consumer: OrdersConsumer):
    async with consumer.expects(*HELD):
        order = await consumer.checked_out()
    pays = needs.listed(7_316, "the captured payment of an order is listed", "captured", **needs.CAPTURED)
    async with consumer.expects(needs.HELD_FOR_PAYMENT, needs.CHARGED, needs.SOLD, pays):
        with consumer.acting(BUYER):
            paid = await consumer.orders.pay(PayOrder(id=order.id, method=needs.METHOD))
    assert isinstance(paid, PaidOrder)
    assert paid.payment.status == "captured"


async def test_a_buyer_cancels_and_the_held_stock_is_released(consumer: OrdersConsumer):
    async with consumer.expects(*HELD):
        order = await consumer.checked_out()
    async with consumer.expects(needs.RELEASED):
        with consumer.acting(BUYER):
            await consumer.orders.cancel(CancelOrder(id=order.id))
        cancelled = await consumer.settled(order.id)
    assert cancelled.status == "cancelled"


async def test_staff_refund_a_payment(consumer: OrdersConsumer):
    order = await consumer.paid(7_404_000)
    payment = needs.read(order.id, "captured", "refund it", **needs.CAPTURED)
    async with consumer.expects(payment, needs.REFUND):
        with consumer.acting(STAFF):
            refund = await consumer.orders.refund(RefundOrder(payment_id=order.id, idempotency_key=f"r{order.id}"))
    assert (refund.status, refund.amount_minor) == ("succeeded", needs.TOTAL_MINOR)


async def test_a_refund_that_the_provider_declines_says_so(consumer: OrdersConsumer):
    order = await consumer.paid(7_405_000)
    payment = needs.read(order.id, "captured", "refund too much", **needs.CAPTURED)
    async with consumer.expects(payment, needs.REFUND_TOO_LARGE):
        with consumer.acting(STAFF):
            refund = await consumer.orders.refund(RefundOrder(payment_id=order.id, idempotency_key=f"r{order.id}"))
    assert (refund.status, refund.code) == ("declined", "payments.refund_too_large")


async def test_goods_that_come_back_are_restocked_and_refunded(consumer: OrdersConsumer):
    order = await consumer.paid(7_406_000)
    with consumer.acting(STAFF):
        for fulfilment in ("shipped", "delivered"):
            await consumer.orders.move(MoveOrder(id=order.id, fulfilment=fulfilment))
    async with consumer.expects(needs.TAKEN_BACK, needs.REFUND):
        with consumer.acting(STAFF):
            refund = await consumer.orders.take_back(ReturnOrder(id=order.id, idempotency_key=f"t{order.id}"))
    assert refund.status == "succeeded"


async def test_the_timeline_of_an_order_has_its_stock_and_its_money(consumer: OrdersConsumer):
    order = await consumer.paid(7_407_000)
    async with consumer.expects(needs.STOCK_TRACED, needs.PAYMENTS_TRACED):
        with consumer.acting(STAFF):
            timeline = await consumer.orders.timeline(GetTimeline(id=order.id))
    assert {entry.part for entry in timeline.entries} == {"order", "stock", "money"}


async def test_an_account_claims_the_order_of_a_guest(consumer: OrdersConsumer):
    async with consumer.expects(needs.QUOTE, needs.HELD_FOR_GUEST):
        placed = await consumer.place(actor=Actor("anonymous"), guest=True)
        await consumer.settled(placed.order.id)
    assert placed.access_token is not None
    async with consumer.expects(needs.CLAIMANT, needs.ASSIGNED):
        with consumer.acting(BUYER):
            claimed = await consumer.orders.claim(ClaimOrder(id=placed.order.id, access_token=placed.access_token))
    assert claimed.user_id == needs.BUYER


async def test_stock_that_is_held_for_no_order_is_released(consumer: OrdersConsumer):
    service = consumer.host.services["orders"]
    inventory = consumer.host.client(Inventory, "orders")
    reconciling = HoldReconciling(service.database, inventory, consumer.host.telemetry, quiet_seconds=0.0)
    async with consumer.expects(needs.HOLDS, needs.RELEASED):
        with consumer.acting(SERVICE):
            assert await reconciling.release_page(None) is None
