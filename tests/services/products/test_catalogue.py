"""Creating, reading, changing, archiving and quoting products, through the contract."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, Forbidden, Internal, InvalidRequest, StaleVersion
from mercato.chassis.observability import faults
from mercato.contracts.products import (
    ArchiveProduct,
    CreateProduct,
    GetProduct,
    Product,
    ProductArchived,
    ProductNotFound,
    Products,
    Quote,
    QuoteProduct,
    SearchProducts,
    SkuTaken,
    UpdateProduct,
)
from mercato.services.products import service
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail

CUSTOMER = Actor("customer", 7)
HEADPHONES = CreateProduct(
    sku="HEAD-1", name="Headphones", price_minor=9999, currency="USD", category="audio", description="To listen with."
)


def called(sku: str) -> CreateProduct:
    return CreateProduct(sku=sku, name=f"Product {sku}", price_minor=100, currency="EUR", category="things")


def wrong_fields(error: pytest.ExceptionInfo[InvalidRequest]) -> set[str]:
    return {wrong.field for wrong in error.value.errors}


# ------------------------------------------------------------------------------------------------------------ create


async def test_a_created_product_is_active_and_can_be_read(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff):
        created = await products.create(HEADPHONES)
    with harness.acting(ANONYMOUS_ACTOR):
        read = await products.get(GetProduct(id=created.id))

    assert read == created
    assert (created.sku, created.name, created.price_minor, created.currency) == ("HEAD-1", "Headphones", 9999, "USD")
    assert (created.category, created.description) == ("audio", "To listen with.")
    assert (created.status, created.version) == ("active", 1)
    assert created.created_at == created.updated_at
    assert created.created_at.utcoffset() is not None


async def test_ids_of_new_products_begin_above_those_of_the_demo(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        assert (await products.create(HEADPHONES)).id > 1000


async def test_a_sku_belongs_to_one_product(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff):
        await products.create(HEADPHONES)
        with pytest.raises(SkuTaken) as taken:
            await products.create(HEADPHONES)

    assert taken.value.sku == "HEAD-1"


async def test_of_two_concurrent_creations_of_a_sku_one_is_refused(
    harness: ServiceHarness,
    products: Products,
    staff: Actor,
    inject: Inject,
):
    second: list[asyncio.Task[Product]] = []

    async def create_once_more(_point: str) -> None:
        if not second:
            # The call of another request: it knows nothing of the transaction that this one is in.
            second.append(asyncio.create_task(once_more(), context=contextvars.Context()))
            await harness.until_blocked(of="products", by=second)

    async def once_more() -> Product:
        with harness.acting(staff):
            return await products.create(HEADPHONES)

    inject(service.CREATE_BEFORE_COMMIT, create_once_more)
    first = await once_more()

    with pytest.raises(SkuTaken):
        await second[0]
    assert first.sku == "HEAD-1"


async def test_a_currency_that_there_is_not_is_refused(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff), pytest.raises(InvalidRequest) as refused:
        await products.create(
            CreateProduct(sku="A", name="A", price_minor=1, currency="XXX", category="a", description="")
        )

    (wrong,) = refused.value.errors
    assert (wrong.field, wrong.message) == ("currency", "XXX is no currency of ISO 4217")


async def test_all_wrong_fields_are_named_at_once(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff), pytest.raises(InvalidRequest) as refused:
        await products.create(
            CreateProduct(
                sku="A", name=" \u200b ", price_minor=1, currency="XXX", category="audio", description="bell \x07"
            )
        )

    assert wrong_fields(refused) == {"name", "currency", "description"}


@pytest.mark.parametrize(("price", "minor", "currency"), [("90", 90, "JPY"), ("90.125", 90_125, "KWD")])
async def test_a_price_without_a_currency_is_one_of_the_products(
    harness: ServiceHarness, products: Products, staff: Actor, price: str, minor: int, currency: str
):
    with harness.acting(staff):
        made = await products.create(msgspec.structs.replace(HEADPHONES, currency=currency))
        changed = await products.update(UpdateProduct(id=made.id, price=price))
        with pytest.raises(InvalidRequest) as refused:
            await products.update(UpdateProduct(id=made.id, price="0.00001"))
        moved = await products.update(UpdateProduct(id=made.id, price="12.50", currency="EUR"))

    assert (changed.price_minor, changed.currency) == (minor, currency)
    assert wrong_fields(refused) == {"price"}
    assert (moved.price_minor, moved.currency) == (1_250, "EUR")


async def test_only_staff_changes_the_catalogue(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff):
        product = await products.create(HEADPHONES)
    with harness.acting(CUSTOMER):
        for call in (
            products.create(called("B")),
            products.update(UpdateProduct(id=product.id, name="Mine")),
            products.archive(ArchiveProduct(id=product.id)),
        ):
            with pytest.raises(Forbidden):
                await call


# --------------------------------------------------------------------------------------------------------------- get


async def test_a_batch_is_answered_in_its_order_each_for_itself(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        a, b = await products.create(called("A")), await products.create(called("B"))
        answers = await products.get.many([GetProduct(id=i) for i in (b.id, 999, a.id, b.id, 998)])

    assert [answers[0], answers[2], answers[3]] == [b, a, b]
    assert [(type(answers[i]), getattr(answers[i], "product_id", None)) for i in (1, 4)] == [
        (ProductNotFound, 999),
        (ProductNotFound, 998),
    ]


# ------------------------------------------------------------------------------------------------------------ update


async def test_an_update_changes_what_is_given_and_counts_the_version(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        before = await products.create(HEADPHONES)
        after = await products.update(UpdateProduct(id=before.id, version=1, price_minor=0, description=""))
        read = await products.get(GetProduct(id=before.id))

    assert read == after
    assert (after.price_minor, after.description, after.version) == (0, "", 2)
    assert (after.name, after.sku, after.created_at) == (before.name, before.sku, before.created_at)
    assert after.updated_at > before.updated_at


async def test_an_update_without_a_change_leaves_the_product_as_it_is(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        before = await products.create(HEADPHONES)

        assert await products.update(UpdateProduct(id=before.id, version=1)) == before
        assert await products.get(GetProduct(id=before.id)) == before


@pytest.mark.parametrize("change", [{"name": "Other"}, {}])
async def test_an_update_of_another_version_than_the_actual_changes_nothing(
    harness: ServiceHarness, products: Products, staff: Actor, change: dict[str, Any]
):
    with harness.acting(staff):
        product = await products.create(HEADPHONES)
        product = await products.update(UpdateProduct(id=product.id, name="New"))
        for version in (1, 3):
            with pytest.raises(StaleVersion) as stale:
                await products.update(UpdateProduct(id=product.id, version=version, **change))
            assert (stale.value.expected, stale.value.actual) == (version, 2)

        assert await products.get(GetProduct(id=product.id)) == product


async def test_of_two_updates_of_one_version_at_once_the_second_is_stale(
    harness: ServiceHarness,
    products: Products,
    staff: Actor,
    inject: Inject,
):
    second: list[asyncio.Task[Product]] = []

    async def update_to(name: str) -> Product:
        with harness.acting(staff):
            return await products.update(UpdateProduct(id=product.id, version=1, name=name))

    async def update_once_more(_point: str) -> None:
        if not second:
            second.append(asyncio.create_task(update_to("Second"), context=contextvars.Context()))
            await harness.until_blocked(of="products", by=second)

    with harness.acting(staff):
        product = await products.create(HEADPHONES)
    inject(service.UPDATE_BEFORE_COMMIT, update_once_more)
    first = await update_to("First")

    with pytest.raises(StaleVersion):
        await second[0]
    assert (first.name, first.version) == ("First", 2)


async def test_an_update_refuses_a_sku_that_is_taken_and_an_unknown_product(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        await products.create(called("A"))
        b = await products.create(called("B"))

        with pytest.raises(SkuTaken):
            await products.update(UpdateProduct(id=b.id, sku="A"))
        with pytest.raises(ProductNotFound):
            await products.update(UpdateProduct(id=999, sku="C"))
        with pytest.raises(InvalidRequest):
            await products.update(UpdateProduct(id=b.id, name="\t"))
        assert (await products.update(UpdateProduct(id=b.id, sku="B"))).sku == "B"


# ----------------------------------------------------------------------------------------------------------- archive


async def test_an_archived_product_can_be_read_but_not_found_or_quoted(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        kept, gone = await products.create(called("A")), await products.create(called("B"))
        archived = await products.archive(ArchiveProduct(id=gone.id, version=1))

        assert (archived.status, archived.version) == ("archived", 2)
        assert await products.get(GetProduct(id=gone.id)) == archived
        assert (await products.search(SearchProducts())).products == (kept,)
        assert (await products.search(SearchProducts(text="product"))).products == (kept,)
        assert (await products.search(SearchProducts(category="things"))).products == (kept,)
        with pytest.raises(ProductArchived):
            await products.quote(QuoteProduct(id=gone.id))


async def test_archiving_again_changes_nothing_whatever_the_version(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        product = await products.create(HEADPHONES)
        archived = await products.archive(ArchiveProduct(id=product.id, version=1))

        assert await products.archive(ArchiveProduct(id=product.id, version=1)) == archived
        assert await products.archive(ArchiveProduct(id=product.id)) == archived


async def test_archiving_another_version_or_an_unknown_product_is_refused(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        product = await products.create(HEADPHONES)

        with pytest.raises(StaleVersion):
            await products.archive(ArchiveProduct(id=product.id, version=2))
        with pytest.raises(ProductNotFound):
            await products.archive(ArchiveProduct(id=999))
        assert (await products.get(GetProduct(id=product.id))).status == "active"


async def test_an_archived_product_can_give_up_its_sku(harness: ServiceHarness, products: Products, staff: Actor):
    with harness.acting(staff):
        old = await products.create(HEADPHONES)
        await products.archive(ArchiveProduct(id=old.id))
        with pytest.raises(SkuTaken):
            await products.create(HEADPHONES)

        await products.update(UpdateProduct(id=old.id, sku="HEAD-1-OLD"))

        assert (await products.create(HEADPHONES)).id != old.id
        assert (await products.get(GetProduct(id=old.id))).status == "archived"


# ------------------------------------------------------------------------------------------------------------- quote


async def test_quotes_say_what_products_are_called_and_cost_now(
    harness: ServiceHarness, products: Products, staff: Actor
):
    with harness.acting(staff):
        a, b = await products.create(called("A")), await products.create(called("B"))
        await products.update(UpdateProduct(id=a.id, price_minor=250))
        await products.archive(ArchiveProduct(id=b.id))
    with harness.acting(CUSTOMER):
        quotes = await products.quote.many([QuoteProduct(id=i) for i in (b.id, a.id, 999, a.id, b.id)])

    quote = Quote(id=a.id, sku="A", name="Product A", price_minor=250, currency="EUR")
    assert [quotes[1], quotes[3]] == [quote, quote]
    assert [type(quotes[i]) for i in (0, 2, 4)] == [ProductArchived, ProductNotFound, ProductArchived]
    assert quotes[0] is not quotes[4]


async def test_an_anonymous_caller_gets_no_quote(harness: ServiceHarness, products: Products):
    with harness.acting(ANONYMOUS_ACTOR), pytest.raises(Forbidden):
        await products.quote(QuoteProduct(id=1))


# ------------------------------------------------------------------------------------------------------------ crashes


async def test_a_failure_before_the_commit_leaves_nothing_and_after_it_everything(
    harness: ServiceHarness, products: Products, staff: Actor
):
    """The caller gets no answer in either case; its next request must be answered correctly."""
    with harness.acting(staff):
        remove = faults.inject(service.CREATE_BEFORE_COMMIT, fail)
        with pytest.raises(Internal):
            await products.create(HEADPHONES)
        remove()
        assert (await products.search(SearchProducts())).products == ()

        remove = faults.inject(service.CREATE_AFTER_COMMIT, fail)
        with pytest.raises(Internal):
            await products.create(HEADPHONES)
        remove()
        with pytest.raises(SkuTaken):
            await products.create(HEADPHONES)
        (product,) = (await products.search(SearchProducts())).products

        for point, version in ((service.UPDATE_BEFORE_COMMIT, 1), (service.UPDATE_AFTER_COMMIT, 2)):
            remove = faults.inject(point, fail)
            with pytest.raises(Internal):
                await products.update(UpdateProduct(id=product.id, version=1, name="New"))
            remove()
            assert (await products.get(GetProduct(id=product.id))).version == version

        for point, status in ((service.ARCHIVE_BEFORE_COMMIT, "active"), (service.ARCHIVE_AFTER_COMMIT, "archived")):
            remove = faults.inject(point, fail)
            with pytest.raises(Internal):
                await products.archive(ArchiveProduct(id=product.id, version=2))
            remove()
            assert (await products.get(GetProduct(id=product.id))).status == status
        # The caller that got no answer asks again.
        assert (await products.archive(ArchiveProduct(id=product.id, version=2))).status == "archived"


# -------------------------------------------------------------------------------------------------------- odd Unicode

ODD = {
    "nul": "a\0b",
    "lone surrogate": "a\ud800b",
    "right to left": "\u05d0\u05d1 \u202eabc",
    "combining": "e" + "\u0301" * 150,
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "noncharacter": "\U0010ffff" * 200,
    "separators": "a\u2028b\u2029c\u0085d",
    "long": "x" * 10_000,
    "long and wide": "\U0001f600" * 10_000,
    "query syntax": "a & | ! <-> :* ' \" \\ ( ) %",
}


SKU_NUMBERS = itertools.count(1)


def new_sku() -> str:
    return f"ODD-{next(SKU_NUMBERS)}"


def passes(harness: ServiceHarness, text: str) -> bool:
    """What is no text in bytes never gets over a wire: only this process can send it."""
    return harness.transport == "local" or text.encode(errors="ignore").decode() == text


async def keep_or_refuse(harness: ServiceHarness, products: Products, staff: Actor, text: str) -> None:
    """Creates, searches and filters with the text: either it works, and the text is kept, or it is invalid."""
    with harness.acting(staff):
        for request in (
            CreateProduct(sku=new_sku(), name=text, price_minor=1, currency="USD", category="odd"),
            CreateProduct(sku=new_sku(), name="D", price_minor=1, currency="USD", category="odd", description=text),
        ):
            try:
                product = await products.create(request)
            except InvalidRequest:
                continue
            assert (product.name, product.description) == (request.name, request.description)
            assert await products.get(GetProduct(id=product.id)) == product
        for search in (
            SearchProducts(text=text),
            SearchProducts(text=f'"{text}" -{text}'[:200]),
            SearchProducts(category=text),
            SearchProducts(after=text),
        ):
            try:
                await products.search(search)
            except InvalidRequest:
                continue


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
async def test_odd_text_is_kept_as_it_is_or_refused_as_invalid(
    harness: ServiceHarness, products: Products, staff: Actor, text: str
):
    if not passes(harness, text):
        pytest.skip("never gets over a wire")
    await keep_or_refuse(harness, products, staff, text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), min_size=1, max_size=190))
async def test_any_text_is_kept_as_it_is_or_refused_as_invalid(
    harness: ServiceHarness, products: Products, staff: Actor, text: str
):
    assume(passes(harness, text))
    await keep_or_refuse(harness, products, staff, text)
