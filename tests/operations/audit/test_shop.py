"""What the services really do passes the audit: orders that are paid, declined, cancelled, and wait."""

from __future__ import annotations

import asyncio

from mercato.chassis.contract import Actor
from mercato.contracts.orders import AwaitOrder, CancelOrder, GetOrder, Orders, PlaceLine, PlaceOrder, RefundOrder
from mercato.contracts.payments import ListPayments, Payments
from mercato.operations.audit.checking import audit
from mercato.operations.audit.tables import SUBSCRIPTIONS
from mercato.testing.cluster import Cluster
from mercato.testing.shop import Shop

METHODS = ("sandbox:ok", "sandbox:lost_answer", "sandbox:declined", "sandbox:capture_expired", None)


async def test_a_shop_that_was_busy_passes_while_it_runs_and_when_it_stands_still(cluster: Cluster):
    shop = await Shop.start(cluster)
    try:
        with shop.harness.acting(Actor("staff")):
            orders = [await place(shop, method) for method in METHODS * 3]
            await cancel_some(shop, orders)
            await refund_one(shop, orders[0])
            reached = {await state(shop, order_id) for order_id in orders}
        running = await audit(cluster.server.admin_dsn, shop.harness.dsns)
        still = await until_consistent(cluster, shop)
    finally:
        await shop.close()

    assert reached == {
        ("confirmed", "paid"), ("confirmed", "partially_refunded"), ("cancelled", "refunded"),
        ("cancelled", "unpaid"), ("pending", "unpaid"),
    }  # fmt: skip
    assert [(found.name, found.rows) for found in running.violated] == []
    assert still == []


async def test_the_audit_knows_every_consumer_and_what_it_wants(cluster: Cluster):
    shop = await Shop.start(cluster)
    try:
        subscriptions = [each for service in shop.harness.host.services.values() for each in service.subscriptions]
    finally:
        await shop.close()

    assert {each.consumer: each.types for each in subscriptions} == {
        consumer: None if types is None else frozenset(types) for consumer, types in SUBSCRIPTIONS.items()
    }


async def state(shop: Shop, order_id: int) -> tuple[str, str]:
    order = await shop.harness.client(Orders).get(GetOrder(id=order_id))
    return order.status, order.payment


async def place(shop: Shop, method: str | None) -> int:
    orders = shop.harness.client(Orders)
    placed = await orders.place(PlaceOrder(user_id=1, lines=(PlaceLine(product_id=100),), payment_method=method))
    await orders.settled(AwaitOrder(id=placed.order.id, wait_ms=20_000))
    return placed.order.id


async def cancel_some(shop: Shop, orders: list[int]) -> None:
    for order_id in (orders[4], orders[5]):
        await shop.harness.client(Orders).cancel(CancelOrder(id=order_id))
        await shop.harness.client(Orders).settled(AwaitOrder(id=order_id, wait_ms=20_000))


async def refund_one(shop: Shop, order_id: int) -> None:
    [payment] = (await shop.harness.client(Payments).list(ListPayments(order_id=order_id))).payments
    await shop.harness.client(Orders).refund(RefundOrder(payment_id=payment.id, idempotency_key="r", amount_minor=1))


async def until_consistent(cluster: Cluster, shop: Shop) -> list[object]:
    """What is still violated after a while: events are consumed a moment after the changes that they report."""
    found: list[object] = []
    for _ in range(120):
        report = await audit(cluster.server.admin_dsn, shop.harness.dsns, settled_seconds=0)
        found = [(finding.name, finding.rows) for finding in report.violated]
        if not found:
            break
        await asyncio.sleep(0.5)
    return found
