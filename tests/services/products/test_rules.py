"""The rules of products and cursors, without a database."""

from __future__ import annotations

import base64
import datetime
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, strategies as st

from mercato.chassis.contract import MAX_ID, InvalidRequest
from mercato.contracts.money import EXPONENTS, MAX_MINOR
from mercato.contracts.products import CreateProduct, SearchProducts, Sort, UpdateProduct
from mercato.services.products import rules
from mercato.services.products.rules import Cursor, checked_search, parse_token, token

SORTS: tuple[Sort, ...] = get_args(Sort)
FIELDS: dict[str, Any] = {
    "sku": "A",
    "name": "A",
    "price_minor": 1,
    "currency": "USD",
    "category": "a",
    "description": "",
}
PRODUCT = CreateProduct(**FIELDS)

KEYS: dict[Sort, st.SearchStrategy[Any]] = {
    "id": st.none(),
    "name": st.text(max_size=200).filter(lambda name: "\0" not in name),
    "-name": st.text(max_size=200).filter(lambda name: "\0" not in name),
    "price": st.integers(0, MAX_MINOR),
    "-price": st.integers(0, MAX_MINOR),
    "newest": st.datetimes(timezones=st.just(datetime.UTC)),
    "relevance": st.floats(0, 2, width=32),
}


def wrong_fields(request: CreateProduct | UpdateProduct) -> set[str]:
    try:
        rules.check_product(request)
    except InvalidRequest as refused:
        return {error.field for error in refused.errors}
    return set()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sku", value) for value in ["", "a" * 65, "-a", "a b", "é", "a\n", "a\0"]),
        *(("name", value) for value in ["", " ", "\u200b", "\u2028", "\u0085", "a\nb", "a\x7f", "a" * 201, "\ud800a"]),
        *(("description", value) for value in ["\0", "\x1b[0m", "a" * 10_001, "\udfff"]),
        *(("price_minor", value) for value in [-1, MAX_MINOR + 1]),
        *(("currency", value) for value in ["", "usd", "XXX", "USD\n"]),
        *(("category", value) for value in ["", "Audio", "a" * 65, "-a", "a\n", "a_b"]),
    ],
)
def test_each_field_is_checked_alone_and_in_an_update_as_well(field: str, value: Any):
    assert wrong_fields(msgspec.structs.replace(PRODUCT, **{field: value})) == {field}
    assert wrong_fields(UpdateProduct(id=1, **{field: value})) == {field}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sku", "a" * 64),
        ("sku", "0._-"),
        ("name", "a" * 200),
        ("name", " a "),
        ("name", "\u05d0\u05d1"),
        ("name", "\U0001f469\u200d\U0001f467"),
        ("description", "One\r\n\ttwo"),
        ("description", "\U0001f600" * 10_000),
        ("price_minor", 0),
        ("price_minor", MAX_MINOR),
        ("category", "a-0"),
        *(("currency", currency) for currency in EXPONENTS),
    ],
)
def test_what_a_product_may_have(field: str, value: Any):
    assert wrong_fields(msgspec.structs.replace(PRODUCT, **{field: value})) == set()


def test_an_update_checks_only_what_is_given():
    assert wrong_fields(UpdateProduct(id=1)) == set()
    assert not rules.changes(UpdateProduct(id=1, version=3))
    assert all(rules.changes(UpdateProduct(id=1, **{field: value})) for field, value in FIELDS.items())


def test_a_field_that_can_be_created_is_a_field_that_can_be_changed():
    assert set(rules.PRODUCT_FIELDS) == set(CreateProduct.__struct_fields__)
    assert set(rules.PRODUCT_FIELDS) == set(UpdateProduct.__struct_fields__) - {"id", "version", "price"}


@given(st.text(st.characters()))
def test_any_name_is_either_fine_or_refused(name: str):
    if wrong_fields(msgspec.structs.replace(PRODUCT, name=name)):
        return
    assert 1 <= len(name) <= 200
    assert name.encode().decode() == name
    assert not any(ord(character) < 32 for character in name)


# ----------------------------------------------------------------------------------------------------------- cursors


@pytest.mark.parametrize("sort", SORTS)
@given(data=st.data())
def test_a_token_is_url_safe_and_gives_its_cursor_back_to_its_sort_alone(sort: Sort, data: st.DataObject):
    cursor = Cursor(data.draw(KEYS[sort]), data.draw(st.integers(1, MAX_ID)))

    made = token(sort, cursor)

    assert set(made) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert len(made) <= rules.TOKEN_LENGTH
    assert parse_token(sort, made) == cursor
    assert [other for other in SORTS if parse_token(other, made)] == [sort]
    assert not any(parse_token(sort, made[:4] + junk + made[4:]) for junk in ("!", " ", "\n", "+", "\u0661"))


def test_the_longest_name_fits_in_a_token():
    cursor = Cursor("\U0010ffff" * 200, MAX_ID)

    assert parse_token("name", token("name", cursor)) == cursor


@given(st.sampled_from(SORTS), st.text(st.characters(), max_size=100))
def test_a_malformed_token_is_not_parsed(sort: Sort, garbage: str):
    assert parse_token(sort, garbage) is None


FORGERIES = [
    ("name", ["name", "a\0", 1]),
    ("name", ["name", "a" * 201, 1]),
    ("name", ["name", 1, 1]),
    ("id", ["id", 1, 1]),
    ("id", ["id", None, 0]),
    ("id", ["id", None, 2**63]),
    ("id", ["id", None]),
    ("id", ["id", None, 1, 1]),
    ("price", ["price", -1, 1]),
    ("price", ["price", MAX_MINOR + 1, 1]),
    ("price", ["price", "1", 1]),
    ("newest", ["newest", "0001-01-01T00:00:00+14:00", 1]),
    ("newest", ["newest", "2026-01-01T00:00:00", 1]),
    ("newest", ["newest", "yesterday", 1]),
    ("relevance", ["relevance", -1, 1]),
    ("relevance", ["relevance", 1e300, 1]),
]


@pytest.mark.parametrize(("sort", "forged"), FORGERIES)
def test_a_forged_token_is_not_parsed(sort: Sort, forged: list[Any]):
    assert parse_token(sort, base64.urlsafe_b64encode(msgspec.json.encode(forged)).decode().rstrip("=")) is None


def test_a_search_begins_before_the_first_product():
    for sort in SORTS:
        search = checked_search(SearchProducts(sort=sort, text="a"))
        assert search.after == rules.BEGINNING[sort]


def test_a_text_decides_what_is_searched_before_a_category_does():
    assert checked_search(SearchProducts()).scope == "all"
    assert checked_search(SearchProducts(category="a")).scope == "category"
    assert checked_search(SearchProducts(category="a", text="b")).scope == "text"
    assert checked_search(SearchProducts(category="a", text=" ")).scope == "category"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", "a" * 201),
        ("text", "\ud800"),
        ("category", "\0"),
        ("currency", "XXX"),
        ("min_price_minor", -1),
        ("max_price_minor", 2**64),
        ("limit", 0),
        ("limit", 201),
        ("after", "x"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(field: str, value: Any):
    with pytest.raises(InvalidRequest) as refused:
        checked_search(SearchProducts(**{field: value}))

    assert [error.field for error in refused.value.errors] == [field]
