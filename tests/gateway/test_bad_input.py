"""Invalid input: each gets a clear problem, and changes nothing.

The table names inputs that a client will send some day; the property tests after it send generated ones.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from gateway.harness import Things
from mercato.chassis.http.limits import VERSION_NOT_SUPPORTED
from mercato.chassis.observability import faults, telemetry
from mercato.gateway.route import MAX_BODY_BYTES, Route
from mercato.gateway.routes import ROUTES
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, UNKNOWN_ID, Person, new_order, new_person
from mercato.testing.snapshots import state_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

JSON = {"Content-Type": "application/json"}
ORDER: Mapping[str, Any] = {"user_id": 1, "items": [{"product_id": 100, "quantity": 1}]}
PRODUCT: Mapping[str, Any] = {
    "sku": "BAD-INPUT",
    "name": "Something",
    "price": {"amount": "9.99", "currency": "USD"},
    "category": "things",
}
ACCOUNT: Mapping[str, Any] = {"email": "bad.input@example.com", "name": "Alice", "password": PASSWORD}

NUL = "a\x00b"
RTL = "\u202eevil\u202c"
EMOJI = "\U0001f600" * 10_000


class Case(msgspec.Struct, frozen=True):
    """A request, and what it is answered with. `fields`: exactly these are named as wrong."""

    name: str
    method: str
    path: str
    body: Any = None
    raw: bytes | None = None
    headers: Mapping[str, str] = {}
    status: int = 400
    code: str = "invalid_request"
    fields: frozenset[str] | None = None


def wrong(name: str, method: str, path: str, body: Any, *fields: str) -> Case:
    return Case(name, method, path, body, fields=frozenset(fields))


def order(name: str, changes: Mapping[str, Any], *fields: str) -> Case:
    return wrong(f"order: {name}", "POST", "/orders", {**ORDER, **changes}, *fields)


def product(name: str, changes: Mapping[str, Any], *fields: str) -> Case:
    return wrong(f"product: {name}", "POST", "/products", {**PRODUCT, **changes}, *fields)


def price(name: str, amount: Any, *fields: str) -> Case:
    return product(f"price {name}", {"price": {"amount": amount}}, *(fields or ("price.amount",)))


def account(name: str, changes: Mapping[str, Any], *fields: str) -> Case:
    return wrong(f"account: {name}", "POST", "/register", {**ACCOUNT, **changes}, *fields)


def broken(name: str, raw: bytes) -> Case:
    return Case(f"broken JSON: {name}", "POST", "/orders", raw=raw, headers=JSON, code="malformed_json")


def sent_as(name: str, content_type: str | None) -> Case:
    headers = {} if content_type is None else {"Content-Type": content_type}
    raw = json.dumps(ORDER).encode()
    return Case(
        f"sent as {name}", "POST", "/orders", raw=raw, headers=headers, status=415, code="unsupported_media_type"
    )


def query(name: str, path: str, *fields: str) -> Case:
    return wrong(f"query: {name}", "GET", path, None, *fields)


def nothing(name: str, method: str, path: str, code: str, body: Any = None) -> Case:
    return Case(f"nothing there: {name}", method, path, body, status=404, code=code)


def line(product_id: int) -> dict[str, int]:
    return {"product_id": product_id, "quantity": 1}


def item(quantity: Any) -> dict[str, Any]:
    return {"items": [{"product_id": 100, "quantity": quantity}]}


CASES = [
    # Not JSON, or not an object.
    broken("empty body", b""),
    broken("half", b'{"user_id": 1, "items": ['),
    broken("comma", b'{"user_id": 1,}'),
    broken("single quotes", b"{'user_id': 1}"),
    broken("two values", b"{} {}"),
    broken("NaN", b'{"user_id": 1, "product_id": 1, "amount": NaN}'),
    broken("Infinity", b'{"user_id": 1, "product_id": 1, "amount": Infinity}'),
    broken("not UTF-8", b'{"user_id": "\xff\xfe"}'),
    broken("UTF-16", '{"user_id": 1}'.encode("utf-16")),
    broken("byte order mark", b'\xef\xbb\xbf{"user_id": 1}'),
    broken("NUL", b'{"user_id": 1}\x00'),
    broken("NUL in a text", b'{"user_id": 1, "currency": "a\x00b"}'),
    broken("lone surrogate", b'{"currency": "\\ud800", "user_id": 1}'),
    broken("form", b"user_id=1&product_id=100"),
    wrong("an array", "POST", "/orders", [ORDER], "body"),
    wrong("a text", "POST", "/orders", "order", "body"),
    Case("null", "POST", "/orders", raw=b"null", headers=JSON, fields=frozenset({"body"})),
    Case("a number", "POST", "/orders", raw=b"1", headers=JSON, fields=frozenset({"body"})),
    Case("deep nesting", "POST", "/orders", raw=b"[" * 100_000, headers=JSON, code="malformed_json"),
    Case("deep objects", "POST", "/orders", raw=b'{"items":' * 50_000, headers=JSON, code="malformed_json"),
    # What kind of body.
    sent_as("nothing", None),
    sent_as("text", "text/plain"),
    sent_as("a form", "application/x-www-form-urlencoded"),
    sent_as("another charset", "application/json; charset=latin-1"),
    sent_as("a list of types", "application/json, text/plain"),
    sent_as("almost JSON", "application/jsonp"),
    Case(
        "body too large",
        "POST",
        "/orders",
        raw=b" " * (MAX_BODY_BYTES + 1),
        headers=JSON,
        status=413,
        code="body_too_large",
    ),
    Case("credentials too large", "POST", "/login", raw=b" " * 16_385, headers=JSON, status=413, code="body_too_large"),
    # Orders.
    wrong("order: nothing in it", "POST", "/orders", {}, "items"),
    wrong("order: no items", "POST", "/orders", {"user_id": 1}, "items"),
    order("empty items", {"items": []}, "items"),
    order("101 lines", {"items": [line(i + 1) for i in range(101)]}, "items"),
    order("both forms", {"product_id": 100}, "items"),
    order("a quantity beside items", {"quantity": 1}, "items"),
    order("the same product twice", {"items": [line(100), line(2), line(100)]}, "items[2].product_id"),
    order("wrong types", {"user_id": "1", "items": "x", "currency": 1}, "user_id", "items", "currency"),
    order("a boolean user", {"user_id": True}, "user_id"),
    order("a float user", {"user_id": 1.5}, "user_id"),
    order("a whole float beside wrong fields", {"user_id": 1.0, "product_id": 1.5}, "product_id", "items"),
    order("user zero", {"user_id": 0}, "user_id"),
    order("user -1", {"user_id": -1}, "user_id"),
    order("user 2^53", {"user_id": 2**53}, "user_id"),
    order("user 2^63", {"user_id": 2**63}, "user_id"),
    order("user 10^30", {"user_id": 10**30}, "user_id"),
    Case("order: a user of 5000 digits", "POST", "/orders", raw=b'{"user_id": ' + b"9" * 5_000 + b"}", headers=JSON),
    order("unknown fields", {"colour": "red", "total": 1}, "colour", "total"),
    order("unknown field in a line", {"items": [{**line(100), "price": 1}]}, "items[0].price"),
    order("null lines", {"items": [None, line(0)]}, "items[0]", "items[1].product_id"),
    order("quantity 0", item(0), "items[0].quantity"),
    order("quantity -1", item(-1), "items[0].quantity"),
    order("quantity 10001", item(10_001), "items[0].quantity"),
    order("quantity 1.5", item(1.5), "items[0].quantity"),
    order("quantity 10^30", item(10**30), "items[0].quantity"),
    order("quantity as text", item("1"), "items[0].quantity"),
    wrong("order: short form without product", "POST", "/orders", {"user_id": 1, "quantity": 2}, "items"),
    wrong(
        "order: short form, quantity 0", "POST", "/orders", {"user_id": 1, "product_id": 1, "quantity": 0}, "quantity"
    ),
    order(
        "everything wrong",
        {"user_id": 0, "items": [line(-1)], "x": 1, "currency": "usd"},
        "user_id",
        "items[0].product_id",
        "x",
        "currency",
    ),
    order("unknown currency", {"currency": "XXX", "amount": "1"}, "currency"),
    order("lower-case currency", {"currency": "usd"}, "currency"),
    order("currency with a line break", {"currency": "USD\n"}, "currency"),
    order("too many digits", {"amount": "99.999"}, "amount"),
    order("float with too many digits", {"amount": 99.999}, "amount"),
    order("yen with a fraction", {"amount": "1.5", "currency": "JPY"}, "amount"),
    order("negative amount", {"amount": -1}, "amount"),
    order("NaN as text", {"amount": "NaN"}, "amount"),
    order("sNaN as text", {"amount": "sNaN"}, "amount"),
    order("Infinity as text", {"amount": "-Infinity"}, "amount"),
    order("boolean amount", {"amount": True}, "amount"),
    order("empty amount", {"amount": ""}, "amount"),
    order("amount with a comma", {"amount": "99,99"}, "amount"),
    order("amount with a sign", {"amount": "$99.99"}, "amount"),
    order("amount as a list", {"amount": ["1"]}, "amount"),
    order("amount as an empty object", {"amount": {}}, "amount.amount"),
    order(
        "amount as an object of wrong fields",
        {"amount": {"amount": "1e2", "currency": "usd", "cents": 1}},
        "amount.amount",
        "amount.currency",
        "amount.cents",
    ),
    order("amount in an object in an object", {"amount": {"amount": {"amount": "1"}}}, "amount.amount"),
    order(
        "amount as an object with an unknown currency",
        {"amount": {"amount": "1", "currency": "XXX"}},
        "amount.currency",
    ),
    order("two currencies", {"amount": {"amount": "1", "currency": "USD"}, "currency": "EUR"}, "amount.currency"),
    order("amount of 10^5000", {"amount": "1" + "0" * 5_000}, "amount"),
    order("amount 1e999999", {"amount": "1e999999"}, "amount"),
    order("amount with too large an exponent", {"amount": "1e9999999999999999999"}, "amount"),
    Case(
        "order: amount 1e999",
        "POST",
        "/orders",
        headers=JSON,
        fields=frozenset({"amount"}),
        raw=b'{"user_id": 1, "product_id": 100, "amount": 1e999}',
    ),
    Case(
        "order: amount 1e999 with a key",
        "POST",
        "/orders",
        headers={**JSON, "Idempotency-Key": "k"},
        raw=b'{"user_id": 1, "product_id": 100, "amount": 1e999}',
        fields=frozenset({"amount"}),
    ),
    Case(
        "order: amount of 5000 digits with a key",
        "POST",
        "/orders",
        headers={**JSON, "Idempotency-Key": "k"},
        raw=b'{"user_id": 1, "product_id": 100, "amount": ' + b"9" * 5_000 + b"}",
        fields=frozenset({"amount"}),
    ),
    Case(
        "order: amount of a million digits",
        "POST",
        "/orders",
        headers=JSON,
        fields=frozenset({"amount"}),
        raw=b'{"user_id": 1, "product_id": 100, "amount": "0.' + b"1" * 1_000_000 + b'"}',
    ),
    Case(
        "order: the last of two equal names counts",
        "POST",
        "/orders",
        headers=JSON,
        fields=frozenset({"user_id"}),
        raw=b'{"user_id": 1, "items": [{"product_id": 100}], "user_id": 0}',
    ),
    Case(
        "order: another price", "POST", "/orders", {**ORDER, "amount": "1.00"}, status=409, code="orders.price_changed"
    ),
    Case(
        "order: another currency",
        "POST",
        "/orders",
        {**ORDER, "currency": "EUR"},
        status=409,
        code="orders.price_changed",
    ),
    nothing("user of an order", "POST", "/orders", "users.not_found", {**ORDER, "user_id": UNKNOWN_ID}),
    nothing("product of an order", "POST", "/orders", "products.not_found", {**ORDER, "items": [line(UNKNOWN_ID)]}),
    # Products.
    wrong("product: nothing in it", "POST", "/products", {}, "sku", "name", "price", "category"),
    wrong(
        "product: all wrong",
        "POST",
        "/products",
        {"sku": "", "name": 1, "price": "9.99", "category": "A", "id": 1},
        "sku",
        "name",
        "price",
        "category",
        "id",
    ),
    price("negative", -1),
    price("with three digits", "1.234"),
    price("boolean", False),
    price("too large", "10000000000.01"),
    price("1e999", "1e999"),
    price("NaN", "NaN"),
    price("null", None),
    product("price without an amount", {"price": {}}, "price.amount"),
    product("price in an unknown currency", {"price": {"amount": 1, "currency": "XXX"}}, "price.currency"),
    product("price in a lower-case currency", {"price": {"amount": 1, "currency": "usd"}}, "price.currency"),
    product("sku with a space", {"sku": "A B"}, "sku"),
    product("sku with a line break", {"sku": "AB\n"}, "sku"),
    product("overlong sku", {"sku": "A" * 65}, "sku"),
    product("sku in Arabic digits", {"sku": "\u0661\u0662"}, "sku"),
    product("NUL in the name", {"name": NUL}, "name"),
    product("blank name", {"name": " \u200b\u00a0"}, "name"),
    product("overlong name", {"name": "x" * 201}, "name"),
    product("10k emoji as the name", {"name": EMOJI}, "name"),
    product("overlong description", {"description": "x" * 10_001}, "description"),
    product("NUL in the description", {"description": NUL}, "description"),
    product("category with a capital", {"category": "Audio"}, "category"),
    product("category with a NUL", {"category": NUL}, "category"),
    Case(
        "product: sku taken", "POST", "/products", {**PRODUCT, "sku": "HEAD-100"}, status=409, code="products.sku_taken"
    ),
    wrong("product change: NUL in the name", "PATCH", "/products/100", {"name": NUL}, "name"),
    wrong("product change: price", "PATCH", "/products/100", {"price": {"amount": "0.001"}}, "price.amount"),
    wrong("product change: unknown field", "PATCH", "/products/100", {"status": "archived"}, "status"),
    wrong("archive: unknown field", "POST", "/products/100/archive", {"reason": "x"}, "reason"),
    nothing("product to change", "PATCH", f"/products/{UNKNOWN_ID}", "products.not_found", {"name": "x"}),
    # Accounts.
    wrong("account: nothing in it", "POST", "/register", {}, "email", "name", "password"),
    account("all wrong", {"email": "alice", "name": " ", "password": "short"}, "email", "name", "password"),
    account("a role", {"role": "staff"}, "role"),
    account("an id", {"id": 1}, "id"),
    account("e-mail with a NUL", {"email": "a\x00b@example.com"}, "email"),
    account("e-mail with a right-to-left override", {"email": f"{RTL}@example.com"}, "email"),
    account("e-mail with a line break", {"email": "a@example.com\nBcc: b@example.com"}, "email"),
    account("overlong e-mail", {"email": "a" * 250 + "@example.com"}, "email"),
    account("two e-mails", {"email": "a@example.com,b@example.com"}, "email"),
    account("name with a NUL", {"name": NUL}, "name"),
    account("name with a line break", {"name": "a\nb"}, "name"),
    account("a thousand emoji as the name", {"name": EMOJI[:1_000]}, "name"),
    account("short password", {"password": "short"}, "password"),
    account("common password", {"password": "password1234"}, "password"),
    account("one character as password", {"password": "a" * 20}, "password"),
    account("the e-mail as password", {"password": "bad.input@example.com"}, "password"),
    account("password with a NUL", {"password": PASSWORD + "\x00"}, "password"),
    account("a thousand emoji as the password", {"password": EMOJI[:1_000]}, "password"),
    Case("account: 10k emoji", "POST", "/register", {**ACCOUNT, "name": EMOJI}, status=413, code="body_too_large"),
    Case(
        "account: e-mail taken",
        "POST",
        "/register",
        {**ACCOUNT, "email": "ALICE@Example.COM"},
        status=409,
        code="users.email_taken",
    ),
    Case(
        "login: unknown e-mail",
        "POST",
        "/login",
        {"email": "no@example.com", "password": PASSWORD},
        status=401,
        code="users.wrong_credentials",
    ),
    Case(
        "login: wrong password",
        "POST",
        "/login",
        {"email": "alice@example.com", "password": "no"},
        status=401,
        code="users.wrong_credentials",
    ),
    Case(
        "login: NUL in the e-mail",
        "POST",
        "/login",
        {"email": NUL, "password": NUL},
        status=401,
        code="users.wrong_credentials",
    ),
    wrong("login: an object as e-mail", "POST", "/login", {"email": {"$gt": ""}, "password": []}, "email", "password"),
    Case(
        "refresh: unknown token",
        "POST",
        "/token/refresh",
        {"refresh_token": NUL},
        status=401,
        code="users.session_ended",
    ),
    wrong("refresh: overlong token", "POST", "/token/refresh", {"refresh_token": "x" * 257}, "refresh_token"),
    wrong("logout: no token", "POST", "/logout", {}, "refresh_token"),
    wrong("profile: NUL in the name", "PATCH", "/users/1", {"name": NUL}, "name"),
    wrong("profile: e-mail and name", "PATCH", "/users/1", {"email": "x", "name": ""}, "email", "name"),
    wrong("profile: a role", "PATCH", "/users/1", {"role": "staff"}, "role"),
    Case(
        "profile: e-mail of another",
        "PATCH",
        "/users/1",
        {"email": "Bob@Example.com"},
        status=409,
        code="users.email_taken",
    ),
    wrong("role: unknown", "PUT", "/users/1/role", {"role": "owner"}, "role"),
    wrong("role: service", "PUT", "/users/1/role", {"role": "service"}, "role"),
    wrong("role: missing", "PUT", "/users/1/role", {}, "role"),
    nothing("user to change", "PATCH", f"/users/{UNKNOWN_ID}", "users.not_found", {"name": "x"}),
    # Headers.
    *(
        Case(
            f"If-Match {name}",
            "PATCH",
            "/products/100",
            {"name": "x"},
            headers={"If-Match": value},
            fields=frozenset({"header If-Match"}),
        )
        for name, value in {
            "without quotes": "3",
            "no number": '"abc"',
            "zero": '"0"',
            "negative": '"-1"',
            "a list": '"1", "2"',
            "empty": "",
            "too large": '"99999999999999999999"',
            "half quoted": '"3',
        }.items()
    ),
    Case(
        "If-Match stale",
        "PATCH",
        "/products/100",
        {"name": "x"},
        headers={"If-Match": '"999"'},
        status=412,
        code="stale_version",
    ),
    Case(
        "If-Match where none is taken",
        "GET",
        "/products/100",
        headers={"If-Match": '"1"'},
        fields=frozenset({"header If-Match"}),
    ),
    # Where nothing is, and how it may not be asked.
    nothing("path", "GET", "/nothing", "route_not_found"),
    nothing("path behind a row", "GET", "/orders/1/lines", "route_not_found"),
    nothing("last slash", "GET", "/orders/", "route_not_found"),
    nothing("two slashes", "GET", "//orders", "route_not_found"),
    nothing("upper case", "GET", "/ORDERS", "route_not_found"),
    nothing("path with braces", "GET", "/%7Bid%7D/%25s%00%0a", "route_not_found"),
    nothing("path that is not UTF-8", "GET", "/%ff%fe", "route_not_found"),
    nothing("order", "GET", f"/orders/{UNKNOWN_ID}", "orders.not_found"),
    nothing("history", "GET", f"/orders/{UNKNOWN_ID}/history", "orders.not_found"),
    nothing("order to cancel", "POST", f"/orders/{UNKNOWN_ID}/cancel", "orders.not_found"),
    nothing("order to move", "PATCH", f"/orders/{UNKNOWN_ID}", "orders.not_found", {"status": "confirmed"}),
    *(
        nothing(f"{where} {name}", "GET", f"/{where}/{number}", "route_not_found")
        for where in ("users", "products", "orders")
        for name, number in {
            "0": 0,
            "2^53": 2**53,
            "2^63": 2**63,
            "10^30": 10**30,
            "of 4000 digits": "9" * 4_000,
        }.items()
    ),
    *(
        query(f"{where} with {name} for an id", f"/{where}/{text}", "path id")
        for where in ("users", "products", "orders")
        for name, text in {
            "-1": "-1",
            "a word": "x",
            "1.5": "1.5",
            "1e3": "1e3",
            "NUL": "1%00",
            "Arabic digits": quote("\u0661"),
        }.items()
        if where != "products" or not text[0].isalnum() or "%" in text or not text.isascii()  # else it is a sku
    ),
    # Query parameters.
    query("limit 0", "/orders?limit=0", "?limit"),
    query("limit 201", "/orders?limit=201", "?limit"),
    query("limit x", "/products?limit=x", "?limit"),
    query("limit -1", "/users?limit=-1", "?limit"),
    query("limit of 5000 digits", f"/users?limit={'9' * 5_000}", "?limit"),
    query("unknown", "/orders?page=2&size=3", "?page", "?size"),
    query("unknown where none are", "/orders/1?expand=items", "?"),
    query("repeated", "/orders?status=pending&status=confirmed", "?status"),
    query("null", "/orders?user_id=null", "?user_id"),
    query(
        "everything",
        "/orders?user_id=x&status=lost&payment=a&fulfilment=b&limit=0&before=0&x=1",
        "?user_id",
        "?status",
        "?payment",
        "?fulfilment",
        "?limit",
        "?before",
        "?x",
    ),
    query("id 0", "/users?id=0", "?id"),
    query("id no number", "/users?id=one", "?id"),
    query("id 2^53", f"/users?id={2**53}", "?id"),
    query("id 10^30", f"/users?id={10**30}", "?id"),
    query("after 2^63", f"/users?after={2**63}", "?after"),
    query("role", "/users?role=service", "?role"),
    query("user 2^63", f"/orders?user_id={2**63}", "?user_id"),
    query("before 2^53", f"/orders?before={2**53}", "?before"),
    query("sort", "/products?sort=colour", "?sort"),
    query("relevance without words", "/products?sort=relevance", "?sort"),
    query("price", "/products?min_price=a&max_price=-1", "?min_price", "?max_price"),
    query("prices out of range", "/products?min_price=-1&max_price=1e999", "?min_price", "?max_price"),
    query("price with three digits", "/products?min_price=1.234", "?min_price"),
    query("unknown currency", "/products?currency=XXX", "?currency"),
    query("unknown currency of a price", "/products?min_price=1&currency=XXX", "?currency"),
    query("garbage cursor", "/products?after=garbage", "?after"),
    query("garbage cursor in base64", "/products?after=W10", "?after"),
    query("cursor of another sort", "/products?sort=name&after=WyJpZCIsbnVsbCwxXQ", "?after"),
    query("overlong cursor", f"/products?after={'x' * 1_001}", "?after"),
    query("NUL in the words", "/products?q=%00", "?q"),
    query("NUL in the category", "/products?category=%00", "?category"),
    query("10k emoji", f"/products?q={quote(EMOJI[:1_000])}", "?q"),
    query("lone surrogate", "/products?q=%ed%a0%80", "?"),
    query("not UTF-8", "/products?q=%ff", "?"),
    query("too many", "/products?" + "&".join(f"a{i}=1" for i in range(60)), "?"),
    Case(
        "body on GET",
        "GET",
        "/products?limit=0",
        raw=b'{"limit": 1}',
        headers=JSON,
        fields=frozenset({"?limit", "body"}),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_bad_input_is_answered_with_what_is_wrong_and_changes_nothing(open_shop: Shop, case: Case) -> None:
    before = await state_of(open_shop)
    reply = await send(open_shop, case.method, case.path, case.body, raw=case.raw, headers=case.headers)
    assert_problem(reply, case.status, case.code)
    if case.fields is not None:
        assert reply.wrong_fields == case.fields
    if case.code == "malformed_json":
        details = reply.json["details"]
        assert details["offset"] <= len(case.raw or b"")
        assert details["line"] == (case.raw or b"")[: details["offset"]].count(b"\n") + 1
    assert await state_of(open_shop) == before


async def send(shop: Shop, method: str, path: str, body: Any = None, **options: Any) -> Response:
    """A request that is sent again while its caller is too fast for the row's limit."""
    while True:
        reply = await shop.request(method, path, body, **options)
        if reply.status != 429:
            return reply
        await asyncio.sleep(0.1)


async def test_broken_json_is_answered_with_line_and_column(open_shop: Shop) -> None:
    reply = await open_shop.post("/orders", raw=b'{\n  "user_id": 1,\n  "items" []\n}', headers=JSON)
    assert reply.json["details"] | {"reason": ""} == {"reason": "", "line": 3, "column": 11, "offset": 28}
    assert "line 3, column 11" in reply.json["detail"]


@pytest.mark.parametrize(
    "name",
    [
        "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
        "\u2600\ufe0f" * 50,
        "Zoë \u200d\U0001f469",
        "'; DROP TABLE products; --",
        "%s{name}\\u0000",
    ],
)
async def test_odd_text_that_is_text_comes_back_as_it_was(open_shop: Shop, name: str) -> None:
    made = await Things.of(open_shop, await new_person(open_shop))
    path = f"/products/{made.product.id}"
    changed = await open_shop.patch(path, {"name": name, "description": name})
    assert (changed.status, changed.json["name"]) == (200, name)
    assert (await open_shop.get(path)).json["description"] == name
    found = await open_shop.get(f"/products?q={quote(name)}")
    assert found.status == 200


@pytest.mark.parametrize(
    ("moves", "wanted", "legal"),
    [
        ([], {"status": "completed"}, ["cancelled", "confirmed"]),
        ([], {"fulfilment": "shipped"}, []),
        ([{"status": "cancelled"}], {"status": "confirmed"}, []),
        ([{"status": "confirmed"}], {"status": "pending"}, ["cancelled", "completed"]),
        ([{"status": "confirmed"}], {"fulfilment": "returned"}, ["shipped"]),
        ([{"status": "confirmed"}], {"status": "completed", "fulfilment": "delivered"}, ["shipped"]),
    ],
)
async def test_an_illegal_move_names_the_legal_ones_and_moves_nothing(
    open_shop: Shop, moves: list[dict[str, str]], wanted: dict[str, str], legal: list[str]
) -> None:
    path = f"/orders/{await new_order(open_shop, 1)}"
    for move in moves:
        assert (await open_shop.patch(path, move)).status == 200
    before = await open_shop.get(path)
    reply = await open_shop.patch(path, wanted)
    assert_problem(reply, 409, "orders.illegal_move")
    assert reply.json["details"]["legal"] == legal
    assert (await open_shop.get(path)).body == before.body


# ------------------------------------------------------------------------------------------------ generated input

WITH_BODY = [route for route in ROUTES if route.body is not None]
WITH_QUERY = [route for route in ROUTES if route.method == "GET"]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["", NUL, RTL, "\U0001f600" * 300, "1e999", "NaN", "-1", "USD", "null", "customer", "pending", 2**53, 10**30]
    )
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def slots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is, in a value of JSON."""
    inner: list[tuple[Any, ...]] = [path]
    if isinstance(value, dict):
        inner += [slot for name, part in value.items() for slot in slots(part, (*path, name))]
    if isinstance(value, list):
        inner += [slot for i, part in enumerate(value) for slot in slots(part, (*path, i))]
    return inner


def mutated(data: st.DataObject, body: Any) -> Any:
    """A body with one to three parts replaced, removed or added."""
    body = json.loads(json.dumps(body))
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        path = data.draw(st.sampled_from(slots(body)), "place")
        if not path:
            if isinstance(body, dict):
                body[data.draw(st.text(max_size=8), "new name")] = data.draw(anything, "new value")
            continue
        holder = body
        for step in path[:-1]:
            holder = holder[step]
        if data.draw(st.booleans(), "remove"):
            del holder[path[-1]]
        else:
            holder[path[-1]] = data.draw(anything, "value")
    return body


def assert_answered(reply: Response) -> None:
    """That an answer is one that the API promises: success, or a problem with all its parts, never a 5xx."""
    assert reply.status < 500, reply.body
    if reply.status >= 400:
        assert_problem(reply, reply.status, reply.code)


async def send_checked(shop: Shop, route: Route, things: Things, raw: bytes) -> None:
    assert_answered(
        await send(shop, route.method, things.path(route), raw=raw, headers=JSON, token=things.person.token)
    )


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


async def target(shop: Shop) -> Things:
    """What the property tests act on: their own staff member, who may do everything and whom no other test needs."""
    if shop not in _targets:
        _targets[shop] = await Things.of(shop, await new_person(shop, "staff"))
    return _targets[shop]


_targets: dict[Shop, Things] = {}


@pytest.mark.parametrize("route", WITH_BODY, ids=named)
@fuzz(40)
@given(data=st.data())
async def test_no_nearly_right_body_breaks_a_row(guarded_shop: Shop, route: Route, data: st.DataObject) -> None:
    things = await target(guarded_shop)
    body = mutated(data, things.body(route))
    await send_checked(guarded_shop, route, things, json.dumps(body).encode())


@pytest.mark.parametrize("route", WITH_BODY, ids=named)
@fuzz(25)
@given(raw=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
async def test_no_bytes_break_a_row(guarded_shop: Shop, route: Route, raw: bytes) -> None:
    await send_checked(guarded_shop, route, await target(guarded_shop), raw)


PARAMETERS = sorted({f.encode_name for r in ROUTES if r.query for f in msgspec.structs.fields(r.query)})
texts = st.text(st.characters(codec="utf-8"), max_size=20) | scalars.map(str)
query_strings = st.lists(st.tuples(st.sampled_from(PARAMETERS) | texts, texts), max_size=4).map(
    lambda pairs: "&".join(
        f"{quote(name.encode('utf-8', 'replace'))}={quote(value.encode('utf-8', 'replace'))}" for name, value in pairs
    )
)


@pytest.mark.parametrize("route", WITH_QUERY, ids=named)
@fuzz(40)
@given(
    query_string=query_strings | st.text("abcdeflimtqusor=&%0123456789;+-_.~", max_size=30),
    id_text=st.none() | st.integers(0, 2**70).map(str) | st.text(st.characters(codec="utf-8"), min_size=1).map(quote),
)
async def test_no_query_or_path_breaks_a_row(
    guarded_shop: Shop, route: Route, query_string: str, id_text: str | None
) -> None:
    things = await target(guarded_shop)
    path = things.path(route) if id_text is None else route.path.replace("{id}", id_text.replace("/", "%2F"))
    reply = await guarded_shop.get(f"{path}?{query_string}", token=things.person.token)
    assert_answered(reply)


@fuzz(60)
@given(
    name=st.sampled_from(
        ["If-Match", "Idempotency-Key", "Authorization", "Content-Type", "traceparent", "X-Request-Id"]
    ),
    value=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60),
)
async def test_no_header_breaks_a_row(open_shop: Shop, name: str, value: str) -> None:
    body = json.dumps({**ORDER, "user_id": UNKNOWN_ID}).encode()
    reply = await open_shop.post("/orders", raw=body, headers={**JSON, name: value})
    assert 400 <= reply.status < 500
    assert_answered(reply)


@fuzz(60)
@given(line=st.binary(min_size=1, max_size=60), tail=st.binary(max_size=60))
@example(line=b"\n!:", tail=b"")  # a request line without a version, then a header
@example(line=b" HTTP/2.0\r\n!:", tail=b"")
async def test_no_bytes_on_a_connection_break_the_server(open_shop: Shop, line: bytes, tail: bytes) -> None:
    host, port = open_shop.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /" + line + b" HTTP/1.1\r\nHost: " + f"{host}:{port}".encode() + b"\r\n" + tail + b"\r\n\r\n")
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    if answer:
        status = int(answer.removeprefix(b"HTTP/1.1 ")[:3])
        names_a_version = b"HTTP/" in line
        assert 200 <= status < 500 or (names_a_version and status == VERSION_NOT_SUPPORTED.status), answer


# ---------------------------------------------------------------------------------------------------------- secrets

CANARY = "canary-5d41402abc4b2a76"


async def test_no_secret_shows_up_in_an_answer_or_in_the_log(
    guarded_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    written = io.BytesIO()
    telemetry.configure_logging("debug", written)
    with caplog.at_level("DEBUG"):
        replies, tokens = await life_with_secrets(guarded_shop, await new_person(guarded_shop))
    said = b"\n".join(
        [*(reply.body + repr(reply.headers).encode() for reply in replies), (await guarded_shop.get("/metrics")).body]
    )
    # The server keeps no access log; pytest, which listens to every logger, makes uvicorn believe that one is read.
    messages = [record.getMessage() for record in caplog.records if record.name != "uvicorn.access"]
    logged = written.getvalue() + "\n".join(messages).encode()
    assert b"an injected failure" in logged, "the test would not notice anything"
    for secret in (CANARY, *tokens):
        assert secret.encode() not in said
        assert secret.encode() not in logged


async def life_with_secrets(shop: Shop, person: Person) -> tuple[list[Response], list[str]]:
    """All that one can say with a password and its tokens; the answers that may not hold them, and the tokens."""
    password = f"{CANARY} password"
    replies = [
        await send(
            shop,
            "POST",
            "/users/me/password",
            token=person.token,
            body={"current_password": PASSWORD, "new_password": password},
        )
    ]
    login = await send(shop, "POST", "/login", {"email": person.email, "password": password})
    assert login.status == 200
    access, refresh = login.json["access_token"], login.json["refresh_token"]
    fresh = (await send(shop, "POST", "/token/refresh", {"refresh_token": refresh})).json
    forged = access[:-3] + "abc"
    for method, path, options in (
        ("POST", "/login", {"body": {"email": person.email, "password": f"{password} wrong"}}),
        ("POST", "/login", {"body": {"email": person.email, "password": password, "extra": 1}}),
        ("POST", "/login", {"body": {"email": person.email, "password": [password]}}),
        ("POST", "/login", {"raw": f'{{"email": "x", "password": "{password}"'.encode(), "headers": JSON}),
        ("POST", "/login", {"raw": f"email=x&password={password}".encode(), "headers": JSON}),
        ("POST", "/register", {"body": {"email": person.email, "name": "x", "password": password}}),
        ("POST", "/register", {"body": {"email": "x", "name": "", "password": password}}),
        (
            "POST",
            "/users/me/password",
            {"body": {"current_password": f"{CANARY} no", "new_password": f"{CANARY} new"}, "token": access},
        ),
        (
            "POST",
            "/users/me/password",
            {"body": {"current_password": password, "new_password": CANARY[:7]}, "token": access},
        ),
        ("POST", "/token/refresh", {"body": {"refresh_token": [fresh["refresh_token"]]}}),
        ("POST", "/logout", {"body": {"refresh_token": fresh["refresh_token"]}}),
        ("POST", "/token/refresh", {"body": {"refresh_token": refresh}}),
        ("GET", "/users/me", {"token": access}),
        ("GET", "/users/me", {"token": forged}),
        ("GET", "/users/me", {"headers": {"Authorization": f"Basic {CANARY}"}}),
        ("GET", f"/products?q={CANARY}", {}),
        ("GET", f"/orders/1?token={CANARY}", {"token": access}),
    ):
        if path == f"/products?q={CANARY}" or "token=" in path:
            await send(shop, method, path, **options)  # what is in a URL may be named in its answer, not in the log
        else:
            replies.append(await send(shop, method, path, **options))
    replies.append(await fail(shop, password))
    guest = await guest_with_secrets(shop, replies)
    return replies, [access, refresh, forged, fresh["access_token"], fresh["refresh_token"], "$argon2id$", guest]


async def guest_with_secrets(shop: Shop, replies: list[Response]) -> str:
    """The access token of an order, with which everything was asked that it opens, and a failure was met."""
    placed = await send(shop, "POST", "/orders", {"product_id": 100}, headers={"Prefer": "wait=20"})
    assert placed.status == 201, placed.body
    order_id, token = placed.json["id"], placed.json["access_token"]
    for path in (f"/orders/{order_id}", f"/orders/{order_id}/timeline", f"/orders/{order_id}/nothing"):
        replies.append(await send(shop, "GET", f"{path}?access_token={token}"))
        replies.append(await send(shop, "GET", path, headers={"Authorization": f"Guest {token}"}))
    replies.append(await send(shop, "POST", f"/payments/process?access_token={token}&order_id={order_id}&amount=x"))

    async def explode(_: str) -> None:
        raise RuntimeError("an injected failure")

    remove = faults.inject("orders.cancel.before_commit", explode)
    try:
        reply = await send(shop, "POST", f"/orders/{order_id}/cancel?access_token={token}")
    finally:
        remove()
    assert_problem(reply, 500, "internal")
    return token


async def fail(shop: Shop, password: str) -> Response:
    """An account that is opened while something unexpected goes wrong."""

    async def explode(_: str) -> None:
        raise RuntimeError("an injected failure")

    remove = faults.inject("users.register.after_commit", explode)
    try:
        account = {"email": f"{CANARY[:6]}@example.com", "name": "x", "password": password}
        reply = await send(shop, "POST", "/register", account)
    finally:
        remove()
    assert_problem(reply, 500, "internal")
    return reply
