"""The consumer that writes changes of prices, and refunds, to the security log.

An entry is written in the transaction that moves the cursor: once, also where an event is delivered again. Events have
no addresses, so these entries have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract import Actor
from mercato.chassis.messaging.events import Event, Subscription, decoder
from mercato.chassis.postgres.database import Tx
from mercato.contracts.money import written
from mercato.contracts.orders import Orders
from mercato.contracts.products import PriceChanged, Products
from mercato.contracts.refunds import OrderRefunded

from . import log_store
from .log_store import NewEntry

PRICE_CHANGED: Final = "product.price_changed"
REFUNDED: Final = "refund.succeeded"

_price_changed: Final = decoder(Products, PriceChanged, PRICE_CHANGED)
_refunded: Final = decoder(Orders, OrderRefunded, REFUNDED)


async def note(tx: Tx, events: Sequence[Event]) -> None:
    """Writes an entry for each event, with its time."""
    await log_store.add(tx, [_of_refund(e) if e.type == REFUNDED else _of_price(e) for e in events])


def _of_price(event: Event) -> NewEntry:
    change = _price_changed(event.data)
    before, after = written(change.old_price_minor, change.old_currency), written(change.price_minor, change.currency)
    return NewEntry(
        "price_changed",
        0,
        Actor(change.actor_role, change.actor_id),
        detail=f"{before} to {after}",
        subject=f"product {change.product_id}",
        at=event.at,
    )


def _of_refund(event: Event) -> NewEntry:
    """An entry about the owner of the order; 0: a guest."""
    refund = _refunded(event.data)
    before = written(refund.refunded_minor - refund.amount_minor, refund.currency)
    after = written(refund.refunded_minor, refund.currency)
    return NewEntry(
        "refunded",
        refund.user_id,
        Actor(refund.actor_role, refund.actor_id),
        detail=f"refund {refund.refund_id}: {before} to {after}",
        subject=f"order {refund.order_id}",
        at=event.at,
    )


SECURITY_LOG: Final = Subscription(
    consumer="users.security_log",
    sources=("orders", "products"),
    types=frozenset({PRICE_CHANGED, REFUNDED}),
    handle=note,
)
