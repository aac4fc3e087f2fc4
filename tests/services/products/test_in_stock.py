"""Whether a product can be bought: the newest stock event of inventory counts, in whatever order events come."""

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


def stock_event(product_id: int, what: str, version: int) -> Event:
    availability = StockAvailability(product_id=product_id, version=version)
    data = msgspec.json.encode(availability).decode()
    return Event("inventory", next(_ids), f"stock.{what}", "product", product_id, version, data, AT)


async def handle(database: Database, *events: Event) -> None:
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
    await handle(database, stock_event(product.id, "available", 1))
    there = await seen(harness, products, product.id)
    await handle(database, stock_event(product.id, "exhausted", 4))
    gone = await seen(harness, products, product.id)

    assert (there.in_stock, gone.in_stock) == (True, False)
    assert there.version == gone.version == product.version
    assert there.updated_at == product.updated_at


async def test_late_or_repeated_stock_events_change_nothing(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    product = await made(harness, products, staff)
    for event in (
        stock_event(product.id, "available", 5),
        stock_event(product.id, "exhausted", 4),
        stock_event(product.id, "exhausted", 5),
    ):
        await handle(database, event)

    assert (await seen(harness, products, product.id)).in_stock


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_the_newest_stock_event_of_a_batch_counts(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor, order: tuple[int, ...]
):
    product = await made(harness, products, staff)
    events = [stock_event(product.id, what, v) for v, what in ((1, "available"), (2, "exhausted"), (7, "available"))]
    await handle(database, *(events[i] for i in order))

    assert (await seen(harness, products, product.id)).in_stock


async def test_a_stock_event_of_an_unknown_product_is_no_failure(products: Products, database: Database):
    await handle(database, stock_event(424242, "available", 1))


async def test_searches_and_changes_show_it(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    one, other = await made(harness, products, staff, "A"), await made(harness, products, staff, "B")
    await handle(database, stock_event(other.id, "available", 1))
    with harness.acting(staff):
        page = await products.search(SearchProducts())
        changed = await products.update(UpdateProduct(id=other.id, name="Other thing"))

    assert [(p.id, p.in_stock) for p in page.products] == [(one.id, False), (other.id, True)]
    assert changed.in_stock


async def test_two_consumers_that_update_in_different_orders_do_not_deadlock(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    ids = [(await made(harness, products, staff, f"SKU-{i}")).id for i in range(20)]

    async def note(backwards: bool, version: int) -> None:
        order = list(reversed(ids)) if backwards else ids
        await handle(database, *(stock_event(i, "available", version) for i in order))

    await asyncio.gather(*(note(bool(n % 2), n) for n in range(1, 21)))
    assert all([(await seen(harness, products, i)).in_stock for i in ids])
