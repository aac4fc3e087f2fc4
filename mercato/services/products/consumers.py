"""The consumer of inventory's events: whether a product is in stock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mercato.chassis.messaging.events import Event, Subscription, decoder
from mercato.chassis.postgres.database import Tx
from mercato.contracts.inventory import Inventory, StockAvailability

from . import store

AVAILABLE: Final = "stock.available"
EXHAUSTED: Final = "stock.exhausted"

_decode: Final = decoder(Inventory, StockAvailability, AVAILABLE, EXHAUSTED)


async def store_stock(tx: Tx, events: Sequence[Event]) -> None:
    """Stores the newest event of each product. A later one that is stored already stays."""
    newest: dict[int, tuple[int, bool]] = {}
    for event in events:
        availability = _decode(event.data)
        state = (availability.version, event.type == AVAILABLE)
        newest[availability.product_id] = max(newest.get(availability.product_id, state), state)
    product_ids = list(newest)
    versions = [version for version, _ in newest.values()]
    await store.store_stock(tx, product_ids, [in_stock for _, in_stock in newest.values()], versions)


IN_STOCK: Final = Subscription(
    consumer="products.in_stock", sources=("inventory",), types=frozenset({AVAILABLE, EXHAUSTED}), handle=store_stock
)
