"""Orders are found by the time of their placing, their total, their note and their id."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from mercato.contracts.orders import SCANNED_AT_ONCE, ListOrders, Order, OrderPage, PlaceOrder
from mercato.services.orders import list_store
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import LAMP, MUG
from services.orders.harness import MUG_MINOR, OrdersHarness, basket
from services.orders.test_listing import filled, filled_dsn, pages, rows_read

__all__ = ["filled", "filled_dsn"]

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


def of(user_id: int, *lines: tuple[int, int], note: str = "") -> PlaceOrder:
    return msgspec.structs.replace(basket(*lines), user_id=user_id, customer_note=note)


async def placed(harness: OrdersHarness) -> list[Order]:
    """Eight orders of eight days, the oldest first: those of Alice and Bob in turns, of one mug, two mugs and so on."""
    wanted = [
        of(1 + n % 2, (MUG, n + 1), *([(LAMP, 1)] if n % 4 == 3 else []), note=f"Ring at Door {n % 3}, please")
        for n in range(8)
    ]
    await harness.place_many(wanted, STAFF)
    connection = await harness.connection()
    await connection.execute("UPDATE orders SET created_at = $1::timestamptz + (id - 1001) * interval '1 day'", START)
    return (await pages(harness, STAFF, 200))[::-1]


async def ids(harness: OrdersHarness, limit: int = 3, actor: Any = STAFF, **filters: Any) -> list[int]:
    return [order.id - 1000 for order in await found(harness, limit, actor, **filters)]


async def found(harness: OrdersHarness, limit: int, actor: Any, **filters: Any) -> Sequence[Order]:
    """Page after page; unlike those of other lists they may be short."""
    orders: list[Order] = []
    before: int | None = None
    while True:
        with harness.acting(actor):
            page = await harness.orders.list(ListOrders(limit=limit, before=before, **filters))
        assert len(page.orders) <= limit
        orders += page.orders
        if page.next_before is None:
            return orders
        before = page.next_before


async def test_orders_are_found_by_their_time(harness: OrdersHarness):
    await placed(harness)

    assert await ids(harness, created_from=START + 5 * DAY) == [8, 7, 6]
    assert await ids(harness, created_to=START + 2 * DAY) == [2, 1]
    assert await ids(harness, created_from=START + DAY, created_to=START + 5 * DAY) == [5, 4, 3, 2]
    assert await ids(harness, created_from=START + DAY, created_to=START + 5 * DAY, user_id=1) == [5, 3]
    assert await ids(harness, created_from=START + 5 * DAY, status="confirmed") == []
    assert await ids(harness, created_from=START + 9 * DAY) == []
    assert await ids(harness, created_to=START) == []
    assert await ids(harness, created_to=START + datetime.timedelta(microseconds=1)) == [1]


async def test_an_order_whose_id_is_of_another_moment_is_found_by_its_time(harness: OrdersHarness):
    """Transactions that overlap: the one that began first may take the later id."""
    await placed(harness)
    connection = await harness.connection()
    late = START + 3 * DAY
    await connection.execute("UPDATE orders SET created_at = $1 WHERE id = 1005", late - datetime.timedelta(seconds=30))

    assert await ids(harness, created_to=late) == [5, 3, 2, 1]
    assert await ids(harness, created_from=late) == [8, 7, 6, 4]
    assert await ids(harness, created_from=late - datetime.timedelta(seconds=40), created_to=late) == [5]


async def test_orders_are_found_by_their_total(harness: OrdersHarness):
    orders = await placed(harness)
    totals = {order.id - 1000: order.total_minor for order in orders}
    assert totals[1] == MUG_MINOR

    dear = totals[5]
    expected = [id_ for id_, total in sorted(totals.items(), reverse=True) if total >= dear]
    assert await ids(harness, min_total_minor=dear) == expected
    assert await ids(harness, max_total_minor=2 * MUG_MINOR) == [2, 1]
    assert await ids(harness, min_total_minor=MUG_MINOR, max_total_minor=MUG_MINOR, currency="USD") == [1]
    assert await ids(harness, min_total_minor=1, currency="EUR") == []
    assert len(await ids(harness, currency="USD")) == 8


async def test_orders_are_found_by_their_note_and_their_id(harness: OrdersHarness):
    await placed(harness)

    assert await ids(harness, text="DOOR 2") == [6, 3]
    assert await ids(harness, text="door 2", user_id=1) == [3]
    assert await ids(harness, text="window") == []
    assert await ids(harness, text="%") == []
    assert await ids(harness, text="1004") == [4]
    assert await ids(harness, text="1004", user_id=1) == []
    for absent in ("0", "4", "9" * 16, "9" * 30):
        assert await ids(harness, text=absent) == []


async def test_all_filters_work_together(harness: OrdersHarness):
    await placed(harness)
    with_lamps: dict[str, Any] = {"product_id": LAMP, "created_from": START}

    assert await ids(harness, **with_lamps) == [8, 4]
    assert await ids(harness, **with_lamps, text="door 1") == [8]
    assert await ids(harness, **with_lamps, payment="unpaid", fulfilment="unfulfilled", status="pending") == [8, 4]
    assert await ids(harness, **with_lamps, payment="paid") == []


async def test_a_customer_finds_only_their_own(harness: OrdersHarness):
    await placed(harness)

    assert await ids(harness, actor=BOB, created_from=START) == [8, 6, 4, 2]
    assert await ids(harness, actor=BOB, text="1001") == []
    assert await ids(harness, actor=BOB, text="1002") == [2]
    assert await ids(harness, actor=BOB, created_from=START, user_id=ALICE.id) == []


# --------------------------------------------------------------------------------------------------------------- bounds


@pytest_asyncio.fixture
async def many(harness: OrdersHarness) -> OrdersHarness:
    """A shop with 25 000 orders, one a minute, of which the fifth alone has a note."""
    connection = await harness.connection()
    await connection.execute(
        """
        INSERT INTO orders (id, nonce, lines, user_id, currency, total_minor, created_at, customer_note)
        SELECT n, n, '[]', 2 + n % 3000, 'USD', n, $1::timestamptz + n * interval '1 minute',
               CASE WHEN n = 5 THEN 'rare' ELSE '' END
          FROM generate_series(1, 25000) n
        """,
        START,
    )
    return harness


async def test_a_page_looks_through_so_many_orders_and_says_where_it_goes_on(many: OrdersHarness):
    seen: list[OrderPage] = []
    before: int | None = None
    with many.acting(STAFF):
        while not seen or before is not None:
            seen.append(await many.orders.list(ListOrders(text="rare", before=before)))
            before = seen[-1].next_before

    assert [[order.id for order in page.orders] for page in seen] == [[], [], [5]]
    assert [page.next_before for page in seen] == [15_001, 5_001, None]
    assert SCANNED_AT_ONCE == 10_000
    assert len(await found(many, 200, STAFF, min_total_minor=24_000)) == 1_001


async def test_a_range_of_times_is_found_wherever_it_is(many: OrdersHarness):
    for minute in (1, 2, 3_000, 12_345, 24_999, 25_000):
        at = START + datetime.timedelta(minutes=minute)
        until = at + datetime.timedelta(seconds=1)
        with many.acting(STAFF):
            page = await many.orders.list(ListOrders(created_from=at, created_to=until))
        assert [order.id for order in page.orders] == [minute]
        assert page.next_before is None


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize(("by_user", "bound"), [(False, 10_000), (True, 20)])
async def test_no_scan_reads_more_than_its_bound(filled: Any, mode: str, by_user: bool, bound: int):
    await filled.execute(f"SET plan_cache_mode = {mode}")
    types = (
        "bigint, bigint, bigint, bigint, text, text, text, timestamptz, timestamptz, text, bigint, bigint, text, bigint"
    )
    await filled.execute(f"PREPARE page ({types}) AS {list_store.SCAN_SQL[by_user]}")
    await filled.execute(f"PREPARE last (bigint, bigint, bigint, bigint) AS {list_store.LAST_SCANNED_SQL[by_user]}")
    user = "1" if by_user else "NULL"
    nothing = ", ".join(["NULL"] * 8)
    plan = await filled.fetchval(
        f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page (30001, 20000, {user}, {nothing}, 5, NULL, 51)"
    )
    last = await filled.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE last (30001, 0, {user}, 9999)")

    assert rows_read(plan) <= bound + 1, plan
    assert rows_read(last) <= bound + 1, last
