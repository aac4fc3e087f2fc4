"""The API's description is valid, complete, and true: it comes from the table, and its examples fit its own schemas."""

import re
from collections.abc import Iterator
from typing import Any, get_origin

import msgspec
import pytest
from hypothesis import assume, given, strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from mercato.chassis.contract import MAX_ID, Actor, InvalidRequest, published_pattern
from mercato.gateway import examples, fields, idempotency, openapi, problems
from mercato.gateway.described_headers import KEY_PATTERN
from mercato.gateway.explained import EXPLAINED
from mercato.gateway.problems import HostNotAllowed, SignInFirst
from mercato.gateway.route import Output, Route, RouteRequest
from mercato.gateway.routes import ROUTES
from mercato.gateway.validation import decode_body, decode_query, decoder
from mercato.simulators.bank import contract as bank

CLOSED = openapi.document(ROUTES, open_shop=False, server_url=None)
OPEN = openapi.document(ROUTES, open_shop=True, server_url="http://127.0.0.1:8080")

each_route = pytest.mark.parametrize("route", ROUTES, ids=openapi.operation_id)
each_document = pytest.mark.parametrize("document", [CLOSED, OPEN], ids=["closed", "open"])


def described(route: Route, document: dict[str, Any] = CLOSED) -> dict[str, Any]:
    return document["paths"][route.path][route.method.lower()]


def resolved(thing: dict[str, Any], document: dict[str, Any] = CLOSED) -> dict[str, Any]:
    while "$ref" in thing:
        target: Any = document
        for key in thing["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        thing = target
    return thing


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({"allOf": [schema], "components": CLOSED["components"]})


def component(name: str) -> Draft202012Validator:
    return validator({"$ref": f"#/components/schemas/{name}"})


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def contents(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every body that an operation takes or answers with."""
    for holder in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from resolved(holder).get("content", {}).values()


# ---------------------------------------------------------------------------------------------------- the document


@each_document
def test_the_document_is_valid(document: dict[str, Any]):
    errors = [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()]

    assert errors == []


@each_document
def test_it_describes_the_rows_and_the_known_pages_and_nothing_else(document: dict[str, Any]):
    rows = {(route.method, route.path) for route in ROUTES}
    pages = {("GET", path) for path in openapi.PAGES}

    assert {(method, path) for method, path, _ in operations(document)} == rows | pages


def test_it_survives_json():
    assert msgspec.json.decode(msgspec.json.encode(OPEN)) == OPEN


def test_operation_ids_are_unique():
    ids = [operation["operationId"] for _, _, operation in operations(CLOSED)]

    assert len(ids) == len(set(ids))


def test_every_tag_that_is_used_is_described():
    tags = {tag["name"]: tag["description"] for tag in CLOSED["tags"]}

    assert all(tags.values())
    assert {tag for _, _, operation in operations(CLOSED) for tag in operation["tags"]} == set(tags)


def test_every_component_is_used():
    text = msgspec.json.encode(CLOSED).decode()
    unused = [
        f"{kind}/{name}"
        for kind, named in CLOSED["components"].items()
        for name in named
        if kind != "securitySchemes" and f"#/components/{kind}/{name}" not in text
    ]

    assert unused == []


SID = "4d1b0f0c6f0e4cf2a7a6f6e1f9f0a3b7"


def test_the_server_is_named_where_it_is_known():
    assert OPEN["servers"] == [{"url": "http://127.0.0.1:8080"}]
    assert "servers" not in CLOSED


# --------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("operation", [o for *_, o in operations(CLOSED)], ids=lambda o: o["operationId"])
def test_every_example_fits_its_own_schema(operation: dict[str, Any]):
    for content in contents(operation):
        shown = [resolved(example)["value"] for example in content.get("examples", {}).values()]
        shown += [content["example"]] if "example" in content else []
        for example in shown:
            validator(content["schema"]).validate(example)
    for parameter in map(resolved, operation.get("parameters", [])):
        if "example" in parameter:
            validator(parameter["schema"]).validate(parameter["example"])


def query_of(route: Route) -> msgspec.Struct | None:
    """The query parameters that the row must have."""
    if route.query is None:
        return None
    must = [field.encode_name for field in msgspec.structs.fields(route.query) if field.required]
    return decode_query(route.query, "&".join(f"{name}=1" for name in must).encode())


@each_route
def test_every_example_of_a_form_makes_a_request_of_its_operation(route: Route):
    for form in route.forms:
        changed = form.of(route)
        for body in form.examples.values() or [None]:
            assert body is None or (form.is_body and form.is_body(body))
            typed = decode_body(decoder(changed.body), msgspec.json.encode(body)) if changed.body else None
            request = RouteRequest(
                Actor("staff", 1), {"id": 1}, None, typed, None, None, b"", None, "USD", {"id": "p1"}
            )
            assert isinstance(changed.request(request), changed.operation.request)


@each_route
def test_every_example_of_a_body_makes_a_request_of_the_operation(route: Route):
    for body in examples.bodies(route).values() if route.body else [None]:
        query = query_of(route)
        typed = decode_body(decoder(route.body), msgspec.json.encode(body)) if route.body else None
        key = "a-key" if route.idempotency_required else None
        request = RouteRequest(
            Actor("staff", 1), {"id": 1}, query, typed, None, key, b"", None, "USD", {"id": SID}, SID
        )

        assert isinstance(route.request(request), route.operation.request)


@each_route
def test_every_body_has_an_example(route: Route):
    body = described(route).get("requestBody")

    assert (body is None) == (route.body is None)
    assert body is None or body["content"]["application/json"]["examples"]


def test_a_body_without_an_example_in_its_row_gets_one_that_is_valid():
    route = next(route for route in ROUTES if route.path == "/products" and route.body is not None)
    bare = msgspec.structs.replace(route, examples={})

    (body,) = examples.bodies(bare).values()

    component("CreateProductIn").validate(body)
    assert bare.body is not None
    assert decode_body(decoder(bare.body), msgspec.json.encode(body))


def test_an_answer_says_what_its_request_said():
    create, move, cancel = (
        next(r for r in ROUTES if openapi.operation_id(r) == name)
        for name in ("products.create", "orders.move", "orders.cancel")
    )

    assert examples.answer(create)["price"] == next(iter(create.examples.values()))["price"]
    assert examples.answer(move)["status"] == "confirmed"
    assert examples.answer(cancel)["status"] == "cancelled"


# ---------------------------------------------------------------------------------------------------------- answers


@each_route
def test_a_row_answers_with_its_status_and_the_headers_that_it_sets(route: Route):
    success = described(route)["responses"][str(route.status)]

    assert ("content" in success) == (route.output is not None)
    assert ("ETag" in success["headers"]) == (route.etag is not None or route.is_public)
    assert ("Location" in success["headers"]) == (route.location is not None)
    assert ("Idempotent-Replayed" in success["headers"]) == (route.replayed is not None)
    assert "X-Request-Id" in success["headers"]


@each_route
@each_document
def test_a_problem_of_an_operation_has_the_codes_that_it_can_have(route: Route, document: dict[str, Any]):
    shown = described(route, document)["responses"]
    of_route = [examples.error(kind) for kind in openapi.errors_of(route, open_shop=document is OPEN)]
    codes = {(problems.status_of(error), error.code) for error in of_route}
    codes |= {(r.status, r.code) for r in examples.server_refusals() if r.status != 413 or route.body is not None}
    found = set[tuple[int, str]]()
    for status, reference in shown.items():
        content = resolved(reference, document).get("content", {}).get(problems.MEDIA_TYPE)
        if content is not None:
            base, closed = content["schema"]["allOf"]
            assert base == {"$ref": "#/components/schemas/Problem"}
            assert sorted(content["examples"]) == closed["properties"]["code"]["enum"]
            found |= {(int(status), code) for code in closed["properties"]["code"]["enum"]}

    assert found == codes


def test_nothing_but_a_parameter_has_a_default():
    """Generators of clients take it for a value that is always there."""

    def places(thing: Any, path: str) -> Iterator[str]:
        if isinstance(thing, dict):
            yield from [path] if "default" in thing else []
            thing = thing.items()
        elif isinstance(thing, list):
            thing = enumerate(thing)
        else:
            return
        for name, part in thing:
            yield from places(part, f"{path}/{name}")

    assert list(places(CLOSED["components"], "")) == []
    assert CLOSED["components"]["schemas"]["ItemIn"]["properties"]["quantity"]["description"] == "Without it: `1`."


def test_an_object_without_known_members_is_open():
    named = CLOSED["components"]["schemas"]

    assert named["Problem"]["properties"]["details"] == {"type": "object", "additionalProperties": True}
    assert named["ExportOut"]["properties"]["next"]["additionalProperties"] == {"type": "string"}


def test_the_methods_of_payment_are_those_of_the_bank():
    assert published_pattern(bank.METHOD_PATTERN) == published_pattern(fields.PAYMENT_METHOD_PATTERN)


WRITES = [route for route in ROUTES if route.method != "GET"]


@pytest.mark.parametrize("route", WRITES, ids=openapi.operation_id)
def test_what_an_operation_that_changes_something_does_is_said_in_sentences(route: Route):
    explained, rules = described(route)["description"].split("\n\n")
    sentences = re.split(r"(?<=\.)\s+", explained)

    assert 3 <= len(sentences) <= 6
    assert all(re.fullmatch(r"[`A-Z0-9].{10,}\.", sentence) for sentence in sentences)
    assert rules


def test_no_operation_is_explained_that_is_not_there():
    streamed = [route for route in ROUTES if route.stream]
    assert set(EXPLAINED) == {f"{route.method} {route.path}" for route in (*WRITES, *streamed)}


def test_an_order_is_said_to_be_accepted_and_no_more():
    assert "201 means accepted" in CLOSED["paths"]["/orders"]["post"]["description"]


def test_pages_of_a_collection_have_a_link():
    success = CLOSED["paths"]["/orders"]["get"]["responses"]["200"]

    assert success["content"]["application/json"]["schema"]["type"] == "array"
    assert "Link" in success["headers"]


@each_route
def test_a_collection_that_is_counted_says_so(route: Route):
    operation = described(route)
    is_asked = {"$ref": "#/components/parameters/PreferCount"} in operation.get("parameters", [])
    is_answered = "Total-Count" in operation["responses"][str(route.status)]["headers"]

    assert is_asked == is_answered == (get_origin(route.output) is list and route.path != "/events")


@each_route
@each_document
def test_every_error_of_a_row_is_at_its_status(route: Route, document: dict[str, Any]):
    for kind in (*route.errors, *openapi.errors_of(route, open_shop=document is OPEN)):
        error = examples.error(kind)
        response = resolved(described(route, document)["responses"][str(problems.status_of(error))], document)
        example = response["content"]["application/problem+json"]["examples"][kind.code]

        assert resolved(example, document)["value"]["code"] == kind.code
        assert (error.retry_after_s is None) or "Retry-After" in response["headers"]


@each_document
def test_every_path_says_that_it_refuses_other_methods(document: dict[str, Any]):
    for _, _, operation in operations(document):
        refused = resolved(operation["responses"]["405"], document)

        assert "Allow" in refused["headers"]
        assert "method_not_allowed" in refused["content"]["application/problem+json"]["examples"]


def test_what_a_row_is_decides_what_it_can_refuse():
    place = described(next(r for r in ROUTES if r.idempotency))["responses"]
    update = described(next(r for r in ROUTES if r.if_match))["responses"]
    limited = described(next(r for r in ROUTES if r.limits.per_second is not None))["responses"]
    plain = CLOSED["paths"]["/products/{id}"]["get"]["responses"]

    assert {"400", "401", "413", "415", "422", "503", "504"} <= set(place)
    assert "412" in update
    assert "429" in limited
    assert {"403", "412", "413", "415", "422", "429"}.isdisjoint(plain)


# ------------------------------------------------------------------------------------------------------------ asking


@each_route
def test_parameters_are_those_of_the_path_the_query_and_the_headers(route: Route):
    parameters = {p["name"]: p for p in map(resolved, described(route).get("parameters", []))}
    query = {field.encode_name for field in msgspec.structs.fields(route.query)} if route.query else set()

    assert {name for name, p in parameters.items() if p["in"] == "path"} == ({"id"} if "{id}" in route.path else set())
    query |= {"access_token"} if route.takes_access_token else set()
    query |= {"cursor"} if "limit" in query else set()
    assert {name for name, p in parameters.items() if p["in"] == "query"} == query
    assert ("Idempotency-Key" in parameters) == route.idempotency
    assert ("If-Match" in parameters) == route.if_match
    if "id" in route.text:
        schema = parameters["id"]["schema"]
        assert (schema["type"], schema["pattern"]) in {("string", "^[0-9a-f]{32}$"), ("string", "^[0-9a-z]{1,60}$")}
        assert all(re.fullmatch(schema["pattern"], example) for example in schema["examples"])
    elif "id" in parameters and parameters["id"]["in"] == "path":
        number = {"type": "integer", "minimum": 1, "maximum": MAX_ID}
        takes_text = any(form.text for form in route.forms)
        assert (parameters["id"]["schema"]["anyOf"][0] if takes_text else parameters["id"]["schema"]) == number


def test_query_parameters_have_their_constraints():
    parameters = {p["name"]: p for p in map(resolved, CLOSED["paths"]["/orders"]["get"]["parameters"])}

    assert parameters["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    assert parameters["status"]["schema"]["enum"] == ["pending", "confirmed", "completed", "cancelled"]
    assert parameters["status"]["schema"]["type"] == "string"  # nothing is the absence of a filter, null is not


def test_a_token_is_needed_by_role_and_optional_in_an_open_shop():
    place = next(r for r in ROUTES if r.path == "/orders" and r.method == "POST")
    search = next(r for r in ROUTES if r.path == "/products" and r.method == "GET")

    change = next(r for r in ROUTES if r.path == "/orders/{id}" and r.method == "PATCH")
    assert described(change)["security"] == [{"bearer": []}]
    assert described(place)["security"] == [{}, {"bearer": []}]
    assert described(place, OPEN)["security"] == [{}, {"bearer": []}]
    assert described(search)["security"] == []
    assert SignInFirst in openapi.errors_of(place, open_shop=False)
    assert SignInFirst not in openapi.errors_of(place, open_shop=True)
    assert HostNotAllowed in openapi.errors_of(place, open_shop=True)


# ----------------------------------------------------------------------------------------------------------- schemas


def structs(model: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(model, type) and issubclass(model, msgspec.Struct):
        yield model
        for field in msgspec.structs.fields(model):
            yield from structs(field.type)
    for part in getattr(model, "__args__", ()):
        yield from structs(part)


def test_inputs_refuse_unknown_fields_and_answers_may_get_new_ones():
    inputs = {struct.__name__ for route in ROUTES for struct in structs(route.body)}
    outputs = {struct for route in ROUTES for struct in structs(route.output)}
    named = CLOSED["components"]["schemas"]

    assert all(named[name]["additionalProperties"] is False for name in inputs)
    assert all("additionalProperties" not in named[struct.__name__] for struct in outputs)
    assert all(
        set(named[struct.__name__]["required"]) == set(named[struct.__name__]["properties"])
        for struct in outputs
        if issubclass(struct, Output)
    )


@pytest.mark.parametrize(
    ("amount", "fits"),
    [
        ("99.99", True),
        (12.5, True),
        (5, True),
        ("0", True),
        ("a lot", False),
        (-1, False),
        ("-2", False),
        (None, False),
    ],
)
def test_an_amount_is_a_string_or_a_number(amount: Any, fits: bool):
    assert component("MoneyIn").is_valid({"amount": amount, "currency": "USD"}) is fits


@pytest.mark.parametrize(
    ("amount", "fits"),
    [
        ("99.99", True),
        (12.5, True),
        (None, True),
        ({"amount": "99.99", "currency": "USD"}, True),
        ({"amount": 99.99}, True),
        ({"amount": "1e2"}, False),
        ({"currency": "USD"}, False),
        ({"amount": "1", "cents": 1}, False),
        ([], False),
    ],
)
@pytest.mark.parametrize("model", ["PlaceOrderIn", "PayIn", "CaptureIn", "RefundIn"])
def test_an_amount_in_a_body_is_bare_or_an_object_with_its_currency(model: str, amount: Any, fits: bool):
    required: dict[str, dict[str, int]] = {"PlaceOrderIn": {"user_id": 1, "product_id": 100}, "PayIn": {"order_id": 1}}
    assert component(model).is_valid({**required.get(model, {}), "amount": amount}) is fits


def test_what_may_be_null_may_be_left_out():
    order = component("PlaceOrderIn")

    assert order.is_valid({"user_id": 1, "product_id": 100})
    assert order.is_valid({"user_id": 1, "product_id": 100, "items": None, "amount": None, "currency": None})
    assert order.is_valid({"user_id": None, "product_id": 100})
    assert not order.is_valid({"user_id": "1", "product_id": 100})


def test_times_and_enumerations_are_exact():
    order = CLOSED["components"]["schemas"]["OrderOut"]["properties"]

    assert order["created_at"] == {"type": "string", "format": "date-time"}
    assert order["status"]["x-extensible-enum"] == ["pending", "confirmed", "completed", "cancelled"]
    asked = {p["name"]: p["schema"] for p in map(resolved, CLOSED["paths"]["/orders"]["get"]["parameters"])}
    assert asked["status"]["enum"] == ["pending", "confirmed", "completed", "cancelled"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user_id": 1},
        {"user_id": 0, "product_id": 1},
        {"user_id": "1", "product_id": 1},
        {"user_id": 1, "items": []},
        {"user_id": 1, "items": [{"product_id": 1}] * 100},
        {"user_id": 1, "items": [{"product_id": 1}] * 101},
        {"user_id": 1, "items": [{"product_id": 1, "quantity": 10_001}]},
        {"user_id": 1, "product_id": MAX_ID},
        {"user_id": 1, "product_id": MAX_ID + 1},
        {"user_id": 1, "product_id": 1, "currency": "usd"},
        {"user_id": 1, "product_id": 1, "qty": 2},
        {"user_id": 1, "product_id": 1, "items": [{"product_id": 1}]},
        {"user_id": 1, "quantity": 1, "items": [{"product_id": 1}]},
        {"user_id": 1, "product_id": 1, "items": None},
        {"user_id": 1.0, "product_id": 1},
        {"user_id": 1.5, "product_id": 1},
        {"user_id": 1, "product_id": 1, "currency": "XXX"},
    ],
)
def test_schema_and_gateway_agree_on_an_order(body: dict[str, Any]):
    place = next(route for route in ROUTES if route.path == "/orders" and route.method == "POST")
    assert place.body is not None
    try:
        typed = decode_body(decoder(place.body), msgspec.json.encode(body))
        place.request(RouteRequest(Actor("staff", 1), {}, None, typed, None, None, b"", None, "USD"))
        taken = True
    except InvalidRequest:
        taken = False

    assert component("PlaceOrderIn").is_valid(body) is taken


@pytest.mark.parametrize(
    ("header", "value", "fits"),
    [
        ("IfMatch", '"3"', True),
        ("IfMatch", 'W/"3"', True),
        ("IfMatch", "*", True),
        ("IfMatch", "3", False),
        ("IfMatch", '"3", "4"', False),
        ("IfMatch", '"0"', False),
        ("IfMatch", '"999999999"', True),
        ("IfMatch", '"1234567890"', False),
        ("IdempotencyKey", "k" * 255, True),
        ("IdempotencyKey", '"' + "k" * 255 + '"', True),
        ("IdempotencyKey", '"' + "k" * 256 + '"', False),
        ("Prefer", "wait=5", True),
        ("Prefer", "respond-async", True),
        ("PreferCount", "count=exact", True),
        ("PreferCount", "count=planned", True),
        ("IdempotencyKey", "k", True),
        ("IdempotencyKey", '"quoted"', True),
        ("IdempotencyKey", r'"with \" and \\"', False),
        ("IdempotencyKey", r'"with\"and\\"', True),
        ("IdempotencyKey", 'with"inside', True),
        ("IdempotencyKey", '""', False),
        ("IdempotencyKey", '"open', False),
        ("IdempotencyKey", r'"with\a"', False),
        ("IdempotencyKey", "two words", False),
        ("IdempotencyKey", "k" * 256, False),
    ],
)
def test_headers_are_described_as_they_are_read(header: str, value: str, fits: bool):
    assert validator(CLOSED["components"]["parameters"][header]["schema"]).is_valid(value) is fits


@given(st.text(st.characters(codec="ascii"), max_size=20) | st.from_regex(KEY_PATTERN, fullmatch=True))
def test_description_and_gateway_agree_on_idempotency_keys(value: str):
    assume(value == value.strip() and len(value) <= 255)
    try:
        read = bool(idempotency.key_of(value.encode()))
    except InvalidRequest:
        read = False

    assert validator(CLOSED["components"]["parameters"]["IdempotencyKey"]["schema"]).is_valid(value) is read
