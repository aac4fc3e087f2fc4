"""Products: the catalogue, and the only source of prices."""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from mercato.chassis.contract import (
    MAX_ID,
    Contract,
    Kind,
    Message,
    Open,
    Retry,
    ServiceError,
    batched,
    filled,
    single,
    worded,
)

from .money import MAX_MINOR, AmountText
from .roles import ALL_ROLES, SIGNED_IN, STAFF_ONLY

ProductId = Annotated[int, Meta(ge=1, le=MAX_ID)]
Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Sku = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z",
        extra=worded("must be letters, digits, dots, underscores and hyphens, the first a letter or digit"),
        examples=["HEAD-100"],
    ),
]
Name = Annotated[str, Meta(min_length=1, max_length=200, examples=["Headphones"])]
Description = Annotated[str, Meta(max_length=10_000)]
Category = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        pattern=r"^[a-z0-9][a-z0-9-]*\Z",
        extra=worded("must be small letters, digits and hyphens, the first a letter or digit"),
        examples=["audio"],
    ),
]
PriceMinor = Annotated[int, Meta(ge=0, le=MAX_MINOR)]
Currency = Annotated[
    str, Meta(pattern=r"^[A-Z]{3}\Z", extra=worded("must be three capital letters, such as USD"), examples=["USD"])
]

Status = Literal["active", "archived"]
Sort = Literal["id", "name", "-name", "price", "-price", "newest", "relevance"]

PAGE_LIMIT: Final = 200
COUNTED_AT_MOST: Final = 1_000


class Product(Message):
    id: ProductId
    sku: str
    name: str
    description: str
    price_minor: int
    currency: str
    category: str
    status: Open[Status]
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    in_stock: bool = False
    """From the last event of inventory. Not a part of the version: orders change it, not staff."""


class CreateProduct(Message):
    sku: Sku
    name: Name
    price_minor: PriceMinor
    currency: Currency
    category: Category
    description: Description = ""


class GetProduct(Message):
    id: ProductId


class FindProduct(Message):
    """The product with this sku; else, of those whose sku is equal without case, the one with the lowest id."""

    sku: Sku


class UpdateProduct(Message):
    """Changes the fields that are given. With `version`, only if the product still has it."""

    id: ProductId
    version: Version | None = None
    sku: Sku | None = None
    name: Name | None = None
    price_minor: PriceMinor | None = None
    currency: Currency | None = None
    category: Category | None = None
    description: Description | None = None
    price: Annotated[AmountText | None, Meta(extra=filled("default"))] = None
    """As `price_minor`, in `currency`, or else in that of the product."""


class ArchiveProduct(Message):
    """Removes a product from the catalogue: it can be read by its id, but not found, quoted or ordered."""

    id: ProductId
    version: Version | None = None


class RestoreProduct(Message):
    """Puts an archived product back into the catalogue."""

    id: ProductId
    version: Version | None = None


class SearchProducts(Message):
    """Products, a page at a time: the active ones, or the archived.

    `text` is that of a search box (words, "phrases", -not, this or that). `after` is the `next_after` of the previous
    page, for the same filters and sort. Price filters compare only products of `currency`, or else of the default
    currency. Words are found, and names sorted, without case and accents. `relevance` needs a `text`. Only staff may
    search archived products, which are sorted by id unless there is a `text` or `sku`.
    """

    text: Annotated[str, Meta(max_length=200)] | None = None
    category: str | None = None
    currency: Currency | None = None
    min_price_minor: PriceMinor | None = None
    max_price_minor: PriceMinor | None = None
    sort: Sort = "id"
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    sku: Sku | None = None
    """Only the product with this sku, compared without case."""
    status: Status = "active"
    count: bool = False
    """Whether the page must have its `total`."""


class ListCategories(Message):
    """The categories of active products, in the order of their names, those after `after`."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    count: bool = False
    """Whether the page must have its `total`."""


class CategoryCount(Message):
    category: str
    products: int
    """The number of its active products; `COUNTED_AT_MOST` where there are more."""
    is_exact: bool


class CategoryPage(Message):
    categories: tuple[CategoryCount, ...]
    next_after: str | None = None
    total: int | None = None
    """All entries that the filters match, on all pages; None where it is not requested, or takes too long to count."""


class ProductPage(Message):
    products: tuple[Product, ...]
    next_after: str | None = None
    """The `after` of the next page; None on the last."""
    total: int | None = None
    """All entries that the filters match, on all pages; None where it is not requested, or takes too long to count."""


class QuoteProduct(Message):
    id: ProductId


class Quote(Message):
    """The name and price of a product at this moment, which an order stores."""

    id: ProductId
    sku: str
    name: str
    price_minor: int
    currency: str


class ProductNotFound(ServiceError, code="products.not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no product {product_id}."
    product_id: int


class SkuNotFound(ServiceError, code="products.sku_not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no product with the sku {sku}."
    sku: str


class ProductArchived(ServiceError, code="products.archived", kind=Kind.CONFLICT):
    sentence = "Product {product_id} is not for sale any more."
    product_id: int


class SkuTaken(ServiceError, code="products.sku_taken", kind=Kind.CONFLICT):
    sentence = "There is a product with the sku {sku} already."
    sku: str


class PriceChanged(Message):
    """`product.price_changed`: the price of a product, or its currency, changed. Amounts in minor units."""

    product_id: int
    old_price_minor: int
    old_currency: str
    price_minor: int
    currency: str
    version: int
    """The version of the product after this change."""
    actor_role: str
    actor_id: int
    """The account that changed it; 0 for callers without an account."""


class Products(Contract, name="products"):
    """The catalogue. All callers may read it; staff may change it."""

    create = single(CreateProduct, Product, allow=STAFF_ONLY)
    get = batched(GetProduct, Product, allow=ALL_ROLES, retry=Retry.SAFE)
    update = single(UpdateProduct, Product, allow=STAFF_ONLY)
    archive = single(ArchiveProduct, Product, allow=STAFF_ONLY)
    search = single(SearchProducts, ProductPage, allow=ALL_ROLES, retry=Retry.SAFE)
    quote = batched(QuoteProduct, Quote, allow=SIGNED_IN, retry=Retry.SAFE)
    find = batched(FindProduct, Product, allow=ALL_ROLES, retry=Retry.SAFE)
    restore = single(RestoreProduct, Product, allow=STAFF_ONLY)
    categories = single(ListCategories, CategoryPage, allow=ALL_ROLES, retry=Retry.SAFE)

    events: ClassVar = {"product.price_changed": PriceChanged}
