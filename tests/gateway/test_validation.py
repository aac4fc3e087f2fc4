"""From bytes to typed input: every wrong field is named at once, and broken JSON says where it breaks."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import msgspec
import pytest
from hypothesis import given, strategies as st
from msgspec import Meta

from mercato.chassis.contract import InvalidRequest
from mercato.gateway.money import Amount
from mercato.gateway.problems import MalformedJson
from mercato.gateway.route import Input
from mercato.gateway.validation import ERRORS_LIMIT, copier, decode_body, decode_query, decoder
from mercato.testing.assertions import needs_assertions


class Part(Input):
    id: Annotated[int, Meta(ge=1)]
    weight: Amount = Amount("1")


class Form(Input):
    name: Annotated[str, Meta(min_length=1, max_length=5)]
    kind: Literal["red", "blue"] = "red"
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=2)] | None = None
    amount: Amount | None = None


class Query(Input):
    q: str | None = None
    id: Annotated[int, Meta(ge=1)] | None = None
    kind: Literal["red", "blue"] | None = None
    price: Amount | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


FORM = decoder(Form)


def wrong_in_body(body: bytes) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        decode_body(FORM, body)
    return {error.field: error.message for error in refused.value.errors}


def wrong_in_query(query: bytes) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        decode_query(Query, query)
    return {error.field: error.message for error in refused.value.errors}


def malformed(body: bytes) -> MalformedJson:
    with pytest.raises(MalformedJson) as refused:
        decode_body(FORM, body)
    return refused.value


class Stored(msgspec.Struct):
    name: str
    kind: str
    secret: str = "never shown"


class Shown(msgspec.Struct, kw_only=True):
    name: str
    kind: str
    size: int
    color: str = "red"


def test_a_copier_copies_what_both_types_have_takes_what_is_given_and_leaves_the_rest() -> None:
    shown_of = copier(Stored, Shown, "size", "kind")
    assert shown_of(Stored("box", "old"), size=3, kind="new") == Shown(name="box", kind="new", size=3, color="red")


def test_a_copier_takes_no_argument_that_was_not_declared() -> None:
    with pytest.raises(TypeError, match="color"):
        copier(Stored, Shown, "size")(Stored("box", "old"), size=3, color="blue")


@needs_assertions
@pytest.mark.parametrize(("given_names", "message"), [((), "needs {'size'}"), (("size", "sise"), "no such field")])
def test_a_copier_that_cannot_make_its_target_is_refused_when_it_is_made(given_names: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        copier(Stored, Shown, *given_names)


def test_a_good_body_is_decoded() -> None:
    body = decode_body(FORM, b'{"name": "a", "parts": [{"id": 1, "weight": "2.50"}], "amount": 1.10}')
    assert body == Form(name="a", parts=(Part(id=1, weight=Amount("2.50")),), amount=Amount("1.10"))


def test_all_wrong_fields_are_named_at_once() -> None:
    body = b'{"name": "", "kind": "green", "parts": [{"id": 0}, {"weight": true}], "colour": 1, "amount": []}'
    assert wrong_in_body(body).keys() == {
        "name", "kind", "parts[0].id", "parts[1].id", "parts[1].weight", "colour", "amount",
    }  # fmt: skip


def test_a_missing_field_says_so() -> None:
    assert wrong_in_body(b"{}") == {"name": "is missing"}


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"true"])
def test_a_body_that_is_no_object_is_named_as_a_whole(body: bytes) -> None:
    assert wrong_in_body(body).keys() == {"body"}


def test_a_wrong_length_is_named_at_the_array() -> None:
    assert wrong_in_body(b'{"name": "a", "parts": []}').keys() == {"parts"}
    assert wrong_in_body(b'{"name": "a", "parts": [{"id": 1}, {"id": 2}, {"id": 3}]}').keys() == {"parts"}


def test_so_many_wrong_fields_are_named_and_no_more() -> None:
    unknown = ", ".join(f'"field{i}": 1' for i in range(1_000))
    assert len(wrong_in_body(f'{{"name": 1, {unknown}}}'.encode())) == ERRORS_LIMIT


def test_the_name_of_an_unknown_field_is_shortened() -> None:
    [name] = wrong_in_body(f'{{"name": "a", "{"x" * 10_000}": 1}}'.encode())
    assert len(name) == 103


def test_a_number_that_no_type_holds_is_no_syntax_error() -> None:
    assert wrong_in_body(b'{"name": 1, "amount": 1e999}').keys() == {"name", "amount"}
    assert wrong_in_body(b'{"name": "a", "parts": [{"id": ' + b"1" * 5_000 + b"}]}").keys() == {"parts[0].id"}


@pytest.mark.parametrize(
    ("body", "line", "column", "offset"),
    [
        (b"", 1, 1, 0),
        (b'{"name": }', 1, 10, 9),
        (b'{\n  "name": "a",\n  "kind" "red"\n}', 3, 10, 26),
        (b'{"name": "a"', 1, 13, 12),
        (b'{"name": "a"}\nx', 2, 2, 15),
        (b'{"name": "\xff"}', 1, 11, 10),
        (b'{"name": 1, "kind": }', 1, 21, 20),
        (b"\xef\xbb\xbf{}", 1, 1, 0),
    ],
    ids=["empty", "value", "third line", "end", "tail", "not utf-8", "after a wrong field", "byte order mark"],
)
def test_broken_json_is_answered_with_its_place(body: bytes, line: int, column: int, offset: int) -> None:
    error = malformed(body)
    assert (error.line, error.column, error.offset) == (line, column, offset)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"name": ' * 50_000, b'{"parts": ' + b"[" * 100_000])
def test_deep_nesting_is_refused(body: bytes) -> None:
    with pytest.raises((MalformedJson, InvalidRequest)):
        decode_body(FORM, body)


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    for half in ("\\ud800", "a\\udc00b", "\\ud800\\ud800"):
        malformed(f'{{"name": "{half}", "kind": "red"}}'.encode())
    assert decode_body(FORM, b'{"name": "\\ud83d\\ude00"}').name == "\U0001f600"


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "parts", "id", "x"]), inner),
    max_leaves=8,
)


@given(st.binary() | json_values.map(lambda value: msgspec.json.encode(value)))
def test_whatever_comes_it_is_taken_or_refused(body: bytes) -> None:
    with contextlib.suppress(MalformedJson, InvalidRequest):
        decode_body(FORM, body)


# ------------------------------------------------------------------------------------------------------------ query


def test_a_good_query_is_decoded() -> None:
    assert decode_query(Query, b"q=a%20b&id=7&kind=red&price=1.50&limit=10") == Query(
        q="a b", id=7, kind="red", price=Amount("1.50"), limit=10
    )
    assert decode_query(Query, b"") == Query()
    assert decode_query(Query, b"q=null") == Query(q="null")


def test_all_wrong_parameters_are_named_at_once() -> None:
    assert wrong_in_query(b"id=x&kind=green&price=a&limit=0&page=2&q=a&q=b").keys() == {
        "?id", "?kind", "?price", "?limit", "?page", "?q",
    }  # fmt: skip


@pytest.mark.parametrize("query", [b"id=null", b"kind=NULL", b"price=null"])
def test_a_filter_that_says_null_is_refused_rather_than_ignored(query: bytes) -> None:
    assert wrong_in_query(query)


@pytest.mark.parametrize("text", ["1e2", "5.0", "+5", " 5", "5 ", "0x5", "\u0665", "1_0", "", "05", "5\n", "9" * 5_000])
def test_a_number_is_written_in_digits(text: str) -> None:
    assert wrong_in_query(urlencode({"limit": text}).encode()).keys() == {"?limit"}


@pytest.mark.parametrize("query", [b"q=%ff", b"q=%ed%a0%80", b"q=\xff", b"&".join(b"q%d=1" % i for i in range(60))])
def test_a_query_that_is_no_text_or_too_long_is_refused(query: bytes) -> None:
    assert wrong_in_query(query).keys() == {"?"}


@given(st.binary() | st.text("idqkndprlmt=&%05nu;+").map(str.encode))
def test_whatever_query_comes_it_is_taken_or_refused(query: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        decode_query(Query, query)
