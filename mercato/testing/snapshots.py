"""Digests of the whole state of a running shop: a refused request must not change it."""

from __future__ import annotations

from typing import Final

from mercato.chassis.postgres.outbox_row import end_of_row

from .shop import Shop
from .waiting import until

BACKGROUND: Final = {"outbox_readers", "reconciliation", "saga_drivers"}
"""Tables to which the shop writes without a request."""
ATTEMPTS: Final = {"security_log"}
"""Tables to which it also writes for a refused request."""

BUSY_SAGAS: Final = """
    SELECT 1 FROM sagas WHERE driver IS NOT NULL OR (wake_at IS NOT NULL AND step <> 'awaiting') LIMIT 1
"""

_DIGEST: Final = """
    SELECT '{0} ' || count(*) || coalesce(md5(string_agg(t::text, '' ORDER BY t::text)), '') FROM {0} t
"""


async def state_of(shop: Shop) -> dict[str, str]:
    """A digest of each table but `BACKGROUND` and `ATTEMPTS`, by service and table: equal when no row was changed.

    Waits until the shop is idle: sagas and consumers of events run in the background.
    """
    await until(lambda: _is_idle(shop), "the shop becomes idle")
    digests: dict[str, str] = {}
    for name, service in shop.harness.host.services.items():
        async with service.database.read() as tx:
            tables = await tx.fetch_values(str, "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
            # One statement for all tables: hundreds of tests do this twice each.
            digest = " UNION ALL ".join(_DIGEST.format(table) for table in set(tables) - BACKGROUND - ATTEMPTS)
            for line in await tx.fetch_values(str, digest):
                table, _, state = line.partition(" ")
                digests[f"{name}.{table}"] = state
    return digests


async def _is_idle(shop: Shop) -> bool:
    host = shop.harness.host
    async with host.services["orders"].database.read() as tx:
        if await tx.fetch_values(int, BUSY_SAGAS):
            return False
    # In this order: the last step of a saga emits an event.
    for consumer in host.consumers:
        name, source = consumer.key
        async with host.services[source].database.read() as tx:
            [last] = await tx.fetch_values(int, "SELECT coalesce(max(id), 0) FROM outbox")
        async with host.services[name.partition(".")[0]].database.read() as tx:
            read = "SELECT 1 FROM cursors WHERE consumer = $1 AND source = $2 AND position >= $3"
            if not await tx.fetch_values(int, read, name, source, end_of_row(last)):
                return False
    return True
