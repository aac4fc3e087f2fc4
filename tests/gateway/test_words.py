"""What is wrong with a request is said at once, in words of the API, and none of it in those of a library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
import pytest
from msgspec import Meta

from gateway.harness import Things
from mercato.chassis.contract import InvalidRequest
from mercato.chassis.contract.constraints import WORDS, explained, metas, worded
from mercato.gateway.money import Amount, AmountIn
from mercato.gateway.route import Input
from mercato.gateway.routes import ROUTES
from mercato.gateway.validation import decode_query, wrong_fields
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

OF_A_LIBRARY: Final = re.compile(
    r"`|\bint\b|\bstr\b|\bbool\b|\barray\b|\bregex\b|\bmsgspec\b|\bStruct\b|[Ee]xpected|\bgot\b|\bInvalid\b|ExactFloat"
)
STRANGE: Final[tuple[Any, ...]] = (
    *(None, True, -1, 0, 2**60, 2**70, 1.5, "", "x", "\x00", "ü", "x" * 20_000, "2026-13-01"),
    *([], [None], [1, 2] * 300, {}, {"a": 1}, {"amount": "x"}, {"amount": {"amount": 1}, "currency": "X"}),
)
"""Values that do not fit most fields, each in a way of its own."""


def models() -> Iterator[type[Input]]:
    for route in ROUTES:
        for form in (route, *(form.of(route) for form in route.forms)):
            yield from (model for model in (form.body, form.query) if model is not None)


MODELS: Final = sorted(set(models()), key=lambda model: model.__name__)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
async def test_no_sentence_of_a_library_reaches_a_client(model: type[Input]) -> None:
    for field in msgspec.structs.fields(model):
        for value in STRANGE:
            for strict in (True, False):
                for error in wrong_fields(model, {field.encode_name: value}, "", strict=strict):
                    assert not OF_A_LIBRARY.search(error.message), (error.field, value, error.message)
                    assert error.message[0].islower(), error.message


def kinds_of(model: Any, seen: set[Any]) -> Iterator[Any]:
    """The types of all fields of a model, and of those within."""
    if model in seen:
        return
    seen.add(model)
    for field in msgspec.structs.fields(model):
        yield field.type
        yield from (kind for inner in _structs(field.type) for kind in kinds_of(inner, seen))


def _structs(kind: Any) -> Iterator[Any]:
    if isinstance(kind, type):
        if issubclass(kind, msgspec.Struct):
            yield kind
        return
    for part in (*get_args(kind), *([kind.__origin__] if hasattr(kind, "__metadata__") else [])):
        yield from _structs(part)


async def test_every_pattern_in_use_says_what_it_asks_for() -> None:
    kinds = [kind for model in MODELS for kind in kinds_of(model, set())]
    kinds += [kind for route in ROUTES for kind in route.text.values()]
    patterns = [meta for kind in kinds for meta in metas(kind) if meta.pattern is not None]

    assert len(patterns) > 10
    assert [meta.pattern for meta in patterns if WORDS not in (meta.extra or {})] == []


class Part(Input):
    count: Annotated[int, Meta(ge=1, le=10)] = 1


class Everything(Input):
    whole: Annotated[int, Meta(ge=1, le=10)] = 1
    multiple: Annotated[int, Meta(multiple_of=5)] = 5
    text: Annotated[str, Meta(min_length=3, max_length=5)] = "abc"
    needed: Annotated[str, Meta(min_length=1)] = "a"
    letters: Annotated[str, Meta(pattern=r"^[A-Z]\Z", extra=worded("must be one capital letter"))] | None = None
    unworded: Annotated[str, Meta(pattern=r"^[A-Z]\Z")] = "A"
    choice: Literal["red", "green"] | None = None
    yes: bool = True
    few: Annotated[tuple[int, ...], Meta(min_length=2, max_length=3)] = (1, 2)
    part: Part | None = None
    price: Amount | None = None
    total: AmountIn | None = None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("whole", 0, "must be at least 1"),
        ("whole", 11, "must be at most 10"),
        ("whole", "1", "must be a whole number, not a text"),
        ("whole", 1.5, "must be a whole number, not a number with a fraction"),
        ("whole", None, "must be a whole number, not null"),
        ("multiple", 7, "must be a multiple of 5"),
        ("text", "ab", "must have at least 3 characters"),
        ("text", "abcdef", "must have at most 5 characters"),
        ("text", 5, "must be a text, not a whole number"),
        ("needed", "", "must not be empty"),
        ("letters", "a", "must be one capital letter"),
        ("unworded", "a", "does not have the form that this takes"),
        ("choice", "blue", "must be one of red, green"),
        ("choice", [], "must be a text, not a list"),
        ("yes", "true", "must be true or false, not a text"),
        ("few", [1], "must have at least 2 items"),
        ("few", [1, 2, 3, 4], "must have at most 3 items"),
        ("few", {}, "must be a list, not an object"),
        ("part", 1, "must be an object, not a whole number"),
        ("price", True, "is neither a string nor a number"),
        ("total", "1e2", "is not an amount: digits, with or without a point and more digits, such as 99.99"),
    ],
)
async def test_each_kind_of_constraint_has_words(field: str, value: Any, message: str) -> None:
    [error] = wrong_fields(Everything, {field: value}, "")
    assert (error.field, error.message) == (field, message)


async def test_what_the_library_says_of_whole_messages_is_translated_as_well() -> None:
    assert explained("Object missing required field `id`") == "must have the field id"
    assert explained("Object contains unknown field `x`") == "has no field x"
    assert explained("Invalid RFC3339 encoded datetime") == "must be a time such as 2026-01-15T09:30:00Z"


async def test_a_value_of_a_query_is_explained_as_one_of_a_body_is() -> None:
    class Query(Input):
        limit: Annotated[int, Meta(ge=1, le=200)] = 50
        status: Literal["open", "closed"] | None = None

    with pytest.raises(InvalidRequest) as refused:
        decode_query(Query, b"limit=0&status=ajar")
    assert [(error.field, error.message) for error in refused.value.errors] == [
        ("?limit", "must be at least 1"),
        ("?status", "must be one of open, closed"),
    ]


# ------------------------------------------------------------------------------------------------------ all in one pass


async def test_body_path_query_and_headers_are_validated_in_one_pass(open_shop: Shop) -> None:
    body = {"status": "gone", "fulfilment": 5, "colour": "red"}
    reply = await open_shop.patch("/orders/first?dry=1", body, headers={"If-Match": "x", "Idempotency-Key": "k"})

    assert_problem(reply, 400, "invalid_request")
    assert {error["field"]: error["message"] for error in reply.json["errors"]} == {
        "status": "must be one of pending, confirmed, completed, cancelled",
        "fulfilment": "must be a text, not a whole number",
        "colour": "is not a known field",
        "path id": "is not a number",
        "?": "this takes no query parameters",
        "header Idempotency-Key": "PATCH /orders/{id} does not take one",
        "header If-Match": 'is not one ETag such as "3"',
    }


async def test_query_and_headers_are_validated_in_one_pass(open_shop: Shop) -> None:
    reply = await open_shop.get("/orders?limit=0&colour=red&status=gone", headers={"If-Match": '"1"'})

    assert set(reply.wrong_fields) == {"?limit", "?colour", "?status", "header If-Match"}


async def test_an_order_with_five_wrong_fields_names_all_five(open_shop: Shop) -> None:
    body = {"product_id": 0, "quantity": "two", "currency": "XXX", "email": "nowhere", "payment_method": "cash"}
    reply = await open_shop.post("/orders", body, headers={"Prefer": "wait=soon"})

    assert set(reply.wrong_fields) == {*body, "header Prefer"}


async def test_what_the_service_asks_of_an_account_is_said_with_the_fields_that_do_not_fit(open_shop: Shop) -> None:
    reply = await open_shop.post("/register", {"email": "nowhere", "name": "", "password": "short", "colour": 1})

    assert {error["field"]: error["message"] for error in reply.json["errors"]} == {
        "email": "must look like name@example.com",
        "name": "must not be empty",
        "password": "must have at least 10 characters",
        "colour": "is not a known field",
    }


async def test_which_of_the_members_is_missing_is_said_with_the_fields_that_do_not_fit(open_shop: Shop) -> None:
    placed = await open_shop.post("/orders", {"user_id": "x", "quantity": 1})
    moved = await open_shop.patch("/orders/1", {"colour": 1})

    assert set(placed.wrong_fields) == {"user_id", "items"}
    assert set(moved.wrong_fields) == {"status", "colour"}


# -------------------------------------------------------------------------------------------- bodies where none belongs

BODILESS: Final = [route for route in ROUTES if route.body is None]
_things: dict[Shop, Things] = {}


async def things(shop: Shop) -> Things:
    if shop not in _things:
        _things[shop] = await Things.of(shop, await new_person(shop, "staff"))
    return _things[shop]


@pytest.mark.parametrize("route", BODILESS, ids=lambda route: f"{route.method} {route.path}")
@pytest.mark.parametrize("raw", [b'{"amount": "1.00"}', b"null", b"amount=1"])
async def test_a_body_where_none_belongs_is_refused(open_shop: Shop, route: Any, raw: bytes) -> None:
    path = (await things(open_shop)).path(route)
    headers = {"Content-Type": "application/json"}
    if route.idempotency_required:
        headers["Idempotency-Key"] = unique("key")

    reply = await open_shop.request(route.method, path, raw=raw, headers=headers)

    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"body"}


async def test_a_body_that_says_nothing_is_none(open_shop: Shop) -> None:
    for raw in (b"{}", b" {}\n", b""):
        reply = await open_shop.get("/products/100", raw=raw, headers={"Content-Type": "application/json"})
        assert (reply.status, reply.json["id"]) == (200, 100)
