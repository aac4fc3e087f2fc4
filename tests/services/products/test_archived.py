"""Archived products: only staff search them, and staff put them back. Products by their sku."""

from __future__ import annotations

from typing import Any

import pytest

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, Forbidden, InvalidRequest, StaleVersion
from mercato.contracts.products import (
    ArchiveProduct,
    CreateProduct,
    ProductNotFound,
    Products,
    QuoteProduct,
    RestoreProduct,
    SearchProducts,
)
from mercato.testing.actors import ALICE
from mercato.testing.harness import ServiceHarness


async def shop(harness: ServiceHarness, products: Products, staff: Actor) -> dict[str, int]:
    """Three products, of which B and C are archived; their ids by sku."""
    ids: dict[str, int] = {}
    with harness.acting(staff):
        for sku in ("A", "B", "C"):
            category = "things" if sku != "C" else "others"
            wanted = CreateProduct(sku=sku, name=f"Émile {sku}", price_minor=1, currency="USD", category=category)
            ids[sku] = (await products.create(wanted)).id
        await products.archive(ArchiveProduct(id=ids["B"]))
        await products.archive(ArchiveProduct(id=ids["C"]))
    return ids


async def skus(harness: ServiceHarness, products: Products, actor: Actor, **wanted: Any) -> list[str]:
    with harness.acting(actor):
        return [product.sku for product in (await products.search(SearchProducts(**wanted))).products]


async def test_staff_find_what_is_archived(harness: ServiceHarness, products: Products, staff: Actor):
    await shop(harness, products, staff)

    assert await skus(harness, products, staff) == ["A"]
    assert await skus(harness, products, staff, status="archived") == ["B", "C"]
    assert await skus(harness, products, staff, status="archived", category="things") == ["B"]
    assert await skus(harness, products, staff, status="archived", text="emi", sort="name") == ["B", "C"]
    assert await skus(harness, products, staff, text="emi") == ["A"]
    assert await skus(harness, products, staff, status="archived", sku="c") == ["C"]


async def test_what_is_archived_is_found_by_pages(harness: ServiceHarness, products: Products, staff: Actor):
    await shop(harness, products, staff)

    with harness.acting(staff):
        first = await products.search(SearchProducts(status="archived", limit=1))
    assert [product.sku for product in first.products] == ["B"]
    assert await skus(harness, products, staff, status="archived", limit=1, after=first.next_after) == ["C"]


@pytest.mark.parametrize("actor", [ANONYMOUS_ACTOR, ALICE], ids=lambda actor: actor.role)
async def test_only_staff_search_what_is_archived(
    harness: ServiceHarness, products: Products, staff: Actor, actor: Actor
):
    await shop(harness, products, staff)

    for wanted in ({}, {"sku": "B"}, {"text": "emile"}):
        with pytest.raises(Forbidden):
            await skus(harness, products, actor, status="archived", **wanted)
    assert await skus(harness, products, actor, text="emile") == ["A"]
    assert await skus(harness, products, actor, sku="B") == []


async def test_archived_products_are_sorted_by_id_alone(harness: ServiceHarness, products: Products, staff: Actor):
    with pytest.raises(InvalidRequest) as refused:
        await skus(harness, products, staff, status="archived", sort="name")
    assert [wrong.field for wrong in refused.value.errors] == ["sort"]


async def test_a_product_is_found_by_its_sku_without_case(harness: ServiceHarness, products: Products, staff: Actor):
    await shop(harness, products, staff)

    for wanted in ({}, {"sort": "name"}, {"category": "things"}, {"text": "emile"}):
        assert await skus(harness, products, ANONYMOUS_ACTOR, sku="a", **wanted) == ["A"]
    assert await skus(harness, products, ANONYMOUS_ACTOR, sku="A", category="others") == []
    assert await skus(harness, products, ANONYMOUS_ACTOR, sku="AA") == []
    with pytest.raises(InvalidRequest) as refused:
        await skus(harness, products, ANONYMOUS_ACTOR, sku="no sku")
    assert [wrong.field for wrong in refused.value.errors] == ["sku"]


async def test_a_restored_product_is_for_sale_again(harness: ServiceHarness, products: Products, staff: Actor):
    ids = await shop(harness, products, staff)

    with harness.acting(staff):
        restored = await products.restore(RestoreProduct(id=ids["B"], version=2))
        again = await products.restore(RestoreProduct(id=ids["B"], version=2))
        quote = await products.quote(QuoteProduct(id=ids["B"]))

    assert (restored.status, restored.version) == ("active", 3)
    assert again == restored
    assert quote.sku == "B"
    assert await skus(harness, products, ANONYMOUS_ACTOR) == ["A", "B"]


async def test_a_restoration_is_refused_to_others_of_another_version_and_of_no_product(
    harness: ServiceHarness, products: Products, staff: Actor
):
    ids = await shop(harness, products, staff)

    with harness.acting(ALICE), pytest.raises(Forbidden):
        await products.restore(RestoreProduct(id=ids["B"]))
    with harness.acting(staff):
        with pytest.raises(StaleVersion):
            await products.restore(RestoreProduct(id=ids["B"], version=1))
        with pytest.raises(ProductNotFound):
            await products.restore(RestoreProduct(id=4_040))
    assert await skus(harness, products, staff, status="archived") == ["B", "C"]
