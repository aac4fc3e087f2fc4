"""The demo data: complete, once, and only where there is nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor
from mercato.contracts.products import CreateProduct, GetProduct, Products, SearchProducts
from mercato.services.products import demo, rules
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail


def seed(harness: ServiceHarness) -> Awaitable[bool]:
    seed_demo = harness.host.services["products"].seed_demo
    assert seed_demo
    return seed_demo()


async def skus(harness: ServiceHarness, products: Products) -> list[str]:
    with harness.acting(ANONYMOUS_ACTOR):
        page = await products.search(SearchProducts(limit=200))
    return [product.sku for product in page.products]


async def test_the_demo_shop_sells_what_the_documentation_buys(harness: ServiceHarness, products: Products):
    assert await seed(harness) is True

    with harness.acting(ANONYMOUS_ACTOR):
        found = [await products.get(GetProduct(id=product_id)) for product_id in (1, 2, 100)]
    assert [(p.name, p.price_minor, p.currency) for p in found] == [
        ("Laptop", 1299_99, "USD"),
        ("Smartphone", 899_99, "USD"),
        ("Headphones", 99_99, "USD"),
    ]
    assert len(await skus(harness, products)) == len(demo.CATALOGUE)


async def test_the_demo_data_is_put_in_once(harness: ServiceHarness, products: Products):
    assert [await seed(harness), await seed(harness)] == [True, False]
    assert len(await skus(harness, products)) == len(demo.CATALOGUE)


async def test_a_shop_that_sells_anything_gets_no_demo_data(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff):
        await products.create(CreateProduct(sku="OWN", name="Own", price_minor=1, currency="USD", category="own"))

    assert await seed(harness) is False
    assert await skus(harness, products) == ["OWN"]


async def test_of_two_processes_that_seed_at_once_one_does(
    harness: ServiceHarness,
    products: Products,
    inject: Inject,
):
    second: list[asyncio.Future[bool]] = []

    async def seed_once_more(_point: str) -> None:
        if not second:
            second.append(asyncio.ensure_future(seed(harness)))
            await harness.until_blocked(of="products", by=second)

    inject(demo.SEED_BEFORE_COMMIT, seed_once_more)

    assert await seed(harness) is True
    assert await second[0] is False
    assert len(await skus(harness, products)) == len(demo.CATALOGUE)


async def test_a_failure_while_seeding_leaves_nothing(harness: ServiceHarness, products: Products, inject: Inject):
    inject(demo.SEED_BEFORE_COMMIT, fail)
    with pytest.raises(RuntimeError):
        await seed(harness)

    assert await skus(harness, products) == []


def test_the_demo_data_keeps_the_rules_and_its_range_of_ids():
    for product_id, product in demo.CATALOGUE:
        rules.check_product(product)
        assert 1 <= product_id <= 1000
        assert product.description
    assert len({product_id for product_id, _ in demo.CATALOGUE}) == len(demo.CATALOGUE)
    assert len({product.sku for _, product in demo.CATALOGUE}) == len(demo.CATALOGUE)
    assert len({product.category for _, product in demo.CATALOGUE}) == 4
