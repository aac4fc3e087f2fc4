"""Products are found as people type: by beginnings, without case, accents and punctuation, and in any script."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings, strategies as st

from mercato import topology
from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor
from mercato.chassis.postgres.database import Database
from mercato.contracts.products import (
    ArchiveProduct,
    CreateProduct,
    Product,
    Products,
    RestoreProduct,
    SearchProducts,
    UpdateProduct,
)
from mercato.services.products import folding, rules, store
from mercato.services.products.service import FILL_LIMIT, ProductsService
from mercato.testing.cluster import Cluster
from mercato.testing.databases import fresh_dsn
from mercato.testing.harness import ServiceHarness
from mercato.testing.tables import connected

FULL_WIDTH_12 = "\uff11\uff12"
DOTLESS = "Is\u0131t\u0131c\u0131"
HALF_WIDTH_GLASS = "\uff76\uff9e\uff97\uff7d"

# What is typed, and the name, sku and description of what it finds.
SEARCHES = {
    "a name without its accents": ("jalapeno", "Jalapeño Sauce", "X", ""),
    "accents that a name lacks": ("crème", "Creme Brulee Torch", "X", ""),
    "decomposed accents": (unicodedata.normalize("NFD", "pokémon"), "Pokémon Cards", "X", ""),
    "the beginning of a name": ("lap", "Laptop", "X", ""),
    "the beginning of a later word": ("key", "Mechanical Keyboard", "X", ""),
    "the beginning of a sku": ("KB61", "Thing", "KB6100-DE", ""),
    "a sku without its punctuation": ("abc123", "Thing", "ABC-123", ""),
    "the beginning of a sku without its punctuation": ("abc12", "Thing", "ABC-123-X", ""),
    "a word without its hyphen": ("usbc", "USB-C Cable", "X", ""),
    "a hyphen that a name lacks": ("usb-c", "USBC Cable", "X", ""),
    "a blank that a name lacks": ("usb c", "USBC Cable", "X", ""),
    "two words that are one": ("head phones", "Headphones", "X", ""),
    "one word that is two": ("doorbell", "Door Bell", "X", ""),
    "a name without its apostrophe": ("loreal", "L'Oréal Shampoo", "X", ""),
    "another apostrophe": ("levi\u2019s", "Levi's 501", "X", ""),
    "full-width digits": (f"iphone {FULL_WIDTH_12}", "iPhone 12", "X", ""),
    "digits where a name has full-width ones": ("iphone 12", f"iPhone {FULL_WIDTH_12}", "X", ""),
    "ss for ß": ("strasse", "Straße im Regen", "X", ""),
    "ß for ss": ("Großes", "Grosses Zelt", "X", ""),
    "a dotted i for a dotless one": ("isitici", DOTLESS, "X", ""),
    "a capital dotted i": ("istanbul", "\u0130stanbul Map", "X", ""),
    "a letter that keyboards lack": ("smorrebrod", "Smørrebrød Knife", "X", ""),
    "an ae for æ": ("aebler", "Æbler", "X", ""),
    "a ligature": ("office", "O\ufb03ce Lamp", "X", ""),
    "a part of a Japanese name": ("ラーメン", "特製味噌ラーメン鉢", "X", ""),
    "one Han character": ("茶", "日本緑茶", "X", ""),
    "hiragana for katakana": ("らーめん", "特製ラーメン鉢", "X", ""),
    "half-width katakana": (HALF_WIDTH_GLASS, "耐熱ガラス", "X", ""),
    "a part of a Chinese name": ("无线耳机", "高级无线耳机套装", "X", ""),
    "a part of a Thai name": ("กาแฟ", "เครื่องชงกาแฟ", "X", ""),
    "a Greek name without its tonos": ("καφες", "Καφές", "X", ""),
    "an Arabic name without its points": ("قهوة", "\u0642\u064e\u0647\u0652\u0648\u064e\u0629", "X", ""),
    "a unit without its blank": ("65w", "Charger 65 W", "X", ""),
    "a number without its blank": ("20000", "Power Bank 20 000 mAh", "X", ""),
    "a description without its accents": ("piment", "Thing", "X", "Au pimént doux."),
    "a part of a Chinese description": ("降噪", "Thing", "X", "主动降噪耳机"),
}


def selling(sku: str, name: str = "Thing", **fields: Any) -> CreateProduct:
    given: dict[str, Any] = {"price_minor": 100, "currency": "USD", "category": "goods"} | fields
    return CreateProduct(sku=sku, name=name, **given)


async def found(harness: ServiceHarness, products: Products, **wanted: Any) -> list[Product]:
    with harness.acting(ANONYMOUS_ACTOR):
        return list((await products.search(SearchProducts(**wanted))).products)


async def create(harness: ServiceHarness, products: Products, staff: Actor, *wanted: CreateProduct) -> list[Product]:
    with harness.acting(staff):
        return [await products.create(product) for product in wanted]


async def skus(harness: ServiceHarness, products: Products, **wanted: Any) -> list[str]:
    return [product.sku for product in await found(harness, products, **wanted)]


@pytest.mark.parametrize("example", SEARCHES.values(), ids=SEARCHES.keys())
async def test_what_people_type_finds_the_product_and_no_other(
    harness: ServiceHarness, products: Products, staff: Actor, example: tuple[str, str, str, str]
):
    text, name, sku, description = example
    other = selling("OTHER", "Велосипед", description="Zwei Räder.")
    await create(harness, products, staff, other, selling(sku, name, description=description))

    assert await skus(harness, products, text=text) == [sku]


async def test_each_word_of_a_search_may_be_found_in_another_way(
    harness: ServiceHarness, products: Products, staff: Actor
):
    await create(
        harness, products, staff, selling("A", "Laptop Battery"), selling("B", "Laptop"), selling("C", "Battery")
    )

    assert await skus(harness, products, text="batteries lap") == ["A"]
    assert await skus(harness, products, text="lap -batteries") == ["B"]
    assert await skus(harness, products, text="lap -bat") == ["A", "B"]
    assert await skus(harness, products, text="-batteries") == ["B"]
    assert await skus(harness, products, text="the lap for batteries") == ["A"]
    assert await skus(harness, products, text="lap or batteries") == ["A", "B", "C"]
    assert await skus(harness, products, text="lap or") == ["A", "B"]


async def test_the_beginning_of_a_word_is_looked_for_in_names_and_not_in_descriptions(
    harness: ServiceHarness, products: Products, staff: Actor
):
    await create(harness, products, staff, selling("A", description="For a laptop."), selling("B", "Laptop"))

    assert await skus(harness, products, text="lap") == ["B"]
    assert await skus(harness, products, text="laptop") == ["A", "B"]


async def test_a_phrase_is_found_as_it_stands(harness: ServiceHarness, products: Products, staff: Actor):
    await create(
        harness, products, staff, selling("A", "The Who"), selling("B", "Who, the"), selling("C", "Crème usb-c 緑茶")
    )

    assert await skus(harness, products, text='"the who"') == ["A"]
    assert await skus(harness, products, text='"creme usb c"') == ["C"]
    assert await skus(harness, products, text='"c 緑茶"') == ["C"]
    assert await skus(harness, products, text='"usb creme"') == []
    assert await skus(harness, products, text='"緑茶') == ["C"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200).filter(rules._is_storable), name=st.text(min_size=1, max_size=200))
async def test_any_text_can_be_a_name_and_be_searched(
    harness: ServiceHarness, products: Products, database: Database, text: str, name: str
):
    storable = name if rules._wrong_name(name) is None else "Thing"
    async with database.transaction() as tx:
        await tx.execute("DELETE FROM products")
        await store.insert(tx, (product := selling("A", storable)), rules.found_by(product))

    await found(harness, products, text=text)
    quoted = '"{}"'.format(storable.replace('"', " "))
    assert await skus(harness, products, text=quoted) == (["A"] if folding.fold(storable) else [])


@given(st.text())
def test_folding_a_folded_text_changes_nothing(text: str):
    assert folding.fold(folding.fold(text)) == folding.fold(text)


async def test_the_longest_texts_can_be_stored_and_found(harness: ServiceHarness, products: Products, staff: Actor):
    widest = "\ufdfa"  # folds into eighteen characters
    longest = selling("A", widest * 200, description=widest * 9_990 + " jalapeño")
    various = selling(
        "B", "".join(map(chr, range(0x4E00, 0x4E00 + 200))), description="".join(map(chr, range(0x5000, 0x7710)))
    )
    await create(harness, products, staff, longest, various)

    assert await skus(harness, products, text=widest) == ["A"]
    assert await skus(harness, products, text=chr(0x6000) + chr(0x6001)) == ["B"]
    assert await skus(harness, products, sort="name") == ["A", "B"]


# --------------------------------------------------------------------------------------------------------------- names


async def test_names_are_sorted_without_case_and_accents(harness: ServiceHarness, products: Products, staff: Actor):
    names = ["Zebra", "émile", "Eclair", "apple", "Ärmel", "Banana", "\u0130zmir", "ink", "Straße", "Strasbourg"]
    await create(harness, products, staff, *(selling(f"S{i}", name) for i, name in enumerate(names)))

    sorted_names = [product.name for product in await found(harness, products, sort="name")]

    assert sorted_names == [
        "apple",
        "Ärmel",
        "Banana",
        "Eclair",
        "émile",
        "ink",
        "\u0130zmir",
        "Strasbourg",
        "Straße",
        "Zebra",
    ]
    assert [product.name for product in await found(harness, products, sort="-name")] == sorted_names[::-1]


# ----------------------------------------------------------------------------------------------- terms that are missing


async def without_terms(database: Database, *names: str) -> None:
    """Products as a version of the service without terms has written them."""
    async with database.transaction() as tx:
        await tx.execute("DELETE FROM products")
        await store.insert_many(tx, [(1 + i, selling(f"S{i}", name)) for i, name in enumerate(names)])


async def test_a_product_without_terms_is_found_as_before_and_like_the_others_once_they_are_made(
    harness: ServiceHarness, products: Products, database: Database
):
    service = ProductsService(database)
    await without_terms(database, "Jalapeño Sauces", "émile", "Zebra")

    assert await skus(harness, products, text="jalapeño sauce") == ["S0"]
    assert await skus(harness, products, text="sauces -zebra", sort="relevance") == ["S0"]
    assert await skus(harness, products, sort="name") == ["S0", "S2", "S1"]
    assert await service.fill_terms() == 3

    assert await skus(harness, products, text="jalapeno sau") == ["S0"]
    assert await skus(harness, products, sort="name") == ["S1", "S0", "S2"]
    assert await service.fill_terms() == 0


async def test_terms_are_made_in_rounds_without_a_new_version(database: Database, products: Products):
    service = ProductsService(database)
    await without_terms(database, *("Émile",) * (FILL_LIMIT + 1))

    assert [await service.fill_terms() for _ in range(3)] == [FILL_LIMIT, 1, 0]
    async with database.read() as tx:
        assert {row.version for row in await store.by_ids(tx, list(range(1, FILL_LIMIT + 2)))} == {1}


async def test_a_change_by_a_version_without_terms_is_found_after_the_next_round(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    (made,) = await create(harness, products, staff, selling("A", "Émile"))
    async with database.transaction() as tx:
        await tx.execute("UPDATE products SET name = 'Zoë', version = version + 1 WHERE id = $1", made.id)

    assert await skus(harness, products, text="zoë") == ["A"]
    assert await ProductsService(database).fill_terms() == 1
    assert await skus(harness, products, text="zoe") == ["A"]
    assert await skus(harness, products, text="emile") == []


async def test_every_change_keeps_the_terms(
    harness: ServiceHarness, products: Products, database: Database, staff: Actor
):
    (made,) = await create(harness, products, staff, selling("A-1", "Émile"))
    with harness.acting(staff):
        await products.update(UpdateProduct(id=made.id, price_minor=5))
        assert await skus(harness, products, text="emi") == ["A-1"]
        await products.update(UpdateProduct(id=made.id, name="Zoë"))
        await products.archive(ArchiveProduct(id=made.id))
        await products.restore(RestoreProduct(id=made.id))

    assert await skus(harness, products, text="emi") == []
    assert await skus(harness, products, text="zo a1") == ["A-1"]
    assert await ProductsService(database).fill_terms() == 0


# --------------------------------------------------------------------------------------------------------------- plans


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled_dsn(cluster: Cluster) -> AsyncGenerator[str]:
    """A database of 20 000 products, 10 of them archived, 10 without terms, 20 of them lamps.

    The tests only read it.
    """
    async with (
        fresh_dsn(cluster, "products", topology.migrations("products")) as dsn,
        connected(dsn) as connection,
    ):
        await connection.execute(
            """
            INSERT INTO products (id, sku, name, description, price_minor, currency, category, status, terms, sort_name,
                                  terms_version)
            SELECT n, 'S-' || n, 'Thing ' || n, '', n, 'USD', 'c' || n % 100,
                   CASE WHEN n % 2000 = 3 THEN 'archived' ELSE 'active' END,
                   CASE WHEN n % 1000 = 5 THEN '''lamp'':1A' ELSE '''thing'':1A' END::tsvector, 'thing ' || n,
                   CASE WHEN n % 2000 = 7 THEN NULL ELSE 1 END
              FROM generate_series(1, 20000) n
            """
        )
        await connection.execute("ANALYZE products")
        yield dsn


@pytest_asyncio.fixture
async def filled(filled_dsn: str) -> AsyncGenerator[Any]:
    """A connection to that database."""
    async with connected(filled_dsn) as connection:
        yield connection


CASES = {
    "all": ("all", {}),
    "category": ("category", {"category": "c7"}),
    "archived": ("archived", {"status": "archived"}),
    "sku": ("sku", {"sku": "s-77"}),
    "text": ("text", {"text": "('lam':*AB | 'lam')"}),
}


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize(
    ("case", "sort"),
    [
        (case, sort)
        for case, sort in itertools.product(CASES, ("id", "name", "-name", "price", "newest", "relevance"))
        if (CASES[case][0], sort) in store.SEARCH_SQL
    ],
)
async def test_no_search_reads_much_more_than_it_gives(filled: Any, mode: str, case: str, sort: Any):
    scope, given = CASES[case]
    if scope == "text" and mode == "force_custom_plan" and sort != "relevance":
        pytest.skip("PostgreSQL takes a beginning for common, and reads the index of the sort until the page is full")
    if scope == "category" and sort != "id":
        pytest.skip("a category is sorted as a whole")
    await filled.execute(f"SET plan_cache_mode = {mode}")
    sql = store.SEARCH_SQL[scope, sort]  # type: ignore[index]
    key = rules.BEGINNING[sort].key
    kind = {"price": "bigint", "newest": "timestamptz", "relevance": "real"}.get(sort, "text")
    types = f"text, text, text, bigint, bigint, bigint, {kind}, bigint, text, text"
    await filled.execute(f"PREPARE page ({types}) AS {sql}")
    values = [given.get("text"), given.get("category"), None, None, None, 51, key, 2**53 if sort == "-name" else 0]
    values += [given.get("sku"), given.get("status", "active")]
    plan = await filled.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page ({', '.join(map(literal, values))})")

    assert rows_read(plan) <= 200, plan


def literal(value: Any) -> str:
    return (
        "NULL"
        if value is None
        else str(value)
        if isinstance(value, int | float)
        else "'{}'".format(str(value).replace("'", "''"))
    )


def rows_read(plan: str) -> int:
    def read(node: dict[str, Any]) -> int:
        removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        own = node["Actual Rows"] + removed if "Relation Name" in node else 0
        return int(own) + sum(read(part) for part in node.get("Plans", ()))

    return read(json.loads(plan)[0]["Plan"])
