"""Whether a product can be bought: what inventory has told, the newest news, in whatever order they come."""

from __future__ import annotations

import asyncio
import datetime
import itertools

import msgspec
import pytest

from mercato.chassis.contract import Actor
from mercato.chassis.messaging.events import Event
from mercato.chassis.postgres.database import Database
from mercato.contracts.inventory import StockAvailability
from mercato.contracts.products import CreateProduct, GetProduct, Product, Products, SearchProducts, UpdateProduct
from mercato.services.products.consumers import IN_STOCK
from mercato.testing.harness import ServiceHarness

AT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_ids = itertools.count(1)


def news(product_id: int, what: str, version: int) -> Event:
    told = StockAvailability(product_id=product_id, version=version)
    data = msgspec.json.encode(told).decode()
    return Event("inventory", next(_ids), f"stock.{what}", "product", product_id, version, data, AT)


async def tell(database: Database, *events: Event) -> None:
    async with database.transaction() as tx:
        await IN_STOCK.handle(tx, events)


async def made(harness: ServiceHarness, products: Products, staff: Actor, sku: str = "A") -> Product:
    with harness.acting(staff):
        return await products.create(
            CreateProduct(sku=sku, name="Thing", price_minor=1, currency="USD", category="things")
        )


async def seen(harness: ServiceHarness, products: Products, product_id: int) -> Product:
    with harness.acting(Actor("anonymous")):
        return await products.get(GetProduct(id=product_id))


async def test_a_product_is_in_stock_from_when_inventory_says_so(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    product = await made(harness, products, staff)
    assert not product.in_stock
    await tell(database, news(product.id, "available", 1))
    there = await seen(harness, products, product.id)
    await tell(database, news(product.id, "exhausted", 4))
    gone = await seen(harness, products, product.id)

    assert (there.in_stock, gone.in_stock) == (True, False)
    assert there.version == gone.version == product.version
    assert there.updated_at == product.updated_at


async def test_news_that_come_late_or_twice_change_nothing(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    product = await made(harness, products, staff)
    for event in (news(product.id, "available", 5), news(product.id, "exhausted", 4), news(product.id, "exhausted", 5)):
        await tell(database, event)

    assert (await seen(harness, products, product.id)).in_stock


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_the_newest_of_a_batch_counts(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor, order: tuple[int, ...]
):
    product = await made(harness, products, staff)
    events = [news(product.id, what, v) for v, what in ((1, "available"), (2, "exhausted"), (7, "available"))]
    await tell(database, *(events[i] for i in order))

    assert (await seen(harness, products, product.id)).in_stock


async def test_news_of_a_product_that_is_not_here_are_no_failure(products: Products, database: Database):
    await tell(database, news(424242, "available", 1))


async def test_searches_and_changes_show_it(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    one, other = await made(harness, products, staff, "A"), await made(harness, products, staff, "B")
    await tell(database, news(other.id, "available", 1))
    with harness.acting(staff):
        page = await products.search(SearchProducts())
        changed = await products.update(UpdateProduct(id=other.id, name="Other thing"))

    assert [(p.id, p.in_stock) for p in page.products] == [(one.id, False), (other.id, True)]
    assert changed.in_stock


async def test_two_who_note_in_different_orders_do_not_wait_for_each_other_for_ever(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    ids = [(await made(harness, products, staff, f"SKU-{i}")).id for i in range(20)]

    async def note(backwards: bool, version: int) -> None:
        order = list(reversed(ids)) if backwards else ids
        await tell(database, *(news(i, "available", version) for i in order))

    await asyncio.gather(*(note(bool(n % 2), n) for n in range(1, 21)))
    assert all([(await seen(harness, products, i)).in_stock for i in ids])
