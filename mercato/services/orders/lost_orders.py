"""Requests that repeat a lost order by its key, after the database of orders alone was restored from an older backup.

The nonce of an order is derived from its key (`placing.py`), and the table `lost_orders` has the nonces of all orders
that payments knew when the restore was detected. Before such an order is written, this asks payments and inventory for
the former one:

    charged, and the same      it is written again under its former id: all further calls find what was done for it
    charged, not the same      refused (`OrderLost`): user, total or lines differ by now, or the money was
                               moved since; staff settle it by what the audit lists (M6)
    no money was taken         it is placed as a new order
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from mercato.chassis.contract import RequestInProgress, ServiceError, as_service
from mercato.chassis.postgres.database import Database
from mercato.contracts.inventory import Inventory, StockTrace, TraceStock
from mercato.contracts.order_refusals import OrderLost
from mercato.contracts.payments import ListPayments, Payment, Payments

from . import lost_order_store
from .steps import Checkout, decoded, encoded
from .store import NewOrder

ANEW = 0
"""The former id of an order that was compared with the lost ones, and is none of them."""


class LostOrders:
    """Asks payments and inventory for orders that were lost."""

    def __init__(self, database: Database, *, inventory: Inventory, payments: Payments) -> None:
        self._database = database
        self._inventory = inventory
        self._payments = payments

    async def recognise(self, orders: Sequence[NewOrder]) -> Mapping[int, NewOrder | ServiceError]:
        """By nonce, the lost ones: the order to write, or the reason why it is not placed.

        An error is `OrderLost`, `RequestInProgress`, or what payments or inventory answer.
        """
        async with self._database.read() as tx:
            lost = await lost_order_store.lost(tx, [new.nonce for new in orders])
        found = [new for new in orders if new.nonce in lost]
        answers = await asyncio.gather(*(self._recognise(new, lost[new.nonce]) for new in found))
        return {new.nonce: answer for new, answer in zip(found, answers, strict=True)}

    async def _recognise(self, new: NewOrder, lost: lost_order_store.LostRow) -> NewOrder | ServiceError:
        order_id, nonce = lost.order_id, lost.nonce
        try:
            with as_service():
                page, stock = await asyncio.gather(
                    self._payments.list(ListPayments(order_id=order_id, order_nonce=nonce, limit=200)),
                    self._inventory.trace(TraceStock(order_id=order_id, order_nonce=nonce)),
                )
        except ServiceError as error:
            return error
        payment = next((each for each in page.payments if each.status != "failed"), None)
        if payment is None:
            return msgspec.structs.replace(new, former_id=ANEW)
        if payment.status == "pending":
            return RequestInProgress()  # the sweep of payments asks the provider for its outcome
        if differing := _differing(new, payment, stock) or ("id" if lost.is_taken else ""):
            return OrderLost(order_id=order_id, payment_id=payment.id, field=differing)
        return _former(new, payment)


def _differing(new: NewOrder, payment: Payment, stock: StockTrace) -> str:
    """The field in which the order differs from the one that was paid; empty where it is the same."""
    order = new.order
    if payment.user_id != order.user_id:
        return "user_id"
    if (payment.amount_minor, payment.currency) != (order.total_minor, order.currency):
        return "total"
    if payment.status != "captured" or payment.captured_minor != payment.amount_minor:
        return "payment"
    held = [{line.product_id: line.quantity for line in step.lines} for step in stock.steps if step.what == "held"]
    if held != [{line.product_id: line.quantity for line in order.lines}]:
        return "lines"
    return "lines" if any(step.what == "returned" for step in stock.steps) else ""


def _former(new: NewOrder, payment: Payment) -> NewOrder:
    """The order under its former id, with the payment that was made for it."""
    state = decoded(new.state)
    paid = Checkout(paying=True, method=payment.method, attempt=payment.attempt, by_staff=state.by_staff)
    return msgspec.structs.replace(
        new, former_id=payment.order_id, payment_attempt=payment.attempt, state=encoded(paid)
    )
