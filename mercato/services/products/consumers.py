"""What products hears from inventory: whether there is anything left."""

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


async def note_stock(tx: Tx, events: Sequence[Event]) -> None:
    """The newest news of each product count; later ones that are noted already stay."""
    newest: dict[int, tuple[int, bool]] = {}
    for event in events:
        told = _decode(event.data)
        news = (told.version, event.type == AVAILABLE)
        newest[told.product_id] = max(newest.get(told.product_id, news), news)
    product_ids = list(newest)
    versions = [version for version, _ in newest.values()]
    await store.note_stock(tx, product_ids, [in_stock for _, in_stock in newest.values()], versions)


IN_STOCK: Final = Subscription(
    consumer="products.in_stock", sources=("inventory",), types=frozenset({AVAILABLE, EXHAUSTED}), handle=note_stock
)
