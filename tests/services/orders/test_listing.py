"""Lists of orders: filters, pages, whose orders, and that no list reads the whole table."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, cast

import msgspec
import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.contract import MAX_ID, Actor
from mercato.contracts.orders import ListOrders, Order, PlaceOrder
from mercato.services.orders import rules
from mercato.services.orders.list_store import LIST_SQL
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import LAMP, MUG
from mercato.testing.cluster import Cluster
from mercato.testing.databases import fresh_dsn
from mercato.testing.tables import connected
from services.orders.harness import OrdersHarness, basket, mugs

FILTERS = ("user_id", "product_id", "status", "payment", "fulfilment")


async def pages(harness: OrdersHarness, actor: Actor, limit: int, **filters: Any) -> list[Order]:
    """Every order, page after page."""
    found: list[Order] = []
    before: int | None = None
    while True:
        with harness.acting(actor):
            page = await harness.orders.list(ListOrders(limit=limit, before=before, **filters))
        assert len(page.orders) <= limit
        found += page.orders
        if page.next_before is None:
            return found
        assert page.next_before == page.orders[-1].id
        before = page.next_before


async def assorted(harness: OrdersHarness, count: int = 60) -> list[Order]:
    """Orders of Alice and Bob, of mugs, lamps or both, in all sorts of states, the newest first."""
    baskets = (((MUG, 1),), ((LAMP, 2),), ((MUG, 2), (LAMP, 1)))
    await harness.place_many([of_user(1 + n % 2, *baskets[n % 3]) for n in range(count)], STAFF)
    states = list(itertools.product(*rules.AXES.values()))
    connection = await harness.connection()
    await connection.executemany(
        "UPDATE orders SET status = $2, payment = $3, fulfilment = $4 WHERE id = $1",
        [(1001 + n, *states[(7 * n) % len(states)]) for n in range(count)],
    )
    return await pages(harness, STAFF, 200)


def of_user(user_id: int, *lines: tuple[int, int]) -> PlaceOrder:
    return msgspec.structs.replace(basket(*lines), user_id=user_id)


def matching(orders: Sequence[Order], filters: Mapping[str, object]) -> list[Order]:
    return [order for order in orders if all(has(order, name, value) for name, value in filters.items())]


def has(order: Order, name: str, value: object) -> bool:
    if name == "product_id":
        return any(line.product_id == value for line in order.lines)
    return getattr(order, name) == value


async def test_a_list_gives_what_its_filters_say_newest_first(harness: OrdersHarness):
    orders = await assorted(harness)
    assert [order.id for order in orders] == sorted((order.id for order in orders), reverse=True)

    for count in range(len(FILTERS) + 1):
        for names in itertools.combinations(FILTERS, count):
            for like in (orders[0], orders[7], orders[-1]):
                filters: dict[str, Any] = {name: MUG if name == "product_id" else getattr(like, name) for name in names}
                assert await pages(harness, STAFF, 200, **filters) == matching(orders, filters)


async def test_every_combination_of_states_can_be_asked_for(harness: OrdersHarness):
    with harness.acting(STAFF):
        for status, payment, fulfilment in itertools.product(*([None, *moves] for moves in rules.AXES.values())):
            page = await harness.orders.list(
                cast(Any, ListOrders)(status=status, payment=payment, fulfilment=fulfilment)
            )
            assert page.orders == ()


@pytest.mark.parametrize("limit", [1, 7, 60])
async def test_pages_give_each_order_once(harness: OrdersHarness, limit: int):
    orders = await assorted(harness)

    assert await pages(harness, STAFF, limit) == orders
    assert await pages(harness, STAFF, limit, user_id=2) == matching(orders, {"user_id": 2})
    assert await pages(harness, STAFF, limit, product_id=LAMP) == matching(orders, {"product_id": LAMP})
    both: dict[str, object] = {"product_id": MUG, "user_id": 2}
    assert await pages(harness, STAFF, limit, product_id=MUG, user_id=2) == matching(orders, both)


async def test_an_order_is_found_by_each_product_of_its_lines_and_by_no_other(harness: OrdersHarness):
    of_mugs, of_both, of_lamps = [
        await harness.place(basket(*lines)) for lines in ([(MUG, 1)], [(LAMP, 1), (MUG, 3)], [(LAMP, 2)])
    ]

    assert [order.id for order in await pages(harness, STAFF, 1, product_id=MUG)] == [of_both.id, of_mugs.id]
    assert [order.id for order in await pages(harness, STAFF, 1, product_id=LAMP)] == [of_lamps.id, of_both.id]
    assert await pages(harness, STAFF, 1, product_id=404) == []


async def test_a_customer_finds_only_their_own_orders_by_product(harness: OrdersHarness):
    orders = await assorted(harness)

    found = await pages(harness, BOB, 7, product_id=LAMP)

    assert found == matching(orders, {"product_id": LAMP, "user_id": BOB.id})
    assert await pages(harness, BOB, 7, product_id=LAMP, user_id=ALICE.id) == []


async def test_pages_give_each_order_once_while_new_ones_arrive(harness: OrdersHarness):
    orders = await assorted(harness)
    arriving = True

    async def arrive() -> None:
        while arriving:
            await harness.place_many([mugs(), mugs(user_id=2)], STAFF)

    task = asyncio.create_task(arrive())
    found = await pages(harness, STAFF, 3, user_id=1)
    arriving = False
    await task

    ids = [order.id for order in found]
    assert len(ids) == len(set(ids))
    assert [order for order in found if order.id <= orders[0].id] == matching(orders, {"user_id": 1})


async def test_the_last_page_says_so(harness: OrdersHarness):
    await harness.place_many([mugs(), mugs()])
    with harness.acting(ALICE):
        assert (await harness.orders.list(ListOrders(limit=2))).next_before is None
        assert (await harness.orders.list(ListOrders(limit=1))).next_before is not None
        assert (await harness.orders.list(ListOrders(before=1))).orders == ()


async def test_a_customer_sees_only_their_own_orders_with_any_filters(harness: OrdersHarness):
    orders = await assorted(harness)
    own = matching(orders, {"user_id": BOB.id})

    assert await pages(harness, BOB, 7) == await pages(harness, BOB, 7, user_id=BOB.id) == own
    assert await pages(harness, BOB, 200, user_id=ALICE.id) == await pages(harness, BOB, 200, user_id=404) == []
    for like in orders:
        filters = {name: getattr(like, name) for name in ("status", "payment", "fulfilment")}
        assert await pages(harness, BOB, 200, **filters) == matching(own, filters)
        assert await pages(harness, BOB, 200, user_id=ALICE.id, **filters) == []


# --------------------------------------------------------------------------------------------------------------- plans


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled_dsn(cluster: Cluster) -> AsyncGenerator[str]:
    """A database of 30 000 orders as a shop has them: most are done, few are in a rare state, 10 are Alice's.

    The tests only read it.
    """
    async with (
        fresh_dsn(cluster, "orders", topology.migrations("orders")) as dsn,
        connected(dsn) as connection,
    ):
        await connection.execute(
            """
            INSERT INTO orders (id, nonce, lines, user_id, currency, total_minor, status, payment, fulfilment)
            SELECT n, n, '[]', CASE WHEN n % 3000 = 0 THEN 1 ELSE 2 + n % 3000 END, 'USD', 1,
                   CASE WHEN n % 1000 = 1 THEN 'pending' ELSE 'completed' END,
                   CASE WHEN n % 1000 = 1 THEN 'unpaid' WHEN n % 1000 = 2 THEN 'partially_refunded' ELSE 'paid' END,
                   CASE WHEN n % 1000 = 1 THEN 'unfulfilled' WHEN n % 1000 = 3 THEN 'returned' ELSE 'delivered' END
              FROM generate_series(1, 30000) n
            """
        )
        # Every order has the product 7, one of a hundred the product 8, and 10 the product 9.
        await connection.execute(
            """
            INSERT INTO order_products (product_id, order_id)
            SELECT p, n FROM generate_series(1, 30000) n, (VALUES (7, 1), (8, 100), (9, 3000)) AS p (p, every)
             WHERE n % every = 0
            """
        )
        await connection.execute("ANALYZE orders, order_products")
        yield dsn


@pytest_asyncio.fixture
async def filled(filled_dsn: str) -> AsyncGenerator[Any]:
    """A connection to that database."""
    async with connected(filled_dsn) as connection:
        yield connection


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
        {"product_id": 7},
        {"product_id": 8},
        {"product_id": 9, "user_id": 1},
        {"product_id": 7, "user_id": 1},
        {"product_id": 7, "user_id": 404},
        {"product_id": 7, "user_id": 1, "status": "pending"},
        {"product_id": 9, "status": "pending"},
        {"product_id": 404},
        {"product_id": 7, "status": "completed", "payment": "paid"},
    ],
)
async def test_no_list_reads_much_more_than_it_gives(filled: Any, mode: str, filters: dict[str, Any]):
    """Whatever PostgreSQL decides about plans of prepared statements: it keeps one for all values after five."""
    axes = [filters.get(axis) for axis in rules.AXES]
    sql = LIST_SQL["user_id" in filters, "product_id" in filters, *cast(Any, axes)]
    await filled.execute(f"SET plan_cache_mode = {mode}")
    await filled.execute(f"PREPARE page (bigint, bigint, bigint, bigint) AS {sql}")
    values = [MAX_ID, 51, filters.get("user_id", "NULL"), filters.get("product_id", "NULL")]
    plan = await filled.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page ({', '.join(map(str, values))})")

    assert rows_read(plan) <= 200, plan


def rows_read(plan: str) -> int:
    def read(node: dict[str, Any]) -> int:
        own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) if "Relation Name" in node else 0
        return int(own) + sum(read(part) for part in node.get("Plans", ()))

    return read(json.loads(plan)[0]["Plan"])
