"""The catalogue."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

from msgspec import Meta

from mercato.chassis.contract import Forbidden, Open, StaleVersion
from mercato.contracts import products as contract
from mercato.contracts.products import Product, ProductPage, Products
from mercato.contracts.roles import ALL_ROLES, STAFF_ONLY
from mercato.gateway.fields import ProductDescription, ProductName
from mercato.gateway.money import Amount, Money, MoneyIn, amount_errors, currency_errors, minor_of, money, text_of
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest
from mercato.gateway.validation import refuse_wrong

PRICE_FILTER: Final = "In major units of `currency`, or of the shop's own. Products in other currencies are left out."


class CreateProductIn(Input):
    sku: contract.Sku
    name: ProductName
    price: MoneyIn
    category: contract.Category
    description: ProductDescription = ""


class UpdateProductIn(Input):
    sku: contract.Sku | None = None
    name: ProductName | None = None
    price: MoneyIn | None = None
    category: contract.Category | None = None
    description: ProductDescription | None = None


class ArchiveIn(Input):
    pass


class ProductsQuery(Input):
    q: (
        Annotated[
            str,
            Meta(
                max_length=200,
                description='The text of a search box: words, "phrases", -not these, this or that. '
                "Compared without case and accents. A word is found by its beginning in names, skus and categories.",
            ),
        ]
        | None
    ) = None
    category: Annotated[str, Meta(max_length=64)] | None = None
    currency: contract.Currency | None = None
    min_price: Annotated[Amount, Meta(description=PRICE_FILTER)] | None = None
    max_price: Annotated[Amount, Meta(description=PRICE_FILTER)] | None = None
    sort: (
        Annotated[contract.Sort, Meta(description="`-` is descending; `relevance` needs `q`, and is then the default.")]
        | None
    ) = None
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    after: (
        Annotated[
            str, Meta(max_length=2_048, description="From the Link of the page before; for the same filters and sort.")
        ]
        | None
    ) = None
    sku: Annotated[contract.Sku | None, Meta(description="Only the one with this sku, compared without case.")] = None
    status: Annotated[contract.Status, Meta(description="`archived` is for staff, sorted by id alone.")] = "active"


class ProductOut(Output):
    id: int
    sku: str
    name: str
    description: str
    price: Money
    category: str
    status: Open[contract.Status]
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    in_stock: bool


class CategoriesQuery(Input):
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    after: Annotated[str, Meta(max_length=64, description="Only those that come after this one.")] | None = None


class CategoryOut(Output):
    category: str
    products: Annotated[
        int, Meta(description=f"Active products of it; {contract.COUNTED_AT_MOST} where there are more.")
    ]
    is_exact: bool


def product_out(product: Product) -> ProductOut:
    return ProductOut(
        id=product.id,
        sku=product.sku,
        name=product.name,
        description=product.description,
        price=money(product.price_minor, product.currency),
        category=product.category,
        status=product.status,
        created_at=product.created_at,
        updated_at=product.updated_at,
        version=product.version,
        in_stock=product.in_stock,
    )


def _page(page: ProductPage) -> Page:
    following = None if page.next_after is None else {"after": page.next_after}
    return Page([product_out(product) for product in page.products], following)


def _categories(page: contract.CategoryPage) -> Page:
    following = None if page.next_after is None else {"after": page.next_after}
    shown = [CategoryOut(category=c.category, products=c.products, is_exact=c.is_exact) for c in page.categories]
    return Page(shown, following)


def _create(request: RouteRequest) -> contract.CreateProduct:
    body: CreateProductIn = request.body
    currency = body.price.currency or request.currency
    refuse_wrong(currency_errors("price.currency", currency))
    refuse_wrong(amount_errors("price.amount", body.price.amount, currency))
    return contract.CreateProduct(
        sku=body.sku,
        name=body.name,
        price_minor=minor_of(body.price.amount, currency) or 0,
        currency=currency,
        category=body.category,
        description=body.description,
    )


def _update(request: RouteRequest) -> contract.UpdateProduct:
    body: UpdateProductIn = request.body
    price = body.price
    refuse_wrong(currency_errors("price.currency", price.currency if price else None))
    return contract.UpdateProduct(
        id=request.path["id"],
        version=request.if_match,
        sku=body.sku,
        name=body.name,
        price=text_of(price.amount) if price else None,
        currency=price.currency if price else None,
        category=body.category,
        description=body.description,
    )


def _search(request: RouteRequest) -> contract.SearchProducts:
    query: ProductsQuery = request.query
    priced = query.min_price is not None or query.max_price is not None
    currency = query.currency or (request.currency if priced else None)
    refuse_wrong(currency_errors("?currency", currency))
    prices = (("?min_price", query.min_price), ("?max_price", query.max_price))
    refuse_wrong([error for field, price in prices for error in amount_errors(field, price, currency)])
    return contract.SearchProducts(
        text=query.q,
        category=query.category,
        currency=currency,
        min_price_minor=minor_of(query.min_price, currency),
        max_price_minor=minor_of(query.max_price, currency),
        sort=query.sort or ("relevance" if query.q else "id"),
        after=query.after,
        limit=query.limit,
        sku=query.sku,
        status=query.status,
    )


def _tag(product: Product) -> str:
    """The version, and whether it is in stock, which changes without it. If-Match compares only the version."""
    return f"{product.version}-in-stock" if product.in_stock else str(product.version)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/products",
        is_public=True,
        operation=Products.search,
        summary="The catalogue: search (?q=), filter by category and price, sort, page by page",
        roles=ALL_ROLES,
        query=ProductsQuery,
        fields={name: f"?{name}" for name in ("category", "currency", "sort", "limit", "after", "sku")}
        | {"text": "?q"},
        request=_search,
        answer=_page,
        output=list[ProductOut],
        errors=(Forbidden,),
    ),
    Route(
        method="GET",
        path="/categories",
        operation=Products.categories,
        summary="The categories of the catalogue, with the number of their products",
        roles=ALL_ROLES,
        query=CategoriesQuery,
        fields={"after": "?after"},
        request=lambda request: contract.ListCategories(after=request.query.after, limit=request.query.limit),
        answer=_categories,
        output=list[CategoryOut],
    ),
    Route(
        method="POST",
        path="/products",
        operation=Products.create,
        summary="Add a product",
        roles=STAFF_ONLY,
        body=CreateProductIn,
        examples={
            "a keyboard": {
                "sku": "KEY-61",
                "name": "Keyboard",
                "price": {"amount": "49.90", "currency": "USD"},
                "category": "computers",
            }
        },
        request=_create,
        answer=product_out,
        output=ProductOut,
        status=201,
        etag=_tag,
        location=lambda product: f"/products/{product.id}",
        errors=(contract.SkuTaken,),
    ),
    Route(
        method="GET",
        path="/products/{id}",
        is_public=True,
        operation=Products.get,
        summary="One product",
        roles=ALL_ROLES,
        request=lambda request: contract.GetProduct(id=request.path["id"]),
        answer=product_out,
        output=ProductOut,
        etag=_tag,
        errors=(contract.ProductNotFound,),
    ),
    Route(
        method="PATCH",
        path="/products/{id}",
        operation=Products.update,
        summary="Change a product; orders keep the price that they were placed with",
        roles=STAFF_ONLY,
        body=UpdateProductIn,
        examples={"another price": {"price": {"amount": "89.99"}}},
        fields={"price": "price.amount"},
        request=_update,
        answer=product_out,
        output=ProductOut,
        etag=_tag,
        if_match=True,
        errors=(contract.ProductNotFound, contract.SkuTaken, StaleVersion),
    ),
    Route(
        method="POST",
        path="/products/{id}/archive",
        operation=Products.archive,
        summary="Take a product out of the catalogue",
        roles=STAFF_ONLY,
        body=ArchiveIn,
        body_optional=True,
        examples={"an empty body": {}},
        request=lambda request: contract.ArchiveProduct(id=request.path["id"], version=request.if_match),
        answer=product_out,
        output=ProductOut,
        etag=_tag,
        if_match=True,
        errors=(contract.ProductNotFound, StaleVersion),
    ),
    Route(
        method="POST",
        path="/products/{id}/restore",
        operation=Products.restore,
        summary="Put an archived product back into the catalogue",
        roles=STAFF_ONLY,
        body=ArchiveIn,
        body_optional=True,
        examples={"an empty body": {}},
        request=lambda request: contract.RestoreProduct(id=request.path["id"], version=request.if_match),
        answer=product_out,
        output=ProductOut,
        etag=_tag,
        if_match=True,
        errors=(contract.ProductNotFound, StaleVersion),
    ),
)
