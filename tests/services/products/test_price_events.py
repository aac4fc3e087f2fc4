"""The events of changes of price: both prices, and who has changed it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mercato.chassis.contract import Actor, Internal, StaleVersion
from mercato.contracts.products import ArchiveProduct, CreateProduct, Product, Products, UpdateProduct
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail
from mercato.testing.tables import EVENTS


@pytest.fixture
def staff() -> Actor:
    return Actor("staff", 9)


async def made(products: Products, sku: str = "A") -> Product:
    request = CreateProduct(sku=sku, name="Thing", price_minor=1_000, currency="USD", category="things")
    return await products.create(request)


async def emitted(harness: ServiceHarness) -> list[dict[str, Any]]:
    sql = f"SELECT data::text FROM {EVENTS} WHERE type = 'product.price_changed' ORDER BY id"
    return [json.loads(data) for data in await harness.values(sql, of="products")]


async def test_a_change_of_price_is_emitted_with_both_prices_and_who_made_it(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        product = await made(products)
        await products.update(UpdateProduct(id=product.id, price="12.50"))
        await products.update(UpdateProduct(id=product.id, currency="EUR"))

    about = {"product_id": product.id, "actor_role": "staff", "actor_id": 9}
    dollars, more = {"old_price_minor": 1_000, "old_currency": "USD"}, {"price_minor": 1_250, "currency": "USD"}
    assert await emitted(harness) == [
        {**about, **dollars, **more, "version": 2},
        {**about, "old_price_minor": 1_250, "old_currency": "USD", "price_minor": 1_250, "currency": "EUR",
         "version": 3},
    ]  # fmt: skip
    assert [(e.subject, e.subject_id, e.version) for e in await harness.events(of="products")] == [
        ("product", product.id, 2),
        ("product", product.id, 3),
    ]


async def test_what_leaves_the_price_as_it_is_is_not_emitted(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff):
        product = await made(products)
        await products.update(UpdateProduct(id=product.id, name="Another", price_minor=1_000, currency="USD"))
        await products.update(UpdateProduct(id=product.id))
        with pytest.raises(StaleVersion):
            await products.update(UpdateProduct(id=product.id, price_minor=1, version=1))
        await products.archive(ArchiveProduct(id=product.id))
    assert await emitted(harness) == []


@pytest.mark.parametrize("point", ["before", "after"])
async def test_a_change_of_price_and_its_event_are_one(
    harness: ServiceHarness, products: Products, staff: Actor, inject: Inject, point: str
):
    with harness.acting(staff):
        product = await made(products)
        inject(f"products.update.{point}_commit", fail)
        with pytest.raises(Internal):
            await products.update(UpdateProduct(id=product.id, price_minor=900))
    [price] = await harness.values("SELECT price_minor FROM products WHERE id = $1", product.id, of="products")
    assert (price, len(await emitted(harness))) == ((900, 1) if point == "after" else (1_000, 0))
