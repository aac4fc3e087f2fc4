"""A database that was restored alone gives no id again that another service knows."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.postgres.sequences import UNKNOWN_IDS
from mercato.operations.ids import (
    BANK_OPERATIONS,
    CHARGES,
    IDS_PER_SECOND_MAX,
    KNOWN,
    MARGIN_MIN,
    ORDERS,
    PAYMENTS,
    PRODUCTS,
    SEQUENCES,
    USERS,
    Moved,
    Sequence,
    advance,
    margin,
)
from mercato.testing.cluster import Cluster
from mercato.testing.tables import BLOCKED_STATEMENTS, connected

NONCE = 7


@pytest_asyncio.fixture
async def dsns(cluster: Cluster) -> AsyncGenerator[Mapping[str, str]]:
    made = {name: await cluster.fresh_database(name, topology.migrations(name)) for name in topology.SERVICES}
    yield made
    for dsn in made.values():
        await cluster.release_database(dsn)


async def execute(dsns: Mapping[str, str], service: str, statement: str) -> None:
    async with connected(dsns[service]) as connection:
        await connection.execute(statement)


async def next_id(dsns: Mapping[str, str], sequence: Sequence) -> int:
    """Takes it."""
    async with connected(dsns[sequence.owner]) as connection:
        return await connection.fetchval("SELECT nextval($1::text::regclass)", sequence.name)


ORDER = f"""
    INSERT INTO orders (id, nonce, user_id, total_minor, currency, lines) VALUES (1, {NONCE}, 5000, 0, 'USD', '[]')
"""
PAYMENT = f"""
    INSERT INTO payments (id, order_id, nonce, attempt, user_id, method, currency, amount_minor, charge_id)
    VALUES (1, {{order}}, {NONCE}, 1, {{user}}, 'sandbox:ok', 'USD', 0, {{charge}})
"""
RESERVATION = f"""
    INSERT INTO reservations (order_id, nonce, state, product_ids, quantities, expires_at)
    VALUES ({{order}}, {NONCE}, 'held', '{{{{1}}}}', '{{{{1}}}}', now())
"""
IN_FEED = """
    INSERT INTO feed (position, source, outbox_id, place, count, at, events)
    VALUES (1, 'any', 1, 0, 2, now(),
            '[{{"type": "{type}", "subject_id": 5000}}, {{"type": "x", "subject_id": 9000}}]');
    INSERT INTO feed_types VALUES ('{type}', 1, 1, 0), ('x', 1, 1, 1);
"""

# Each makes a service know the id 5000 of another, and no other id above the first.
CASES: Mapping[tuple[Sequence, str], str] = {
    (ORDERS, "inventory"): RESERVATION.format(order=5000),
    (ORDERS, "payments"): PAYMENT.format(order=5000, user=1, charge="NULL"),
    (ORDERS, "events"): IN_FEED.format(type="order.placed"),
    (USERS, "orders"): ORDER,
    (USERS, "payments"): PAYMENT.format(order=1, user=5000, charge="NULL"),
    (PRODUCTS, "inventory"): "INSERT INTO levels (product_id, on_hand, reserved, version) VALUES (5000, 0, 0, 1)",
    (PRODUCTS, "orders"): "INSERT INTO order_products (product_id, order_id) VALUES (5000, 1)",
    (PRODUCTS, "events"): IN_FEED.format(type="product.price_changed"),
    (PAYMENTS, "events"): IN_FEED.format(type="payment.captured"),
    (CHARGES, "payments"): PAYMENT.format(order=1, user=1, charge=5000),
    (BANK_OPERATIONS, "payments"): """
        INSERT INTO reconciliation (name, after, leased_until) VALUES ('x', 5000, now())
    """,
}


def test_each_place_in_the_table_has_a_case():
    assert list(CASES) == [(known.sequence, known.by) for known in KNOWN]


@pytest.mark.parametrize(("sequence", "by"), CASES, ids=[f"{each.name}-{by}" for each, by in CASES])
async def test_a_sequence_behind_what_another_service_knows_goes_on_behind_it(
    dsns: Mapping[str, str], sequence: Sequence, by: str
):
    await execute(dsns, by, CASES[sequence, by])
    async with connected(dsns[sequence.owner]) as connection:
        first = await connection.fetchval(f"SELECT last_value FROM {sequence.name}")

    moved = await advance(dsns)

    assert moved == (Moved(sequence, by, first, 5000),)
    assert await next_id(dsns, sequence) == 5001 + UNKNOWN_IDS
    assert await advance(dsns) == ()


async def test_a_sequence_never_goes_backwards(dsns: Mapping[str, str]):
    await execute(dsns, "inventory", RESERVATION.format(order=5000))
    await execute(dsns, "orders", "SELECT setval('orders_id_seq', 5000)")

    assert await advance(dsns) == ()
    assert await next_id(dsns, ORDERS) == 5001


async def test_an_id_that_is_the_next_one_is_passed_over(dsns: Mapping[str, str]):
    await execute(dsns, "inventory", RESERVATION.format(order=5000))
    await execute(dsns, "orders", "SELECT setval('orders_id_seq', 5000, false)")

    assert await advance(dsns) == (Moved(ORDERS, "inventory", 5000, 5000),)
    assert await next_id(dsns, ORDERS) == 5001 + UNKNOWN_IDS


async def test_a_shop_of_which_no_service_knows_anything_stays_as_it_is(dsns: Mapping[str, str]):
    async def state() -> list[Any]:
        return [await value(dsns, sequence) for sequence in SEQUENCES]

    before = await state()

    assert await advance(dsns) == ()
    assert await state() == before


async def value(dsns: Mapping[str, str], sequence: Sequence) -> Any:
    async with connected(dsns[sequence.owner]) as connection:
        return await connection.fetchrow(f"SELECT last_value, is_called FROM {sequence.name}")


async def test_two_processes_and_one_that_takes_ids_never_see_it_go_backwards(dsns: Mapping[str, str]):
    await execute(dsns, "inventory", RESERVATION.format(order=5000))
    async with connected(dsns["orders"]) as connection, connected(dsns["orders"]) as watching:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT nextval('orders_id_seq')")  # an order that is being placed
        both = [asyncio.create_task(advance(dsns)) for _ in range(2)]
        while await watching.fetchval(BLOCKED_STATEMENTS) < 2 and not all(one.done() for one in both):
            await asyncio.sleep(0.01)
        await connection.execute("SELECT setval('orders_id_seq', 8000)")
        await transaction.commit()

    assert [await one for one in both] == [(), ()]
    assert await next_id(dsns, ORDERS) == 8001


@pytest.mark.parametrize(
    ("days", "expected"),
    [(1, MARGIN_MIN + 86_400 * IDS_PER_SECOND_MAX), (0, MARGIN_MIN), (-1, MARGIN_MIN)],
    ids=["old", "new", "of-a-clock-that-was-ahead"],
)
def test_the_older_a_backup_is_the_more_ids_may_have_been_given(days: int, expected: int):
    now = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)
    assert margin(now - datetime.timedelta(days=days), now) == expected
