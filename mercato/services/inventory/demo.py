"""The stock of the demo shop: more of everything than a demo sells."""

from __future__ import annotations

from typing import Final

from mercato.chassis.contract import SERVICE_ROLE, Actor
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database

from . import store
from .rules import Movement, StockLedger

SEED_BEFORE_COMMIT: Final = "inventory.seed.before_commit"

PRODUCT_IDS: Final = (*range(1, 15), *range(100, 106), *range(200, 205))
"""The ids of the demo catalogue."""
PIECES: Final = 1_000_000

faults.declare(SEED_BEFORE_COMMIT)


async def seed(database: Database) -> bool:
    """Counts all products or none. Gives False where a level exists."""
    async with database.transaction() as tx:
        if not await store.lock_all_levels(tx):
            return False
        await store.insert_levels(tx, PRODUCT_IDS)
        ledger = StockLedger(await store.lock_levels(tx, PRODUCT_IDS))
        for product_id in PRODUCT_IDS:
            ledger.count(Movement(product_id, "receipt", PIECES, Actor(SERVICE_ROLE), reason="demo"))
        await store.write(tx, ledger.write_set())
        await faults.point(SEED_BEFORE_COMMIT)
    return True
