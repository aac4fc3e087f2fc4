"""The bounds in the API's description are those of the server: it takes values just inside, and none just outside.

The values are made from the description. What else an answer says, such as that a thing does not exist, does not count:
a value is refused where the answer is 400 and names its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from jsonschema import Draft202012Validator

from gateway.harness import Things
from mercato.gateway import described_headers, openapi
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOCUMENT: dict[str, Any] = openapi.document(ROUTES, open_shop=False, server_url=None)
Values = list[tuple[Any, bool]]
"""Each with whether it is inside."""

DEPENDENT = {
    ("GET /products", "after"),
    ("POST /products/{id}/stock/adjustments", "delta"),
    ("POST /payments/{id}/refunds", "currency"),
    ("POST /payments/{id}/capture", "currency"),
    ("POST /payments", "currency"),
}
"""Inside their bounds these are refused for what else there is: a cursor is of one search, an order has its currency,
and the stock has a bound."""


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference names; of an X or null that of X."""
    if "$ref" in schema:
        kind, name = schema["$ref"].split("/")[2:]
        return resolved(DOCUMENT["components"][kind][name])
    options = [resolved(option) for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    return options[0] if options else schema


def values(schema: dict[str, Any]) -> Values:
    """On both sides of each bound of a schema."""
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if "enum" in schema:
        return [*((one, True) for one in schema["enum"] if one is not None), ("no such value", False)]
    if "integer" in kinds:
        return list(_of_numbers(schema))
    if "array" in kinds:
        item = {"product_id": 1, "quantity": 1} if "$ref" in schema["items"] else 1
        return [([item] * (schema["minItems"] - 1), False), ([item] * (schema["maxItems"] + 1), False)]
    if "string" in kinds:
        made = [*_of_lengths(schema), *OF_PATTERNS.get(schema.get("pattern", ""), [])]
        assert [(value, Draft202012Validator(schema).is_valid(value)) for value, _ in made] == made
        return made
    return []


def _of_numbers(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    for bound, step in (("minimum", -1), ("maximum", 1)):
        if bound in schema:
            yield schema[bound], True
            yield schema[bound] + step, False
    if "not" in schema:
        yield schema["not"]["const"], False


def _of_lengths(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    for bound, step in (("minLength", -1), ("maxLength", 1)):
        if bound in schema:
            if "pattern" not in schema and "format" not in schema:
                yield "a" * schema[bound], True
            yield "a" * (schema[bound] + step), False


OF_PATTERNS: dict[str, Values] = {
    r"^[^\x00]*$": [("a", True), ("a\x00", False)],
    "^[a-z0-9][a-z0-9-]*$": [("a" * 64, True), ("-a", False), ("A", False)],
    "^[A-Za-z0-9][A-Za-z0-9._-]*$": [(".a", False), ("a b", False)],
    r"^[0-9]+(\.[0-9]+)?$": [("1.5", True), ("1.", False), (".5", False), ("-1", False), ("1" * 101, False)],
    "^[0-9a-f]{32}$": [("0" * 32, True), ("0" * 31, False), ("0" * 33, False), ("g" * 32, False)],
    "^[0-9a-z]{1,60}$": [("0" * 60, True), ("0" * 61, False), ("A", False)],
    described_headers.PARAMETERS["IfMatch"]["schema"]["pattern"]: [
        ('"1"', True), ('W/"999999999"', True), ('"0"', False), ('"1000000000"', False), ("1", False),
    ],
    described_headers.KEY_PATTERN: [
        ("k" * 255, True), ("k" * 256, False), ("a b", False),
        ('"' + "k" * 255 + '"', True), ('"' + "k" * 256 + '"', False),
    ],
}  # fmt: skip


def cases(route: Route) -> Iterator[tuple[str, str, Any, bool]]:
    """Where a value goes (`query`, `path`, `header`, `body`), its name, the value, and whether it is inside."""
    operation = DOCUMENT["paths"][route.path][route.method.lower()]
    for parameter in map(_parameter, operation.get("parameters", ())):
        # Both are opaque: an access token that is too long is as wrong as any other (404), and so is a cursor (400).
        if parameter["name"] not in ("access_token", "cursor"):
            for value, fits in values(resolved(parameter["schema"])):
                yield parameter["in"], parameter["name"], value, fits
    if route.body is not None:
        schema = resolved(operation["requestBody"]["content"]["application/json"]["schema"])
        for name, part in schema.get("properties", {}).items():
            for value, fits in values(resolved(part)):
                yield "body", name, value, fits


def _parameter(parameter: dict[str, Any]) -> dict[str, Any]:
    name = parameter.get("$ref", "").rpartition("/")[2]
    return DOCUMENT["components"]["parameters"][name] if name else parameter


async def is_refused(shop: Shop, route: Route, things: Things, place: str, name: str, value: Any) -> bool:
    path, _, query = things.path(route).partition("?")
    parameters: dict[str, Any] = dict(pair.split("=") for pair in query.split("&") if pair)
    headers = {"Idempotency-Key": unique("limits")} if route.idempotency_required else {}
    body = things.body(route)
    if place == "body":
        body = {**(body or {}), name: value}
        if name == "currency":
            body.pop("amount", None)  # it has one of its own
        if name in ("product_id", "quantity"):
            body = {"product_id": 100, **{key: part for key, part in body.items() if key != "items"}}
    elif place == "query":
        parameters |= {"q": "sound", name: value} if name == "sort" else {name: value}
    elif place == "path":
        path = route.path.replace("{id}", quote(str(value), safe=""))
    else:
        headers[name] = str(value)
    target = f"{path}?{urlencode(parameters)}" if parameters else path
    reply = await shop.request(route.method, target, body, token=things.person.token, headers=headers)
    if reply.status == 404 and reply.json["code"] == "route_not_found":
        return True
    if reply.status != 400:
        return False
    named = {"query": f"?{name}", "path": f"path {name}", "header": f"header {name}", "body": name}[place]
    return any(e["field"] == named or e["field"].startswith((f"{named}[", f"{named}.")) for e in reply.json["errors"])


@pytest.mark.parametrize("route", [r for r in ROUTES if r.limits.per_second is None], ids=openapi.operation_id)
async def test_the_bounds_of_the_description_are_those_of_the_server(open_shop: Shop, route: Route) -> None:
    things = await Things.of(open_shop, await new_person(open_shop), needs_refund="/refunds/" in route.path)
    wrong: list[str] = []
    for place, name, value, fits in cases(route):
        if fits and (f"{route.method} {route.path}", name) in DEPENDENT:
            continue
        if await is_refused(open_shop, route, things, place, name, value) is fits:
            wrong.append(f"{place} {name} = {json.dumps(value)[:80]} is {'refused' if fits else 'taken'}")

    assert wrong == []
