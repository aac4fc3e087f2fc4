"""The rules for the fields of a product, and the cursors of pages of the catalogue.

Pure. The schema of a message limits what arrives over HTTP; these rules repeat everything that the database would
refuse, so that a caller in the same process gets the same errors, and all wrong fields at once.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from mercato.chassis.contract import FieldError, InvalidRequest
from mercato.contracts.money import DEFAULT_CURRENCY, EXPONENTS, MAX_MINOR, to_minor, unknown_currency
from mercato.contracts.products import (
    PAGE_LIMIT,
    CreateProduct,
    ListCategories,
    PriceMinor,
    Product,
    ProductId,
    SearchProducts,
    Sort,
    Status,
    UpdateProduct,
)

from . import folding

NAME_LENGTH: Final = 200
DESCRIPTION_LENGTH: Final = 10_000
TEXT_LENGTH: Final = 200
TOKEN_LENGTH: Final = 2_048
"""A cursor has a name of at most 200 characters: 800 bytes, or 1100 characters of base64, and a few more fields."""

NOT_TEXT: Final = "must be text: no NUL, no lone surrogate"

_SKU: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CATEGORY: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_LINE_BREAKS: Final = "\t\n\r"

# ---------------------------------------------------------------------------------------------------------- products


def check_product(request: CreateProduct | UpdateProduct) -> None:
    """Raises `InvalidRequest` with every wrong field. A field that is None is not given."""
    _refuse(_wrong_fields(request))


def changes(request: UpdateProduct) -> bool:
    """Whether the request changes anything."""
    return any(getattr(request, field) is not None for field in PRODUCT_FIELDS)


def _wrong_fields(request: CreateProduct | UpdateProduct) -> Iterator[FieldError]:
    for field, wrong in PRODUCT_FIELDS.items():
        value = getattr(request, field)
        if value is not None and (message := wrong(value)):
            yield FieldError(field=field, message=message)


def _wrong_sku(sku: str) -> str | None:
    if _SKU.fullmatch(sku):
        return None
    return "must be 1 to 64 letters, digits, dots, underscores or hyphens, the first a letter or digit"


def _wrong_name(name: str) -> str | None:
    if len(name) > NAME_LENGTH:
        return f"must have at most {NAME_LENGTH} characters"
    if _is_blank(name):
        return "must not be blank"
    return _wrong_characters(name)


def _wrong_description(description: str) -> str | None:
    if len(description) > DESCRIPTION_LENGTH:
        return f"must have at most {DESCRIPTION_LENGTH} characters"
    return _wrong_characters(description, allowed=_LINE_BREAKS)


def _wrong_price(price_minor: int) -> str | None:
    return None if 0 <= price_minor <= MAX_MINOR else f"must be between 0 and {MAX_MINOR} minor units"


def _wrong_currency(currency: str) -> str | None:
    return None if currency in EXPONENTS else unknown_currency(currency)


def _wrong_category(category: str) -> str | None:
    if _CATEGORY.fullmatch(category):
        return None
    return "must be 1 to 64 lower-case letters, digits or hyphens, the first a letter or digit"


PRODUCT_FIELDS: Final[Mapping[str, Any]] = {
    "sku": _wrong_sku,
    "name": _wrong_name,
    "price_minor": _wrong_price,
    "currency": _wrong_currency,
    "category": _wrong_category,
    "description": _wrong_description,
}
"""The fields of a product that a client may set, each with the function that checks its value."""


def with_price(request: UpdateProduct, currency: str) -> UpdateProduct:
    """The request with its price in minor units, for a product with this currency. Raises `InvalidRequest`."""
    if request.price is None:
        return request
    minor = to_minor(request.price, request.currency or currency)
    if isinstance(minor, str):
        raise InvalidRequest(errors=(FieldError(field="price", message=minor),))
    return msgspec.structs.replace(request, price=None, price_minor=minor)


def found_by(product: Product | CreateProduct) -> folding.FoundBy:
    return folding.found_by(product.name, product.sku, product.category, product.description)


def changed(product: Product, change: UpdateProduct) -> Product:
    """The product with the texts of a change."""
    given = {field: value for field in TEXTS if (value := getattr(change, field)) is not None}
    return msgspec.structs.replace(product, **given)


TEXTS: Final = ("sku", "name", "category", "description")


def _is_blank(text: str) -> bool:
    """True without a visible character: separators (Z) and control characters and the like (C) are invisible."""
    return all(unicodedata.category(character)[0] in "ZC" for character in text)


def _wrong_characters(text: str, allowed: str = "") -> str | None:
    """Control characters (Cc) are invisible and disturb terminals; a lone surrogate (Cs) cannot be encoded in UTF-8."""
    for character in text:
        if character not in allowed and unicodedata.category(character) in ("Cc", "Cs"):
            return f"must not contain the character U+{ord(character):04X}"
    return None


def _refuse(errors: Iterator[FieldError]) -> None:
    if wrong := tuple(errors):
        raise InvalidRequest(errors=wrong)


# ------------------------------------------------------------------------------------------------------------ search

Scope = Literal["all", "category", "archived", "sku", "text"]
"""The products that a search reads: the catalogue, a category, archived products, one sku, or those with some words."""

MAX_RELEVANCE: Final = 1e9
"""More than any rank: ranks stay below 2."""

Key = str | int | float | datetime.datetime | None
"""The sort key of a product; None where products are sorted only by id."""


class Cursor(msgspec.Struct, frozen=True):
    """A position between two products: right after the one with this key and id, in the order of a sort."""

    key: Key
    id: int


class Search(msgspec.Struct, frozen=True):
    """A checked search: the database accepts every value. None is no filter."""

    scope: Scope
    sort: Sort
    text: str | None
    category: str | None
    currency: str | None
    min_price_minor: int | None
    max_price_minor: int | None
    after: Cursor
    limit: int
    sku: str | None
    status: Status


BEGINNING: Final[Mapping[Sort, Cursor]] = {
    "id": Cursor(None, 0),
    "name": Cursor("", 0),
    "-name": Cursor("\U0010ffff" * (NAME_LENGTH + 1), 0),
    "price": Cursor(-1, 0),
    "-price": Cursor(MAX_MINOR + 1, 0),
    "newest": Cursor(datetime.datetime.max.replace(tzinfo=datetime.UTC), 0),
    "relevance": Cursor(MAX_RELEVANCE, 0),
}
"""The position before the first product of each sort: with it the first page needs no other statement."""


def checked_search(request: SearchProducts) -> Search:
    """The checked search of a request. Raises `InvalidRequest` with every wrong field."""
    after = _cursor_of(request)
    _refuse(_wrong_search(request, after))
    assert after is not None
    text = request.text if request.text and not request.text.isspace() else None
    priced = request.min_price_minor is not None or request.max_price_minor is not None
    return Search(
        scope=_scope(request, text),
        sort=request.sort,
        text=text,
        category=request.category,
        # Minor units of two currencies do not compare.
        currency=request.currency or (DEFAULT_CURRENCY if priced else None),
        min_price_minor=request.min_price_minor,
        max_price_minor=request.max_price_minor,
        after=after,
        limit=request.limit,
        sku=request.sku,
        status=request.status,
    )


def _scope(request: SearchProducts, text: str | None) -> Scope:
    if text:
        return "text"
    if request.sku is not None:
        return "sku"
    if request.status == "archived":
        return "archived"
    return "all" if request.category is None else "category"


def _wrong_search(request: SearchProducts, after: Cursor | None) -> Iterator[FieldError]:
    if request.text is not None:
        if len(request.text) > TEXT_LENGTH:
            yield FieldError(field="text", message=f"must have at most {TEXT_LENGTH} characters")
        elif not _is_storable(request.text):
            yield FieldError(field="text", message=NOT_TEXT)
    if request.sort == "relevance" and (request.text is None or not request.text.strip()):
        yield FieldError(field="sort", message="can be relevance only together with a text to search for")
    if request.sku is not None and (message := _wrong_sku(request.sku)):
        yield FieldError(field="sku", message=message)
    if request.sort != "id" and _scope(request, (request.text or "").strip()) == "archived":
        message = "can only be id for archived products, unless they are searched by a text or sku"
        yield FieldError(field="sort", message=message)
    if request.category is not None and not _is_storable(request.category):
        yield FieldError(field="category", message=NOT_TEXT)
    if request.currency is not None and (message := _wrong_currency(request.currency)):
        yield FieldError(field="currency", message=message)
    for field in ("min_price_minor", "max_price_minor"):
        price: int | None = getattr(request, field)
        if price is not None and (message := _wrong_price(price)):
            yield FieldError(field=field, message=message)
    if not 1 <= request.limit <= PAGE_LIMIT:
        yield FieldError(field="limit", message=f"must be between 1 and {PAGE_LIMIT}")
    if after is None:
        yield FieldError(field="after", message="must be the next_after of a page with the same sort")


def checked_categories(request: ListCategories) -> str:
    """The category after which a page begins. Raises `InvalidRequest`."""
    after = request.after or ""
    if not _is_storable(after) or len(after) > TEXT_LENGTH:
        raise InvalidRequest(errors=(FieldError(field="after", message="Must be a category."),))
    return after


def _is_storable(text: str) -> bool:
    """Whether PostgreSQL can store this text."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


# ----------------------------------------------------------------------------------------------------------- cursors

KEY_TYPES: Final[Mapping[Sort, Any]] = {
    "id": None,
    "name": Annotated[str, Meta(max_length=NAME_LENGTH)],
    "-name": Annotated[str, Meta(max_length=NAME_LENGTH)],
    "price": PriceMinor,
    "-price": PriceMinor,
    "newest": Annotated[datetime.datetime, Meta(tz=True)],
    "relevance": Annotated[float, Meta(ge=0, le=MAX_RELEVANCE)],
}


def token(sort: Sort, cursor: Cursor) -> str:
    """The cursor as an opaque text for URLs."""
    packed = msgspec.json.encode((sort, cursor.key, cursor.id))
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def parse_token(sort: Sort, given: str) -> Cursor | None:
    """The cursor in a token; None for a token of another sort, and for other texts."""
    if len(given) > TOKEN_LENGTH:
        return None
    try:
        packed = base64.b64decode(given + "=" * (-len(given) % 4), altchars=b"-_", validate=True)
        its_sort, raw_key, product_id = msgspec.json.decode(packed, type=tuple[str, msgspec.Raw, ProductId])
        if its_sort != sort:
            return None
        key: Key = msgspec.json.decode(raw_key, type=KEY_TYPES[sort])
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None
    return Cursor(key, product_id) if _is_key(key) else None


def _cursor_of(request: SearchProducts) -> Cursor | None:
    return BEGINNING[request.sort] if request.after is None else parse_token(request.sort, request.after)


def _is_key(key: Key) -> bool:
    if isinstance(key, str):
        return _is_storable(key)
    # Tokens are in UTC. In another zone, the first day of the year 1 would be outside of the range of dates.
    return not isinstance(key, datetime.datetime) or key.tzinfo is datetime.UTC
