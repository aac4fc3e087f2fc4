"""The categories of the catalogue, with the number of their products."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, InvalidRequest
from mercato.chassis.postgres.database import Database
from mercato.contracts.products import (
    COUNTED_AT_MOST,
    ArchiveProduct,
    CategoryPage,
    CreateProduct,
    ListCategories,
    Products,
)
from mercato.services.products import store
from mercato.testing.harness import ServiceHarness
from services.products.test_finding import filled, filled_dsn, rows_read

__all__ = ["filled", "filled_dsn"]


async def stocked(database: Database, **counts: int) -> None:
    """So many products of each category."""
    wanted = [category for category, count in counts.items() for _ in range(count)]
    async with database.transaction() as tx:
        await store.insert_many(
            tx,
            [
                (n, CreateProduct(sku=f"S{n}", name="Thing", price_minor=1, currency="USD", category=category))
                for n, category in enumerate(wanted, 1)
            ],
        )


async def page(harness: ServiceHarness, products: Products, **wanted: Any) -> CategoryPage:
    with harness.acting(ANONYMOUS_ACTOR):
        return await products.categories(ListCategories(**wanted))


async def test_categories_are_listed_with_their_products(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    assert (await page(harness, products)).categories == ()
    await stocked(database, audio=3, phones=1, computers=2)
    with harness.acting(staff):
        await products.archive(ArchiveProduct(id=1))
        await products.archive(ArchiveProduct(id=4))

    found = await page(harness, products)

    assert [(c.category, c.products, c.is_exact) for c in found.categories] == [
        ("audio", 2, True),
        ("computers", 2, True),
    ]
    assert found.next_after is None


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_give_each_category_once(
    harness: ServiceHarness, products: Products, database: Database, limit: int
):
    names = [f"c-{n}" for n in range(7)]
    await stocked(database, **dict.fromkeys(reversed(names), 1))
    seen: list[str] = []
    after: str | None = None
    while not seen or after is not None:
        found = await page(harness, products, limit=limit, after=after)
        assert 0 < len(found.categories) <= limit
        seen += [c.category for c in found.categories]
        after = found.next_after

    assert seen == names


async def test_a_count_has_a_bound(harness: ServiceHarness, products: Products, database: Database):
    await stocked(database, a=COUNTED_AT_MOST, b=COUNTED_AT_MOST + 1)

    found = await page(harness, products)

    assert [(c.products, c.is_exact) for c in found.categories] == [(COUNTED_AT_MOST, True), (COUNTED_AT_MOST, False)]


async def test_a_page_after_what_is_no_text_is_refused(harness: ServiceHarness, products: Products):
    with pytest.raises(InvalidRequest) as refused:
        await page(harness, products, after="a\0")
    assert [wrong.field for wrong in refused.value.errors] == ["after"]


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_a_page_reads_what_it_counts(filled: Any, mode: str):
    """20 000 products, of which each category has 200."""
    await filled.execute(f"SET plan_cache_mode = {mode}")
    await filled.execute(f"PREPARE page (text, bigint, bigint) AS {store.CATEGORIES_SQL}")
    plan = await filled.fetchval("EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page ('c5', 3, 51)")

    assert json.loads(plan)[0]["Plan"]["Actual Rows"] == 3
    assert rows_read(plan) <= 200, plan
