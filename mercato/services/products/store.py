"""Every SQL statement of the products service.

A write of a text of a product also writes its search terms (`folding.FoundBy`), and `terms_version`. An older version
of the service has written rows without terms; `fill_terms` adds them.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Final

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.products import CreateProduct, Sort, Status, UpdateProduct

from .folding import FoundBy, ParsedSearch
from .rules import Scope, Search

SKU_KEY: Final = "products_sku_key"
"""The unique key that refuses a second product with the same sku."""


class ProductRow(Row, frozen=True, gc=False):
    id: int
    sku: str
    name: str
    description: str
    price_minor: int
    currency: str
    category: str
    status: Status
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    in_stock: bool


class FoundRow(ProductRow, frozen=True, gc=False):
    """A product that a search found. `relevance` is its rank for the text searched for, 0 without one."""

    sort_name: str
    relevance: float


class SkuRow(ProductRow, frozen=True, gc=False):
    """A product that was found by a sku: `wanted`."""

    wanted: str


class QuoteRow(Row, frozen=True, gc=False):
    id: int
    sku: str
    name: str
    price_minor: int
    currency: str
    status: Status


async def insert(tx: Tx, product: CreateProduct, found_by: FoundBy) -> ProductRow:
    """Raises `UniqueViolation` of `SKU_KEY`, also where a concurrent transaction creates the other product."""
    row = await tx.fetch_one(
        ProductRow,
        """
        INSERT INTO products (sku, name, description, price_minor, currency, category, terms, sort_name, terms_version)
        VALUES ($1, $2, $3, $4, $5, $6,
                setweight(to_tsvector('pg_catalog.english', $7), 'A')
                || setweight(to_tsvector('pg_catalog.english', $8), 'B')
                || setweight(to_tsvector('pg_catalog.english', $9), 'D')
                || $10::text::tsvector,
                $11, 1)
        RETURNING id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
                  in_stock
        """,
        product.sku,
        product.name,
        product.description,
        product.price_minor,
        product.currency,
        product.category,
        found_by.stemmed_name,
        found_by.stemmed_labels,
        found_by.stemmed_description,
        found_by.terms,
        found_by.sort_name,
    )
    assert row is not None
    return row


async def by_ids(tx: Tx, ids: Sequence[int]) -> list[ProductRow]:
    """The products that exist, in no order."""
    return await tx.fetch(
        ProductRow,
        """
        SELECT id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
               in_stock
          FROM products
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )


async def by_skus(tx: Tx, skus: Sequence[str]) -> list[SkuRow]:
    """The products that exist, in no order: by the exact sku, else without case, by the lowest id."""
    return await tx.fetch(
        SkuRow,
        """
        SELECT p.id, p.sku, p.name, p.description, p.price_minor, p.currency, p.category, p.status, p.created_at,
               p.updated_at, p.version, p.in_stock, w.sku AS wanted
          FROM unnest($1::text[]) AS w (sku)
         CROSS JOIN LATERAL (
            SELECT *
              FROM products
             WHERE lower(sku) = lower(w.sku)
             ORDER BY sku <> w.sku, id
             LIMIT 1
         ) p
        """,
        skus,
    )


async def quotes(tx: Tx, ids: Sequence[int]) -> list[QuoteRow]:
    """The products that exist, in no order."""
    return await tx.fetch(
        QuoteRow,
        """
        SELECT id, sku, name, price_minor, currency, status
          FROM products
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )


async def lock(tx: Tx, product_id: int) -> ProductRow | None:
    """The product. No other transaction changes it until this one ends."""
    return await tx.fetch_one(
        ProductRow,
        """
        SELECT id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
               in_stock
          FROM products
         WHERE id = $1
           FOR UPDATE
        """,
        product_id,
    )


async def update(tx: Tx, change: UpdateProduct, found_by: FoundBy) -> ProductRow:
    """Changes the given fields of a locked product. Raises `UniqueViolation` of `SKU_KEY`."""
    row = await tx.fetch_one(
        ProductRow,
        """
        UPDATE products
           SET sku = coalesce($2, sku),
               name = coalesce($3, name),
               description = coalesce($4, description),
               price_minor = coalesce($5, price_minor),
               currency = coalesce($6, currency),
               category = coalesce($7, category),
               terms = setweight(to_tsvector('pg_catalog.english', $8), 'A')
                       || setweight(to_tsvector('pg_catalog.english', $9), 'B')
                       || setweight(to_tsvector('pg_catalog.english', $10), 'D')
                       || $11::text::tsvector,
               sort_name = $12,
               terms_version = version + 1,
               updated_at = now(),
               version = version + 1
         WHERE id = $1
        RETURNING id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
                  in_stock
        """,
        change.id,
        change.sku,
        change.name,
        change.description,
        change.price_minor,
        change.currency,
        change.category,
        found_by.stemmed_name,
        found_by.stemmed_labels,
        found_by.stemmed_description,
        found_by.terms,
        found_by.sort_name,
    )
    assert row is not None, f"product {change.id} was not locked before"
    return row


async def set_status(tx: Tx, product_id: int, status: Status) -> ProductRow:
    """Archives a locked product, or restores it. It must have the other status."""
    row = await tx.fetch_one(
        ProductRow,
        """
        UPDATE products
           SET status = $2,
               updated_at = now(),
               version = version + 1,
               terms_version = CASE WHEN terms_version = version THEN version + 1 ELSE terms_version END
         WHERE id = $1 AND status <> $2
        RETURNING id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
                  in_stock
        """,
        product_id,
        status,
    )
    assert row is not None, f"product {product_id} was not locked before, or is {status} already"
    return row


# ------------------------------------------------------------------------------------------------------------- stock


async def store_stock(tx: Tx, product_ids: Sequence[int], in_stock: Sequence[bool], versions: Sequence[int]) -> int:
    """Stores whether each product is in stock; gives how many rows have changed.

    `versions` are those of the levels. Events older than the stored ones change nothing, in whatever order they come.
    """
    # Locked in the order of ids first: two transactions with the same products in different orders would deadlock.
    return await tx.execute(
        """
        WITH locked AS MATERIALIZED (
            SELECT id FROM products WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE
        )
        UPDATE products p
           SET in_stock = n.in_stock, stock_version = n.version
          FROM locked
          JOIN unnest($1::bigint[], $2::boolean[], $3::bigint[]) AS n (id, in_stock, version) USING (id)
         WHERE p.id = locked.id AND p.stock_version < n.version
        """,
        product_ids,
        in_stock,
        versions,
    )


# ------------------------------------------------------------------------------------------------------------ search

# Every statement takes the same values: $1 a tsquery as text, $2 category, $3 currency, $4 and $5 the range of prices,
# $6 the number of rows, $7 and $8 key and id of the cursor, $9 sku, $10 status. `$n IS NULL` is for a value that a
# statement does not use; it also asserts that there is none. A value that selects the index is a condition of its own;
# a value that only filters is an `IS NULL OR`, which no index can serve while the values are unknown: so a generic plan
# reads the index of the sort, too, instead of, for example, the index of prices for a range of nearly all prices. The
# status is a constant where its index is partial.

_COLUMNS: Final = """
SELECT id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version, in_stock,
       coalesce(sort_name, lower(name COLLATE "C")) AS sort_name, """

_WITHOUT_TEXT: Final = """
  FROM products
 WHERE $1::text IS NULL"""

# A row without terms is ranked by its words.
_RANK: Final = "ts_rank(CASE WHEN terms_version = version THEN terms ELSE words END, query)"

_RELEVANCE: Final = {False: "0::real AS relevance", True: f"{_RANK} AS relevance"}

_SCOPES: Final[Mapping[Scope, str]] = {
    "all": f"""{_WITHOUT_TEXT}
   AND status = 'active' AND $10 = 'active' AND $2::text IS NULL AND $9::text IS NULL""",
    "category": f"""{_WITHOUT_TEXT}
   AND status = 'active' AND $10 = 'active' AND category = $2 AND $9::text IS NULL""",
    "archived": f"""{_WITHOUT_TEXT}
   AND status = 'archived' AND $10 = 'archived' AND ($2::text IS NULL OR category = $2) AND $9::text IS NULL""",
    "sku": f"""{_WITHOUT_TEXT}
   AND status = $10 AND ($2::text IS NULL OR category = $2) AND lower(sku) = lower($9)""",
    # Rows without terms are found by their ids: they are few, but PostgreSQL estimates that most rows are "distinct".
    "text": """
  FROM products
 CROSS JOIN (SELECT $1::text::tsquery AS query) AS asked
 WHERE (terms @@ query
        OR id = ANY (ARRAY(
           SELECT id FROM products WHERE terms_version IS DISTINCT FROM version AND words @@ $1::text::tsquery)))
   AND status = $10 AND ($2::text IS NULL OR category = $2) AND ($9::text IS NULL OR lower(sku) = lower($9))""",
}

_FILTERS: Final = """
   AND ($3::text IS NULL OR currency = $3)
   AND ($4::bigint IS NULL OR price_minor >= $4)
   AND ($5::bigint IS NULL OR price_minor <= $5)"""

# The id makes every key unique, so that no product is skipped or shown twice among equal keys. Descending sorts also
# descend by id, so that each reads one index in one direction. Names are sorted folded, by code point: the same on
# every server, whatever its locale.
_ORDERS: Final[Mapping[Sort, str]] = {
    "id": """
   AND $7::text IS NULL AND id > $8
 ORDER BY id""",
    "name": """
   AND (coalesce(sort_name, lower(name COLLATE "C")), id) > ($7::text COLLATE "C", $8)
 ORDER BY coalesce(sort_name, lower(name COLLATE "C")), id""",
    "-name": """
   AND (coalesce(sort_name, lower(name COLLATE "C")), id) < ($7::text COLLATE "C", $8)
 ORDER BY coalesce(sort_name, lower(name COLLATE "C")) DESC, id DESC""",
    "price": """
   AND (price_minor, id) > ($7::bigint, $8)
 ORDER BY price_minor, id""",
    "-price": """
   AND (price_minor, id) < ($7::bigint, $8)
 ORDER BY price_minor DESC, id DESC""",
    "newest": """
   AND (created_at, id) < ($7::timestamptz, $8)
 ORDER BY created_at DESC, id DESC""",
    "relevance": f"""
   AND ({_RANK}, id) < ($7::real, $8)
 ORDER BY relevance DESC, id DESC""",
}

_LIMIT: Final = """
 LIMIT $6
"""

SEARCH_SQL: Final[Mapping[tuple[Scope, Sort], str]] = {
    (scope, sort): _COLUMNS + _RELEVANCE[scope == "text"] + _SCOPES[scope] + _FILTERS + _ORDERS[sort] + _LIMIT
    for scope in _SCOPES
    for sort in _ORDERS
    if (scope == "text" or sort != "relevance") and (scope != "archived" or sort == "id")
}


# The same values without those of the page. They are renumbered, because a statement must use every value.
COUNT_SQL: Final[Mapping[Scope, str]] = {
    scope: "SELECT count(*)" + (matched + _FILTERS).replace("$10", "$7").replace("$9", "$6")
    for scope, matched in _SCOPES.items()
}


async def query_of(tx: Tx, parsed: ParsedSearch) -> str:
    """The tsquery of a search, as text. Without a word it is empty, and finds nothing.

    A word is stemmed, and left out where it is a stop word ("the"), unless all words are ("The Who"). Each word has its
    own alternatives, instead of one for all words: "-shoes" must not find the shoes that "-shoe" leaves.
    """
    found = await tx.fetch_values(
        str,
        """
        SELECT (ltrim(coalesce(
                   string_agg(joiner || '(' || query || ')', '' ORDER BY n) FILTER (WHERE is_meant),
                   string_agg(joiner || '(' || query || ')', '' ORDER BY n), ''), ' &|')::tsquery
                || $7::text::tsquery)::text
          FROM (
                SELECT n, joiner, (stems || stems_as_typed || terms::tsquery)::text AS query,
                       numnode(stems) > 0 OR NOT may_be_stop_word AS is_meant
                  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::boolean[], $6::boolean[])
                       WITH ORDINALITY AS u (joiner, folded, raw, terms, is_phrase, may_be_stop_word, n)
                 CROSS JOIN LATERAL (
                    SELECT CASE WHEN is_phrase THEN phraseto_tsquery('pg_catalog.english', folded)
                                ELSE plainto_tsquery('pg_catalog.english', folded)
                           END AS stems,
                           CASE WHEN is_phrase THEN phraseto_tsquery('pg_catalog.english', raw)
                                ELSE plainto_tsquery('pg_catalog.english', raw)
                           END AS stems_as_typed
                 ) AS stemmed
          ) AS units
        """,
        [unit.joiner for unit in parsed.units],
        [unit.folded for unit in parsed.units],
        [unit.raw for unit in parsed.units],
        [unit.terms for unit in parsed.units],
        [unit.is_phrase for unit in parsed.units],
        [unit.may_be_stop_word for unit in parsed.units],
        parsed.joined,
    )
    return found[0]


async def search(tx: Tx, search: Search, query: str | None) -> list[FoundRow]:
    """The products after the cursor, in the order of the sort: one more than a page, if there is one more.

    `query`: the result of `query_of` for the text of the search; None without one.
    """
    return await tx.fetch(
        FoundRow,
        SEARCH_SQL[search.scope, search.sort],
        query,
        search.category,
        search.currency,
        search.min_price_minor,
        search.max_price_minor,
        search.limit + 1,
        search.after.key,
        search.after.id,
        search.sku,
        search.status,
    )


async def count(tx: Tx, search: Search, query: str | None) -> int:
    """The number of products on all pages of `search`."""
    found = await tx.fetch_values(
        int,
        COUNT_SQL[search.scope],
        query,
        search.category,
        search.currency,
        search.min_price_minor,
        search.max_price_minor,
        search.sku,
        search.status,
    )
    return found[0]


# --------------------------------------------------------------------------------------------------------- categories


class CategoryRow(Row, frozen=True, gc=False):
    category: str
    products: int


CATEGORIES_SQL: Final = """
WITH RECURSIVE found (category, n) AS (
    (SELECT category, 1 FROM products
      WHERE status = 'active' AND category > $1 ORDER BY category LIMIT 1)
    UNION ALL
    SELECT following.category, n + 1
      FROM found
     CROSS JOIN LATERAL (
        SELECT p.category FROM products p
         WHERE p.status = 'active' AND p.category > found.category ORDER BY p.category LIMIT 1
     ) following
     WHERE n < $2
)
SELECT found.category, counted.products
  FROM found
 CROSS JOIN LATERAL (
    SELECT count(*) AS products
      FROM (SELECT 1 FROM products p
             WHERE p.status = 'active' AND p.category = found.category LIMIT $3) AS these
 ) counted
 ORDER BY n
"""


async def categories(tx: Tx, after: str, limit: int, count_limit: int) -> list[CategoryRow]:
    """Up to `limit` categories of active products, by name, those after `after`; products are counted up to a limit."""
    return await tx.fetch(
        CategoryRow,
        CATEGORIES_SQL,
        after,
        limit,
        count_limit,
    )


async def count_categories(tx: Tx) -> int:
    """The number of categories of active products, found one by one in their index."""
    found = await tx.fetch_values(
        int,
        """
        WITH RECURSIVE found (category) AS (
            (SELECT category FROM products WHERE status = 'active' ORDER BY category LIMIT 1)
            UNION ALL
            SELECT following.category
              FROM found
             CROSS JOIN LATERAL (
                SELECT p.category FROM products p
                 WHERE p.status = 'active' AND p.category > found.category ORDER BY p.category LIMIT 1
             ) following
        )
        SELECT count(*) FROM found
        """,
    )
    return found[0]


# -------------------------------------------------------------------------------------------------------------- terms


class TextRow(Row, frozen=True, gc=False):
    id: int
    sku: str
    name: str
    description: str
    category: str


async def lock_without_terms(tx: Tx, limit: int) -> list[TextRow]:
    """Products without terms, except those that another transaction has locked."""
    return await tx.fetch(
        TextRow,
        """
        SELECT id, sku, name, description, category
          FROM products
         WHERE terms_version IS DISTINCT FROM version
         ORDER BY id
         LIMIT $1
           FOR NO KEY UPDATE SKIP LOCKED
        """,
        limit,
    )


async def fill_terms(tx: Tx, ids: Sequence[int], found_by: Sequence[FoundBy]) -> int:
    """Writes the terms of locked products. Their version stays."""
    return await tx.execute(
        """
        UPDATE products p
           SET terms = setweight(to_tsvector('pg_catalog.english', f.name), 'A')
                       || setweight(to_tsvector('pg_catalog.english', f.labels), 'B')
                       || setweight(to_tsvector('pg_catalog.english', f.description), 'D')
                       || f.terms::tsvector,
               sort_name = f.sort_name,
               terms_version = p.version
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
               AS f (id, name, labels, description, terms, sort_name)
         WHERE p.id = f.id
        """,
        ids,
        [text.stemmed_name for text in found_by],
        [text.stemmed_labels for text in found_by],
        [text.stemmed_description for text in found_by],
        [text.terms for text in found_by],
        [text.sort_name for text in found_by],
    )


# -------------------------------------------------------------------------------------------------------------- demo


async def lock_catalogue(tx: Tx) -> bool:
    """Locks all products against writes until this transaction ends; True where there is no product."""
    await tx.execute("""LOCK TABLE products IN SHARE ROW EXCLUSIVE MODE""")
    # A statement of its own: it must see rows that were committed while the lock was waited for.
    return not await tx.fetch_values(int, """SELECT 1 FROM products LIMIT 1""")


async def insert_many(tx: Tx, products: Sequence[tuple[int, CreateProduct]]) -> int:
    """Inserts products with the given ids, without their terms; gives their number."""
    return await tx.execute(
        """
        INSERT INTO products (id, sku, name, description, price_minor, currency, category)
        SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[])
        """,
        [product_id for product_id, _ in products],
        [product.sku for _, product in products],
        [product.name for _, product in products],
        [product.description for _, product in products],
        [product.price_minor for _, product in products],
        [product.currency for _, product in products],
        [product.category for _, product in products],
    )
