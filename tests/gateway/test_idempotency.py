"""Idempotency-Key at the edge: what a key looks like, and when two requests are the same request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from mercato.chassis.contract import InvalidRequest
from mercato.gateway.idempotency import fingerprint, key_of

members = st.dictionaries(
    st.text(max_size=5), st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


def of(body: bytes, *, path: dict[str, str] | None = None, query: bytes = b"", method: str = "POST") -> bytes:
    return fingerprint(method, "/orders", path or {}, query, body)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b"abc", "abc"),
        (b"  abc ", "abc"),
        (b'"abc"', "abc"),
        (b'"a\\"b\\\\c"', 'a"b\\c'),
        (b"x" * 255, "x" * 255),
        (b"5f1c-~!", "5f1c-~!"),
    ],
)
def test_a_key_is_bare_or_quoted(header: bytes, key: str) -> None:
    assert key_of(header) == key


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b'""',
        b"a b",
        b'"a b"',
        b'"abc',
        b'"a"b"',
        b'"a\\b"',
        b"x" * 256,
        b"\xc3\xa9",
        b"a\tb",
        b"a\x00b",
        b'"',
        b'"\\"',
    ],
)
def test_what_is_no_key_is_refused(header: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        key_of(header)
    assert refused.value.errors[0].field == "header Idempotency-Key"


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255))
def test_quoted_and_bare_are_the_same_key(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert key_of(quoted.encode()) == key
    if not key.startswith('"'):
        assert key_of(key.encode()) == key


@given(members, st.randoms())
def test_white_space_and_the_order_of_members_do_not_count(body: dict[str, Any], random: Any) -> None:
    names = list(body)
    random.shuffle(names)
    assert of(json.dumps({name: body[name] for name in names}, indent=3).encode()) == of(json.dumps(body).encode())


@given(members, members)
def test_other_bodies_have_other_fingerprints(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (of(json.dumps(one).encode()) == of(json.dumps(other).encode())) == (same or one == other)


def test_whatever_makes_another_request_counts() -> None:
    body = b'{"a": 1}'
    assert (
        len({of(body), of(body, path={"id": "1"}), of(body, query=b"a=1"), of(body, method="PUT"), of(b""), of(b"{}")})
        == 6
    )
    assert of(body, query=b"a=1&b=2") == of(body, query=b"b=2&a=1")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5_000])
def test_a_number_beyond_what_a_float_holds_has_a_fingerprint_as_well(number: str) -> None:
    body = f'{{"amount": {number}}}'.encode()
    assert of(body) == of(body) != of(b'{"amount": 1}')
