"""Lists of orders: filters, pages, whose orders, and that no list reads the whole table."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import asyncpg
import pytest
import pytest_asyncio

from mercato.chassis.contract import MAX_ID, Actor
from mercato.chassis.testing import Cluster, migrations_folder
from mercato.contracts.orders import ListOrders, Order
from mercato.services.orders import app, rules
from mercato.services.orders.store import LIST_SQL
from services.orders.world import ALICE, BOB, STAFF, World, mugs

FILTERS = ("user_id", "status", "payment", "fulfilment")


async def pages(world: World, actor: Actor, limit: int, **filters: Any) -> list[Order]:
    """Every order, page after page."""
    found: list[Order] = []
    before: int | None = None
    while True:
        with world.acting(actor):
            page = await world.orders.list(ListOrders(limit=limit, before=before, **filters))
        assert len(page.orders) <= limit
        found += page.orders
        if page.next_before is None:
            return found
        assert page.next_before == page.orders[-1].id
        before = page.next_before


async def assorted(world: World, count: int = 60) -> list[Order]:
    """Orders of Alice and Bob in all sorts of states, the newest first."""
    await world.place_many([mugs(user_id=1 + n % 2) for n in range(count)], STAFF)
    states = list(itertools.product(*rules.AXES.values()))
    connection = await world.connection()
    await connection.executemany(
        "UPDATE orders SET status = $2, payment = $3, fulfilment = $4 WHERE id = $1",
        [(1001 + n, *states[(7 * n) % len(states)]) for n in range(count)],
    )
    return await pages(world, STAFF, 200)


def matching(orders: Sequence[Order], filters: dict[str, object]) -> list[Order]:
    return [order for order in orders if all(getattr(order, name) == value for name, value in filters.items())]


async def test_a_list_gives_what_its_filters_say_newest_first(world: World):
    orders = await assorted(world)
    assert [order.id for order in orders] == sorted((order.id for order in orders), reverse=True)

    for count in range(len(FILTERS) + 1):
        for names in itertools.combinations(FILTERS, count):
            for like in (orders[0], orders[7], orders[-1]):
                filters = {name: getattr(like, name) for name in names}
                assert await pages(world, STAFF, 200, **filters) == matching(orders, filters)


async def test_every_combination_of_states_can_be_asked_for(world: World):
    with world.acting(STAFF):
        for status, payment, fulfilment in itertools.product(*([None, *moves] for moves in rules.AXES.values())):
            page = await world.orders.list(cast(Any, ListOrders)(status=status, payment=payment, fulfilment=fulfilment))
            assert page.orders == ()


@pytest.mark.parametrize("limit", [1, 7, 60])
async def test_pages_give_each_order_once(world: World, limit: int):
    orders = await assorted(world)

    assert await pages(world, STAFF, limit) == orders
    assert await pages(world, STAFF, limit, user_id=2) == matching(orders, {"user_id": 2})


async def test_pages_give_each_order_once_while_new_ones_arrive(world: World):
    orders = await assorted(world)
    arriving = True

    async def arrive() -> None:
        while arriving:
            await world.place_many([mugs(), mugs(user_id=2)], STAFF)

    task = asyncio.create_task(arrive())
    found = await pages(world, STAFF, 3, user_id=1)
    arriving = False
    await task

    ids = [order.id for order in found]
    assert len(ids) == len(set(ids))
    assert [order for order in found if order.id <= orders[0].id] == matching(orders, {"user_id": 1})


async def test_the_last_page_says_so(world: World):
    await world.place_many([mugs(), mugs()])
    with world.acting(ALICE):
        assert (await world.orders.list(ListOrders(limit=2))).next_before is None
        assert (await world.orders.list(ListOrders(limit=1))).next_before is not None
        assert (await world.orders.list(ListOrders(before=1))).orders == ()


async def test_a_customer_sees_only_his_own_whatever_he_filters(world: World):
    orders = await assorted(world)
    own = matching(orders, {"user_id": BOB.id})

    assert await pages(world, BOB, 7) == await pages(world, BOB, 7, user_id=BOB.id) == own
    assert await pages(world, BOB, 200, user_id=ALICE.id) == await pages(world, BOB, 200, user_id=404) == []
    for like in orders:
        filters = {name: getattr(like, name) for name in ("status", "payment", "fulfilment")}
        assert await pages(world, BOB, 200, **filters) == matching(own, filters)
        assert await pages(world, BOB, 200, user_id=ALICE.id, **filters) == []


# --------------------------------------------------------------------------------------------------------------- plans


@pytest_asyncio.fixture
async def filled(cluster: Cluster) -> AsyncGenerator[Any]:
    """A connection to 30 000 orders as a shop has them: most are done, few are in a rare state, 10 are Alice's."""
    dsn = await cluster.fresh_database("orders", migrations_folder(app.build))
    connection = await cast(Any, asyncpg).connect(dsn)
    await connection.execute(
        """
        INSERT INTO orders (user_id, currency, total_minor, status, payment, fulfilment)
        SELECT CASE WHEN n % 3000 = 0 THEN 1 ELSE 2 + n % 3000 END, 'USD', 1,
               CASE WHEN n % 1000 = 1 THEN 'pending' ELSE 'completed' END,
               CASE WHEN n % 1000 = 1 THEN 'unpaid' WHEN n % 1000 = 2 THEN 'partially_refunded' ELSE 'paid' END,
               CASE WHEN n % 1000 = 1 THEN 'unfulfilled' WHEN n % 1000 = 3 THEN 'returned' ELSE 'delivered' END
          FROM generate_series(1, 30000) n
        """
    )
    await connection.execute("ANALYZE orders")
    yield connection
    await connection.close()
    await cluster.release_database(dsn)


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"user_id": 1},
        {"user_id": 404},
        {"user_id": 1, "status": "pending"},
        {"user_id": 1, "status": "completed", "payment": "paid", "fulfilment": "delivered"},
        {"status": "pending"},
        {"status": "completed"},
        {"status": "cancelled"},
        {"payment": "partially_refunded"},
        {"fulfilment": "returned"},
        {"status": "completed", "payment": "partially_refunded"},
        {"payment": "paid", "fulfilment": "returned"},
    ],
)
async def test_no_list_reads_much_more_than_it_gives(filled: Any, mode: str, filters: dict[str, Any]):
    """Whatever PostgreSQL decides about plans of prepared statements: it keeps one for all values after five."""
    by_user = "user_id" in filters
    sql = LIST_SQL[by_user, filters.get("status"), filters.get("payment"), filters.get("fulfilment")]
    await filled.execute(f"SET plan_cache_mode = {mode}")
    await filled.execute(f"PREPARE page (bigint, bigint{', bigint' if by_user else ''}) AS {sql}")
    values = [MAX_ID, 51, *([filters["user_id"]] if by_user else [])]
    plan = await filled.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page ({', '.join(map(str, values))})")

    assert rows_read(plan) <= 200, plan


def rows_read(plan: str) -> int:
    def read(node: dict[str, Any]) -> int:
        own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) if "Relation Name" in node else 0
        return int(own) + sum(read(part) for part in node.get("Plans", ()))

    return read(json.loads(plan)[0]["Plan"])
