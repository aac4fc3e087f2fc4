"""Every SQL statement of the products service."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Final

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.products import CreateProduct, Sort, Status, UpdateProduct

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

    relevance: float


class SkuRow(ProductRow, frozen=True, gc=False):
    """A product that was asked for by a sku: `wanted`."""

    wanted: str


class QuoteRow(Row, frozen=True, gc=False):
    id: int
    sku: str
    name: str
    price_minor: int
    currency: str
    status: Status


async def insert(tx: Tx, product: CreateProduct) -> ProductRow:
    """Raises `UniqueViolation` of `SKU_KEY`, also when the other product is only just being created."""
    row = await tx.fetch_one(
        ProductRow,
        """
        INSERT INTO products (sku, name, description, price_minor, currency, category)
        VALUES ($1, $2, $3, $4, $5, $6)
        RETURNING id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
                  in_stock
        """,
        product.sku,
        product.name,
        product.description,
        product.price_minor,
        product.currency,
        product.category,
    )
    assert row is not None
    return row


async def by_ids(tx: Tx, ids: Sequence[int]) -> list[ProductRow]:
    """Those of the products that exist, in no order."""
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
    """Those of the products that exist, in no order: by the sku itself, else without case, by the lowest id."""
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
    """Those of the products that exist, in no order."""
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
    """The product as it is now, and as it stays until this transaction ends."""
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


async def update(tx: Tx, change: UpdateProduct) -> ProductRow:
    """Changes what is given of a locked product. Raises `UniqueViolation` of `SKU_KEY`."""
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
    )
    assert row is not None, f"product {change.id} was not locked before"
    return row


async def archive(tx: Tx, product_id: int) -> ProductRow:
    """Takes a locked product out of the catalogue."""
    row = await tx.fetch_one(
        ProductRow,
        """
        UPDATE products
           SET status = 'archived', updated_at = now(), version = version + 1
         WHERE id = $1 AND status = 'active'
        RETURNING id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version,
                  in_stock
        """,
        product_id,
    )
    assert row is not None, f"product {product_id} was not locked before, or is archived"
    return row


# ------------------------------------------------------------------------------------------------------------- stock


async def note_stock(tx: Tx, product_ids: Sequence[int], in_stock: Sequence[bool], versions: Sequence[int]) -> int:
    """Notes whether there is any of each product; gives how many of these news were new.

    `versions` are those of the levels. News older than those noted change nothing, in whatever order they come.
    """
    # Locked in the order of ids first: two who note the same products in different orders would wait for each other.
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

# Every statement takes the same values: $1 text, $2 category, $3 currency, $4 and $5 the range of prices, $6 the number
# of rows, $7 and $8 key and id of the cursor. `$n IS NULL` stands for a value that a statement has no use for; it also
# makes sure that it got none. What decides which index is read is a condition of its own; what only filters is an
# `IS NULL OR`, which no index can serve while the values are unknown: a plan made for all values then reads the index
# of the sort, too, instead of, say, the index of prices for a range that is mostly everything.

_COLUMNS: Final = """
SELECT id, sku, name, description, price_minor, currency, category, status, created_at, updated_at, version, in_stock"""

_SCOPES: Final[Mapping[Scope, str]] = {
    "all": """, 0::real AS relevance
  FROM products
 WHERE status = 'active' AND $1::text IS NULL AND $2::text IS NULL""",
    "category": """, 0::real AS relevance
  FROM products
 WHERE status = 'active' AND $1::text IS NULL AND category = $2""",
    # Stemmed; as it is where stemming leaves nothing. Asking for either of both at once would make "-shoes" find shoes:
    # the one with the other's negation.
    "text": """, ts_rank(words, query) AS relevance
  FROM products
 CROSS JOIN (
       SELECT CASE WHEN numnode(websearch_to_tsquery('pg_catalog.english', $1)) > 0
                   THEN websearch_to_tsquery('pg_catalog.english', $1)
                   ELSE websearch_to_tsquery('pg_catalog.simple', $1)
              END AS query
       ) AS asked
 WHERE status = 'active' AND words @@ query AND ($2::text IS NULL OR category = $2)""",
}

_FILTERS: Final = """
   AND ($3::text IS NULL OR currency = $3)
   AND ($4::bigint IS NULL OR price_minor >= $4)
   AND ($5::bigint IS NULL OR price_minor <= $5)"""

# The id makes every key unique: no product is skipped or shown twice among equals. Descending sorts descend by id, too,
# so that each is one index, read in one direction. Names are sorted by code point, ASCII letters without their case:
# the same on every server, whatever its locale.
_ORDERS: Final[Mapping[Sort, str]] = {
    "id": """
   AND $7::text IS NULL AND id > $8
 ORDER BY id""",
    "name": """
   AND (lower(name COLLATE "C"), id) > (lower($7::text COLLATE "C"), $8)
 ORDER BY lower(name COLLATE "C"), id""",
    "-name": """
   AND (lower(name COLLATE "C"), id) < (lower($7::text COLLATE "C"), $8)
 ORDER BY lower(name COLLATE "C") DESC, id DESC""",
    "price": """
   AND (price_minor, id) > ($7::bigint, $8)
 ORDER BY price_minor, id""",
    "-price": """
   AND (price_minor, id) < ($7::bigint, $8)
 ORDER BY price_minor DESC, id DESC""",
    "newest": """
   AND (created_at, id) < ($7::timestamptz, $8)
 ORDER BY created_at DESC, id DESC""",
    "relevance": """
   AND (ts_rank(words, query), id) < ($7::real, $8)
 ORDER BY relevance DESC, id DESC""",
}

_LIMIT: Final = """
 LIMIT $6
"""

SEARCH_SQL: Final[Mapping[tuple[Scope, Sort], str]] = {
    (scope, sort): _COLUMNS + _SCOPES[scope] + _FILTERS + _ORDERS[sort] + _LIMIT
    for scope in _SCOPES
    for sort in _ORDERS
    if scope == "text" or sort != "relevance"
}


async def search(tx: Tx, search: Search) -> list[FoundRow]:
    """The active products after the cursor, in the order of the sort: one more than a page, if there is one more."""
    return await tx.fetch(
        FoundRow,
        SEARCH_SQL[search.scope, search.sort],
        search.text,
        search.category,
        search.currency,
        search.min_price_minor,
        search.max_price_minor,
        search.limit + 1,
        search.after.key,
        search.after.id,
    )


# -------------------------------------------------------------------------------------------------------------- demo


async def lock_catalogue(tx: Tx) -> bool:
    """Keeps everybody else from writing until this transaction ends; True where there is no product."""
    await tx.execute("""LOCK TABLE products IN SHARE ROW EXCLUSIVE MODE""")
    # A statement of its own: it must see what was committed while the lock was waited for.
    return not await tx.fetch_values(int, """SELECT 1 FROM products LIMIT 1""")


async def insert_many(tx: Tx, products: Sequence[tuple[int, CreateProduct]]) -> int:
    """Inserts products with the ids given; gives their number."""
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
