"""What the tables themselves promise: rows that stay, one row for one operation, and updates that touch no index."""

from __future__ import annotations

import contextlib

import asyncpg
import pytest

from services.payments.harness import PaymentsHarness, capture, refund, settled

BATCH = 64
BATCHES = 8


@pytest.mark.parametrize("table", ["operations", "transfers"])
@pytest.mark.parametrize("change", ["UPDATE {} SET amount_minor = 1", "DELETE FROM {}"])
async def test_what_was_recorded_stays_as_it_was_written(harness: PaymentsHarness, table: str, change: str):
    await harness.charged(amount=1_250)

    with pytest.raises(asyncpg.RestrictViolationError, match=table):
        await harness.rows(change.format(table))

    assert await harness.rows(f"SELECT amount_minor FROM {table}") == [(1_250,)]


async def test_a_payment_has_one_open_operation_that_is_not_a_refund(harness: PaymentsHarness):
    with pytest.raises(asyncpg.UniqueViolationError, match="intents_pkey"):
        await harness.rows(
            """
            INSERT INTO intents (payment_id, kind, key, amount_minor, currency)
            VALUES (1, 'charge', 'one', 1, 'EUR'), (1, 'authorize', 'two', 1, 'EUR')
            """
        )


@pytest.mark.parametrize("kind", ["charge", "capture", "authorize"])
async def test_an_operation_of_a_payment_is_recorded_once(harness: PaymentsHarness, kind: str):
    with pytest.raises(asyncpg.UniqueViolationError, match="operations_pkey"):
        await harness.rows(
            """
            INSERT INTO operations (payment_id, kind, key, amount_minor, currency, status, provider_id, calls, began_at)
            SELECT 1, $1, key, 1, 'EUR', 'succeeded', 1, 1, now() FROM unnest(ARRAY['one', 'two']) AS k (key)
            """,
            kind,
        )


@pytest.mark.parametrize("table", ["payments", "accounts"])
async def test_updates_of_a_load_touch_no_index(harness: PaymentsHarness, table: str):
    before = await statistics(harness, table)
    for _ in range(BATCHES):
        charged = await settled(harness.payments.charge.many, [harness.charge() for _ in range(BATCH)])
        authorized = await settled(harness.payments.authorize.many, [harness.authorization() for _ in range(BATCH)])
        captured = await settled(harness.payments.capture.many, [capture(p) for p in authorized])
        await harness.payments.refund.many([refund(p, 100) for p in [*charged[:8], *captured[:8]]])

    updates, indexed = (after - n for after, n in zip(await statistics(harness, table), before, strict=True))

    assert updates >= 4 * BATCHES
    assert indexed == 0


async def statistics(harness: PaymentsHarness, table: str) -> tuple[int, int]:
    """Updates of a table by all connections of the service, and those that changed a column which an index has.

    The others were HOT, or found their page full of row versions that another snapshot still keeps.
    """
    database = harness.host.services["payments"].database
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(database.size):  # all of the pool at the same time: each reports at its next commit
            tx = await stack.enter_async_context(database.transaction())
            await tx.execute("SELECT pg_stat_force_next_flush()")
    [(updates, indexed)] = await harness.rows(
        """
        SELECT n_tup_upd, n_tup_upd - n_tup_hot_upd - n_tup_newpage_upd FROM pg_stat_user_tables WHERE relname = $1
        """,
        table,
    )
    return updates, indexed
