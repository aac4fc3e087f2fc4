"""The operations of the products service, in the order of their contract."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Final

from mercato.chassis.contract import Actor, Batch, Forbidden, check_version, current
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx, UniqueViolation
from mercato.contracts.products import (
    COUNTED_AT_MOST,
    ArchiveProduct,
    CategoryCount,
    CategoryPage,
    CreateProduct,
    FindProduct,
    GetProduct,
    ListCategories,
    PriceChanged,
    Product,
    ProductArchived,
    ProductNotFound,
    ProductPage,
    Products,
    Quote,
    QuoteProduct,
    RestoreProduct,
    SearchProducts,
    SkuNotFound,
    SkuTaken,
    Sort,
    Status,
    UpdateProduct,
)
from mercato.contracts.roles import STAFF_ONLY

from . import folding, rules, store

CREATE_BEFORE_COMMIT: Final = "products.create.before_commit"
CREATE_AFTER_COMMIT: Final = "products.create.after_commit"
UPDATE_BEFORE_COMMIT: Final = "products.update.before_commit"
UPDATE_AFTER_COMMIT: Final = "products.update.after_commit"
ARCHIVE_BEFORE_COMMIT: Final = "products.archive.before_commit"
ARCHIVE_AFTER_COMMIT: Final = "products.archive.after_commit"
FILL_LIMIT: Final = 200
"""The products of one call of `fill_terms`."""

faults.declare(
    CREATE_BEFORE_COMMIT,
    CREATE_AFTER_COMMIT,
    UPDATE_BEFORE_COMMIT,
    UPDATE_AFTER_COMMIT,
    ARCHIVE_BEFORE_COMMIT,
    ARCHIVE_AFTER_COMMIT,
)


class ProductsService:
    """Implements `Products`. A change locks its product first, so that no other transaction changes it meanwhile."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, request: CreateProduct) -> Product:
        """Raises `InvalidRequest` or `SkuTaken`. A repeated request gets `SkuTaken`."""
        rules.check_product(request)
        with _sku_conflicts(request.sku):
            async with self._database.transaction() as tx:
                row = await store.insert(tx, request, rules.found_by(request))
                await faults.point(CREATE_BEFORE_COMMIT)
        await faults.point(CREATE_AFTER_COMMIT)
        return _product(row)

    async def get(self, batch: Batch[GetProduct]) -> Sequence[Product | ProductNotFound]:
        """Also archived products, because their orders still show them."""
        async with self._database.read() as tx:
            rows = await store.by_ids(tx, list({request.id for request in batch}))
        products = {row.id: _product(row) for row in rows}
        return [products.get(request.id) or ProductNotFound(product_id=request.id) for request in batch]

    async def update(self, request: UpdateProduct) -> Product:
        """Raises `InvalidRequest`, `ProductNotFound`, `StaleVersion` or `SkuTaken`.

        Archived products can be changed as well, for example to free a sku for another product.
        """
        rules.check_product(request)
        with _sku_conflicts(request.sku):
            async with self._database.transaction() as tx:
                before = await self._lock(tx, request.id)
                check_version(request.version, before.version)
                change = rules.with_price(request, before.currency)
                if not rules.changes(change):
                    return _product(before)
                row = await store.update(tx, change, rules.found_by(rules.changed(_product(before), change)))
                if (row.price_minor, row.currency) != (before.price_minor, before.currency):
                    tx.emit([_price_changed(before, row, current.get().actor)])
                await faults.point(UPDATE_BEFORE_COMMIT)
        await faults.point(UPDATE_AFTER_COMMIT)
        return _product(row)

    async def archive(self, request: ArchiveProduct) -> Product:
        """Raises `ProductNotFound` or `StaleVersion`.

        An archived product does not change, whatever the version in the request: a caller that got no answer repeats
        the request with the version from before.
        """
        return await self._set_status(request, "archived")

    async def search(self, request: SearchProducts) -> ProductPage:
        """Raises `InvalidRequest`, `Forbidden`. A product that is created meanwhile does not shift the pages."""
        if request.status != "active" and (role := current.get().actor.role) not in STAFF_ONLY:
            raise Forbidden(operation=f"{Products.search.full_name} of archived products", role=role)
        search = rules.checked_search(request)
        async with self._database.read() as tx:
            query = await store.query_of(tx, folding.parse_search(search.text)) if search.text else None
            rows = await store.search(tx, search, query)
        total = await self._database.count(lambda tx: store.count(tx, search, query)) if request.count else None
        products = tuple(_product(row) for row in rows[: search.limit])
        following = _token_after(search.sort, rows[search.limit - 1]) if len(rows) > search.limit else None
        return ProductPage(products=products, next_after=following, total=total)

    async def quote(self, batch: Batch[QuoteProduct]) -> Sequence[Quote | ProductNotFound | ProductArchived]:
        async with self._database.read() as tx:
            rows = await store.quotes(tx, list({request.id for request in batch}))
        found = {row.id: row for row in rows}
        return [_quote(request.id, found.get(request.id)) for request in batch]

    async def find(self, batch: Batch[FindProduct]) -> Sequence[Product | SkuNotFound]:
        """Also archived products, as `get`."""
        async with self._database.read() as tx:
            rows = await store.by_skus(tx, list({request.sku for request in batch}))
        products = {row.wanted: _product(row) for row in rows}
        return [products.get(request.sku) or SkuNotFound(sku=request.sku) for request in batch]

    async def restore(self, request: RestoreProduct) -> Product:
        """Raises `ProductNotFound` or `StaleVersion`. An active product does not change, as with `archive`."""
        return await self._set_status(request, "active")

    async def categories(self, request: ListCategories) -> CategoryPage:
        """Raises `InvalidRequest`. The categories are found one by one in an index, without reading all products."""
        after = rules.checked_categories(request)
        async with self._database.read() as tx:
            # One more than requested shows whether there is a next page.
            rows = await store.categories(tx, after, request.limit + 1, COUNTED_AT_MOST + 1)
        found = tuple(
            CategoryCount(
                category=row.category,
                products=min(row.products, COUNTED_AT_MOST),
                is_exact=row.products <= COUNTED_AT_MOST,
            )
            for row in rows[: request.limit]
        )
        following = found[-1].category if len(rows) > request.limit else None
        total = await self._database.count(store.count_categories) if request.count else None
        return CategoryPage(categories=found, next_after=following, total=total)

    async def fill_terms(self) -> int:
        """Writes the terms of products that have none; gives their number, at most `FILL_LIMIT`."""
        async with self._database.transaction() as tx:
            rows = await store.lock_without_terms(tx, FILL_LIMIT)
            if rows:
                texts = [folding.found_by(row.name, row.sku, row.category, row.description) for row in rows]
                await store.fill_terms(tx, [row.id for row in rows], texts)
        return len(rows)

    async def _set_status(self, request: ArchiveProduct | RestoreProduct, status: Status) -> Product:
        async with self._database.transaction() as tx:
            row = await self._lock(tx, request.id)
            if row.status == status:
                return _product(row)
            check_version(request.version, row.version)
            row = await store.set_status(tx, request.id, status)
            await faults.point(ARCHIVE_BEFORE_COMMIT)
        await faults.point(ARCHIVE_AFTER_COMMIT)
        return _product(row)

    async def _lock(self, tx: Tx, product_id: int) -> store.ProductRow:
        row = await store.lock(tx, product_id)
        if row is None:
            raise ProductNotFound(product_id=product_id)
        return row


@contextlib.contextmanager
def _sku_conflicts(sku: str | None) -> Generator[None]:
    """Turns a violation of the unique key into `SkuTaken`. A check beforehand would miss a concurrent request."""
    try:
        yield
    except UniqueViolation as violation:
        if violation.constraint != store.SKU_KEY or sku is None:
            raise
        raise SkuTaken(sku=sku) from violation


def _product(row: store.ProductRow) -> Product:
    return Product(
        id=row.id,
        sku=row.sku,
        name=row.name,
        description=row.description,
        price_minor=row.price_minor,
        currency=row.currency,
        category=row.category,
        status=row.status,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
        in_stock=row.in_stock,
    )


def _price_changed(before: store.ProductRow, now: store.ProductRow, actor: Actor) -> Outgoing:
    data = PriceChanged(
        product_id=now.id,
        old_price_minor=before.price_minor,
        old_currency=before.currency,
        price_minor=now.price_minor,
        currency=now.currency,
        version=now.version,
        actor_role=actor.role,
        actor_id=actor.id,
    )
    return Outgoing("product.price_changed", "product", now.id, now.version, data)


def _quote(product_id: int, row: store.QuoteRow | None) -> Quote | ProductNotFound | ProductArchived:
    if row is None:
        return ProductNotFound(product_id=product_id)
    if row.status == "archived":
        return ProductArchived(product_id=row.id)
    return Quote(id=row.id, sku=row.sku, name=row.name, price_minor=row.price_minor, currency=row.currency)


def _token_after(sort: Sort, row: store.FoundRow) -> str:
    keys: dict[Sort, rules.Key] = {
        "id": None,
        "name": row.sort_name,
        "-name": row.sort_name,
        "price": row.price_minor,
        "-price": row.price_minor,
        "newest": row.created_at,
        "relevance": row.relevance,
    }
    return rules.token(sort, rules.Cursor(keys[sort], row.id))
