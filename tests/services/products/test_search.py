"""Searching the catalogue: what is found, in which order, and that paging neither skips nor repeats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, InvalidRequest
from mercato.chassis.postgres.database import Database
from mercato.contracts.products import CreateProduct, Product, Products, SearchProducts, Sort
from mercato.services.products import demo, folding, rules, store
from mercato.testing.harness import ServiceHarness

SORTS: tuple[Sort, ...] = get_args(Sort)


async def stock(database: Database, *batches: Sequence[CreateProduct]) -> None:
    """Makes these the only products. Those of one batch are created at the same instant."""
    numbers = itertools.count(1)
    async with database.transaction() as tx:
        await tx.execute("DELETE FROM products")
    for batch in batches:
        async with database.transaction() as tx:
            numbered_batch = [(next(numbers), product) for product in batch]
            await store.insert_many(tx, numbered_batch)
            ids, found_by = [n for n, _ in numbered_batch], [rules.found_by(product) for _, product in numbered_batch]
            await store.fill_terms(tx, ids, found_by)


async def search(harness: ServiceHarness, products: Products, **wanted: Any) -> list[Product]:
    with harness.acting(ANONYMOUS_ACTOR):
        return list((await products.search(SearchProducts(**wanted))).products)


async def skus(harness: ServiceHarness, products: Products, **wanted: Any) -> set[str]:
    return {product.sku for product in await search(harness, products, **wanted)}


def selling(sku: str, name: str = "Thing", **fields: Any) -> CreateProduct:
    given: dict[str, Any] = {"price_minor": 100, "currency": "USD", "category": "things"} | fields
    return CreateProduct(sku=sku, name=name, **given)


async def demo_shop(database: Database) -> None:
    assert await demo.seed(database)


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("headphone", {"HEAD-100"}),
        ("HEADPHONES", {"HEAD-100"}),
        ("HEAD-100", {"HEAD-100"}),
        ("head-100", {"HEAD-100"}),
        ("wireless", {"MOUS-6", "EARB-101"}),
        ("wireless -earbuds", {"MOUS-6"}),
        ("wireless -earbud", {"MOUS-6"}),
        ("wireless -running", {"EARB-101"}),
        ('"noise cancelling"', {"HEAD-100"}),
        ('"cancelling noise"', set()),
        ("turntable or soundbar", {"TURN-104", "SBAR-105"}),
        ("office", {"LAMP-200", "CHAI-201", "STND-202", "NOTE-203", "BPAK-204"}),
        ("no such thing", set()),
        ("!?", set()),
    ],
)
async def test_words_find_products(
    harness: ServiceHarness, products: Products, database: Database, text: str, expected: set[str]
):
    await demo_shop(database)

    assert await skus(harness, products, text=text) == expected


async def test_words_that_a_language_leaves_out_find_what_is_called_so(
    harness: ServiceHarness, products: Products, database: Database
):
    await stock(database, [selling("A", "The Who"), selling("B", "Who Knows"), selling("C", "Nothing")])

    assert await skus(harness, products, text="the who") == {"A"}
    assert await skus(harness, products, text="who") == {"A", "B"}


async def test_a_blank_text_finds_everything(harness: ServiceHarness, products: Products, database: Database):
    await stock(database, [selling("A"), selling("B")])

    assert await skus(harness, products, text=" \t") == {"A", "B"}
    assert await skus(harness, products, text="") == {"A", "B"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sku=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
async def test_every_sku_finds_its_product(harness: ServiceHarness, products: Products, database: Database, sku: str):
    await stock(database, [selling(sku)])

    assert await skus(harness, products, text=sku) == {sku}


async def test_relevance_puts_the_name_before_the_category_before_the_description(
    harness: ServiceHarness, products: Products, database: Database
):
    await stock(
        database,
        [
            selling("D", description="A lamp, yes: a lamp."),
            selling("N", "Lamp"),
            selling("C", category="lamp"),
        ],
    )

    found = await search(harness, products, text="lamps", sort="relevance")

    assert [product.sku for product in found] == ["N", "C", "D"]


# ----------------------------------------------------------------------------------------------------------- filters


async def test_filters_work_together(harness: ServiceHarness, products: Products, database: Database):
    await stock(
        database,
        [
            selling("A", price_minor=100),
            selling("B", price_minor=200),
            selling("C", price_minor=200, currency="EUR"),
            selling("D", "Lamp", price_minor=300, category="lamps"),
        ],
    )

    assert await skus(harness, products, category="things") == {"A", "B", "C"}
    assert await skus(harness, products, category="No such category") == set()
    assert await skus(harness, products, currency="EUR") == {"C"}
    assert await skus(harness, products, currency="USD", min_price_minor=200) == {"B", "D"}
    assert await skus(harness, products, currency="USD", max_price_minor=200) == {"A", "B"}
    assert await skus(harness, products, currency="USD", min_price_minor=101, max_price_minor=299) == {"B"}
    assert await skus(harness, products, text="thing", category="things", currency="USD", min_price_minor=150) == {"B"}
    assert await skus(harness, products, text="lamp", category="things") == set()
    assert await skus(harness, products, min_price_minor=2, max_price_minor=1) == set()


async def test_prices_are_of_the_default_currency_where_none_is_given(
    harness: ServiceHarness, products: Products, database: Database
):
    await stock(database, [selling("A"), selling("B", currency="JPY")])

    assert await skus(harness, products, min_price_minor=0) == {"A"}
    assert await skus(harness, products) == {"A", "B"}


# ------------------------------------------------------------------------------------------------------------- order

SORT_KEYS: dict[Sort, Callable[[Product], Any]] = {
    "id": lambda product: product.id,
    "name": lambda product: (folding.sort_name(product.name), product.id),
    "-name": lambda product: (folding.sort_name(product.name), product.id),
    "price": lambda product: (product.price_minor, product.id),
    "-price": lambda product: (product.price_minor, product.id),
    "newest": lambda product: (product.created_at, product.id),
}
DESCENDING = {"-name", "-price", "newest"}


def in_order(found: Sequence[Product], sort: Sort) -> bool:
    return list(found) == sorted(found, key=SORT_KEYS[sort], reverse=sort in DESCENDING)


# Few different values, so that there are many equals: those are what paging gets wrong.
NAMES = st.sampled_from(["sold", "Sold", "sold sold", "Émile", "émile", "ß", "a", "B", "\U0010ffff" * 200, "zz", "-"])
PRODUCTS = st.lists(
    st.builds(
        lambda name, price, category: selling("S", name, price_minor=price, category=category, description="sold here"),
        NAMES | st.text(min_size=1, max_size=5).filter(lambda name: not rules._wrong_name(name)),
        st.sampled_from([0, 1, 10**12]),
        st.sampled_from(["a", "b"]),
    ),
    max_size=12,
)
SCOPES = st.sampled_from([{}, {"category": "a"}, {"text": "sold"}, {"text": "sold", "category": "a"}])


def numbered(batch: Sequence[CreateProduct], prefix: str) -> list[CreateProduct]:
    return [msgspec.structs.replace(product, sku=f"{prefix}{i}") for i, product in enumerate(batch)]


@pytest.mark.parametrize("sort", SORTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(older=PRODUCTS, newer=PRODUCTS, scope=SCOPES, limit=st.integers(1, 5))
async def test_pages_show_every_product_once_in_order_while_others_are_created(
    harness: ServiceHarness,
    products: Products,
    database: Database,
    staff: Actor,
    sort: Sort,
    older: list[CreateProduct],
    newer: list[CreateProduct],
    scope: dict[str, Any],
    limit: int,
):
    if sort == "relevance":
        scope = scope | {"text": "sold"}
    stocked = [*numbered(older, "O"), *numbered(newer, "N")]
    await stock(database, numbered(older, "O"), numbered(newer, "N"))
    seen: list[Product] = []
    after: str | None = None
    for page_number in range(len(stocked) + 5):
        with harness.acting(staff):
            page = await products.search(SearchProducts(sort=sort, after=after, limit=limit, **scope))
            if page_number < 3:
                await products.create(selling(f"MEANWHILE-{page_number}", "sold", category="a"))
        assert len(page.products) <= limit
        seen += page.products
        after = page.next_after
        if after is None:
            break
        assert len(page.products) == limit
    else:
        pytest.fail("the pages do not end")

    shown = [product.sku for product in seen]
    assert len(set(shown)) == len(shown)
    expected = {product.sku for product in stocked if "category" not in scope or product.category == scope["category"]}
    assert {sku for sku in shown if not sku.startswith("MEANWHILE")} == expected
    assert sort == "relevance" or in_order(seen, sort)


async def test_the_last_page_says_so_also_when_it_is_full(
    harness: ServiceHarness, products: Products, database: Database
):
    await stock(database, [selling("A"), selling("B")])

    with harness.acting(ANONYMOUS_ACTOR):
        full = await products.search(SearchProducts(limit=2))
        first = await products.search(SearchProducts(limit=1))
        last = await products.search(SearchProducts(limit=1, after=first.next_after))

    assert full.next_after is None
    assert first.next_after is not None
    assert (last.products[0].sku, last.next_after) == ("B", None)


# ----------------------------------------------------------------------------------------------------------- refusals


async def refusal(harness: ServiceHarness, products: Products, **wanted: Any) -> set[str]:
    with pytest.raises(InvalidRequest) as refused:
        await search(harness, products, **wanted)
    return {wrong.field for wrong in refused.value.errors}


async def test_a_cursor_belongs_to_its_sort(harness: ServiceHarness, products: Products, database: Database):
    await stock(database, [selling("A"), selling("B"), selling("C")])
    tokens: dict[Sort, str | None] = {}
    with harness.acting(ANONYMOUS_ACTOR):
        for sort in SORTS:
            tokens[sort] = (await products.search(SearchProducts(sort=sort, text="thing", limit=1))).next_after

    for sort, other in itertools.permutations(SORTS, 2):
        assert await refusal(harness, products, sort=sort, text="thing", after=tokens[other]) == {"after"}
        assert len(await search(harness, products, sort=sort, text="thing", after=tokens[sort])) == 2


@pytest.mark.parametrize("after", ["", "x", "!", "é", "bnVsbA", "W10", "A" * 100_000])
async def test_what_is_no_cursor_is_refused(harness: ServiceHarness, products: Products, after: str):
    for sort in SORTS:
        assert await refusal(harness, products, sort=sort, text="thing", after=after) == {"after"}


@pytest.mark.parametrize("text", [None, " "])
async def test_relevance_needs_a_text(harness: ServiceHarness, products: Products, text: str | None):
    assert await refusal(harness, products, sort="relevance", text=text) == {"sort"}


async def test_everything_wrong_with_a_search_is_named_at_once(harness: ServiceHarness, products: Products):
    wrong = await refusal(harness, products, text="a\0", category="a\0", currency="XXX", sort="newest", after="x")

    assert wrong == {"text", "category", "currency", "after"}
