"""The public gRPC API: every public operation over gRPC and over HTTP, with the same answers and errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Final

import grpc
import grpc.aio
import msgspec
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chassis.grpc.serving import ACK, GOAWAY, HOST, PING, RawClient, raw_client
from contracts import update_schemas
from gateway.calls import CODECS, METHODS, Calls, Refused
from gateway.harness import Things
from mercato import topology
from mercato.chassis.contract import Actor
from mercato.chassis.grpc import GrpcLimits
from mercato.contracts.roles import CUSTOMER, STAFF_ONLY
from mercato.gateway.grpc.descriptors import class_of
from mercato.gateway.grpc.edge import CALLS_OF_ONE, Edge
from mercato.gateway.public import public_routes
from mercato.gateway.route import Page, Route, RouteRequest
from mercato.gateway.validation import decoder
from mercato.testing.cluster import Cluster
from mercato.testing.command import ROOT
from mercato.testing.responses import Response
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, UNKNOWN_ID, Person, new_person, new_product, unique
from mercato.testing.waiting import BOUND_SECONDS, until_true

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="session")]

ROUTES: Final = public_routes()
OWN: Final = {name: route for name, route in ROUTES.items() if name not in ("orders.settled", "orders.guest_payment")}
"""Operations that have a route of their own."""
IN_MINOR_UNITS: Final[Mapping[str, Mapping[str, Any]]] = {
    # Amounts of the bodies in `Things.body`, which HTTP clients send in major units.
    "orders.place": {"expected_total_minor": 99_99},
    "orders.pay": {"expected_total_minor": 99_99},
    "orders.capture_part": {"amount_minor": 9_99},
    "orders.refund": {"amount_minor": 9_99},
    "products.update": {"price_minor": 8_99},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    made = await Shop.start(cluster, is_open=False, has_grpc=True)
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def calls(shop: Shop) -> AsyncGenerator[Calls]:
    async with Calls.of(shop) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def things(shop: Shop) -> Things:
    """For calls that change nothing."""
    return await Things.of(shop, await new_person(shop))


# -------------------------------------------------------------------------------------------- as the table has them


def asked(route: Route, things: Things, key: str | None) -> dict[str, Any]:
    """The fields of the message that say the same as `things.path` and `things.body` do over HTTP."""
    path = things.path(route)
    names = [part.strip("{}") for part in route.path.split("/") if "{" in part]
    parts = dict(zip(names, [path.split("/")[route.path.split("/").index(f"{{{n}}}")] for n in names], strict=True))
    body = None if route.body is None else decoder(route.body).decode(json.dumps(things.body(route)))
    request = RouteRequest(
        Actor(CUSTOMER, things.person.id),
        {n: int(part) for n, part in parts.items() if n not in route.text},
        None if route.query is None else msgspec.convert({}, route.query),
        body,
        None,
        key,
        b"",
        None,
        "USD",
        {n: part for n, part in parts.items() if n in route.text},
        session_id="0" * 32,
    )
    values = CODECS.named(METHODS[route.operation.full_name].request).write(route.request(request))
    return {**values, **IN_MINOR_UNITS.get(route.operation.full_name, {})}


def shown(route: Route, answer: Any) -> Any:
    """What the route answers over HTTP for an answer that came over gRPC."""
    codec = CODECS.named(METHODS[route.operation.full_name].answer)
    seen = codec.typed(codec.read(answer))
    made = route.answer(seen)
    made = made.items if isinstance(made, Page) else made
    return json.loads(msgspec.json.encode(made))


VARIES: Final = re.compile(
    r'("(?:id|\w+_id|access_token|refresh_token|position|version|subject|took_ms)": )("[^"]*"|-?\d+|null)'
    r"|\d{4}-\d\d-\d\dT[\d:.]+(?:Z|\+00:00)|-\d+-\d+|(?:customer|staff|order|payment|product) \d+"
)


def without_what_varies(shown: Any) -> Any:
    """Ids, times and tokens of two equal things differ."""
    text = re.sub(r"(\d)\.0\b", r"\1", json.dumps(shown, sort_keys=True))  # all numbers of a Value are floats
    return VARIES.sub(lambda found: (found[1] or "") + "VARIES", text)


async def over_http(shop: Shop, route: Route, things: Things, token: str | None, key: str | None) -> Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    path, body = things.path(route), things.body(route)
    return await shop.request(route.method, path, body, token=token, headers=headers)


async def token_for(shop: Shop, route: Route, person: Person) -> str | None:
    if route.ignores_token:
        return None
    return await shop.staff() if route.roles == STAFF_ONLY else person.token


@pytest.mark.parametrize("operation", sorted(OWN))
async def test_an_operation_has_the_same_answer_or_error_over_both(shop: Shop, calls: Calls, operation: str):
    route, made = OWN[operation], []
    for _ in range(2):
        person = await new_person(shop)
        made.append(await Things.of(shop, person, needs_refund=operation == "orders.one_refund"))
    first, second = made
    if "{" in route.path and route.path.startswith("/users/me/"):
        second = first  # such an id is not a user's: what has it may exist for one of the two alone
    key = unique("key") if route.idempotency else None
    response = await over_http(shop, route, first, await token_for(shop, route, first.person), key)
    call = calls.begin(
        operation,
        asked(route, second, key and f"{key}-2"),
        token=await token_for(shop, route, second.person),
    )
    code = await call.code()

    assert (code is grpc.StatusCode.OK) == (response.status < 400), (response.body, await call.details())
    if code is not grpc.StatusCode.OK:
        assert await refusal_of(call) == response.code
    elif route.output is not None:
        ours, theirs = shown(route, await call), response.json
        if operation == "events.list":  # more of them come all the time
            ours, theirs = ours[:10], theirs[:10]
        assert without_what_varies(ours) == without_what_varies(theirs)


async def refusal_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return Refused(error).reason
    raise AssertionError("it was answered")


@pytest.mark.parametrize("operation", sorted(OWN))
async def test_a_caller_who_may_not_call_gets_the_same_error_over_both(
    shop: Shop, calls: Calls, things: Things, operation: str
):
    route = OWN[operation]
    key = unique("key") if route.idempotency else None
    for role, token in (("anonymous", None), (CUSTOMER, things.person.token)):
        if role in route.roles or route.is_guest is not None:
            continue
        response = await over_http(shop, route, things, token, key)
        refused = await calls.refusal(operation, asked(route, things, key), token=token)
        assert refused.reason == response.code
        assert refused.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


# ------------------------------------------------------------------------------------------------------ what is refused


async def test_all_wrong_fields_are_named_at_once(calls: Calls, things: Things):
    refused = await calls.refusal(
        "orders.place",
        {
            "lines": [{"product_id": 0, "quantity": 20_000}],
            "payment_method": "no method",
            "idempotency_key": "has spaces",
        },
        token=things.person.token,
    )

    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == "invalid_request"
    assert set(refused.fields) == {
        "lines[0].product_id",
        "lines[0].quantity",
        "payment_method",
        "idempotency_key",
    }
    assert refused.fields["lines[0].product_id"] == "must be at least 1"


async def test_errors_of_services_have_the_names_of_the_message(calls: Calls, things: Things):
    lines = [{"product_id": 100}, {"product_id": 100}]

    refused = await calls.refusal("orders.place", {"lines": lines}, token=things.person.token)

    assert set(refused.fields) == {"lines[1].product_id"}


async def test_a_value_that_no_enumeration_has_is_refused_with_those_that_it_has(calls: Calls, things: Things):
    refused = await calls.refusal("orders.list", {"status": 99}, token=things.person.token)

    assert refused.fields == {"status": "must be one of pending, confirmed, completed, cancelled"}


@pytest.mark.parametrize("seconds", [2**60, -(2**60)])
async def test_a_time_that_is_none_is_refused(calls: Calls, things: Things, seconds: int):
    refused = await calls.refusal("orders.list", {"created_from": {"seconds": seconds}}, token=things.person.token)

    assert set(refused.fields) == {"created_from"}


async def test_bytes_that_are_no_message_are_refused(calls: Calls):
    refused = await calls.refusal("users.sign_in", b"\xff\xff\xff")

    assert refused.fields == {"message": "is not a mercato.users.v1.SignIn"}


async def test_a_message_beyond_the_limit_of_its_route_is_refused(calls: Calls):
    refused = await calls.refusal("users.sign_in", {"email": "a" * 20_000, "password": "b"})

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "body_too_large")
    assert refused.sentence == "The message may have at most 16384 bytes."


async def test_a_message_beyond_the_limit_of_the_server_is_refused(calls: Calls, things: Things):
    refused = await calls.refusal("orders.place", {"customer_note": "a" * 2**20}, token=things.person.token)

    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "path", ["/mercato.orders.v1.OrdersService/Reserve", "/mercato.inventory.v1.Inventory/Reserve"]
)
async def test_an_unknown_method_is_unimplemented(calls: Calls, path: str):
    call = calls.channel.unary_unary(path)(b"", timeout=30)

    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_codes_are_as_exact_as_those_of_google_rpc(shop: Shop, calls: Calls, things: Things):
    staff = await shop.staff()
    account = {"email": things.person.email, "name": "Alice", "password": PASSWORD}
    product = {"sku": things.product.sku, "name": "Lamp", "price_minor": 100, "currency": "USD", "category": "lamps"}
    stale = {"id": things.order_id, "reason": "test", "version": 99}
    found = {
        refused.reason: refused.code
        for refused in (
            await calls.refusal("users.register", account),
            await calls.refusal("products.create", product, token=staff),
            await calls.refusal("orders.cancel", stale, token=staff),
            await calls.refusal("events.list", {"after": 2**53 - 1}, token=staff),
        )
    }

    assert found == {
        "users.email_taken": grpc.StatusCode.ALREADY_EXISTS,
        "products.sku_taken": grpc.StatusCode.ALREADY_EXISTS,
        "stale_version": grpc.StatusCode.ABORTED,
        "events.cursor_ahead": grpc.StatusCode.OUT_OF_RANGE,
    }


@pytest.mark.parametrize("token", ["no token", "eyJhbGciOiJFZERTQSJ9.e30.AAAA"])
async def test_a_wrong_token_is_unauthenticated(calls: Calls, token: str):
    refused = await calls.refusal("users.get", token=token)

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
    assert refused.details["Unauthenticated"].reason == "This shop did not issue the access token."


async def test_a_missing_token_is_unauthenticated_and_the_sentence_says_what_to_call(calls: Calls):
    refused = await calls.refusal("users.get")

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "sign_in_first")
    assert "mercato.users.v1.UsersService/SignIn" in refused.sentence


async def test_the_details_of_an_error_are_a_message(calls: Calls, things: Things):
    refused = await calls.refusal("orders.get", {"id": UNKNOWN_ID}, token=things.person.token)

    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "orders.not_found")
    assert refused.details["OrderNotFound"].order_id == UNKNOWN_ID
    assert refused.details["ErrorInfo"].domain == "mercato"


async def test_details_that_do_not_fit_are_left_out(calls: Calls, things: Things):
    lines = [{"product_id": 0, "quantity": 20_000}] * 100

    refused = await calls.refusal("orders.place", {"lines": lines}, token=things.person.token)

    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert 10 < len(refused.fields) <= 50


@pytest.fixture
def busy(shop: Shop) -> Generator[Shop]:
    """A shop with as many requests in work as it takes."""
    shop.load.in_work += 10**6
    yield shop
    shop.load.in_work -= 10**6


async def test_a_cancelled_call_leaves_the_queue(busy: Shop, calls: Calls, things: Things):
    call = calls.begin("orders.list", token=things.person.token)
    await until_true(lambda: busy.load.waiting == 1)

    call.cancel()

    await until_true(lambda: busy.load.waiting == 0)


async def test_an_overloaded_shop_says_when_to_come_again(busy: Shop, calls: Calls, things: Things):
    busy.load.waiting += 10**6
    try:
        refused = await calls.refusal("orders.list", token=things.person.token)
    finally:
        busy.load.waiting -= 10**6

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
    assert refused.details["RetryInfo"].retry_delay.seconds >= 1
    assert refused.details["Overloaded"].operation == "mercato.orders.v1.OrdersService/List"


async def test_passwords_are_guessed_no_faster_than_over_http(shop: Shop, calls: Calls):
    person = await new_person(shop)
    wrong = {"email": person.email, "password": "not this one"}
    for _ in range(3):
        assert (await shop.post("/login", wrong)).code == "users.wrong_credentials"
    for _ in range(2):
        assert (await calls.refusal("users.sign_in", wrong)).reason == "users.wrong_credentials"

    refused = await calls.refusal("users.sign_in", wrong)

    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too_many_requests")
    assert refused.details["RetryInfo"].retry_delay.seconds >= 1
    assert (await shop.post("/login", wrong)).status == 429


# -------------------------------------------------------------------------------------------------- keys, guests, views


async def test_a_key_places_one_order(calls: Calls, things: Things):
    wanted = {"lines": [{"product_id": 100}], "idempotency_key": unique("key")}
    first = await calls.call("orders.place", wanted, token=things.person.token)
    again = await calls.call("orders.place", wanted, token=things.person.token)
    other = await calls.refusal("orders.place", {**wanted, "customer_note": "another"}, token=things.person.token)

    assert other.sentence.startswith("This idempotency_key was used before with another ")
    assert (first.replayed, again.replayed, again.order.id) == (False, True, first.order.id)
    assert (other.code, other.reason) == (grpc.StatusCode.ALREADY_EXISTS, "idempotency_key_reused")


async def test_a_refund_needs_a_key_and_it_is_a_field(shop: Shop, calls: Calls, things: Things):
    token = await shop.staff()
    missing = await calls.refusal("orders.refund", {"payment_id": things.payment_id}, token=token)
    beside = await calls.refusal(
        "orders.refund", {"payment_id": things.payment_id}, token=token, metadata=[("idempotency-key", "k")]
    )

    assert missing.reason == "idempotency_key_missing"
    assert missing.sentence == "mercato.orders.v1.OrdersService/Refund needs the field idempotency_key."
    assert set(beside.fields) == {"metadata idempotency-key"}


async def test_a_guest_orders_sees_and_pays_with_the_access_token(calls: Calls):
    placed = await calls.call("orders.place", {"lines": [{"product_id": 100}], "guest_email": "guest@example.com"})
    order = {"id": placed.order.id, "access_token": placed.access_token}
    settled = await calls.call("orders.settled", {**order, "wait_ms": 10_000})
    paid = await calls.call("orders.pay", {**order, "method": "sandbox:ok"})
    payment = await calls.call(
        "orders.guest_payment", {"payment_id": paid.payment.id, "access_token": placed.access_token}
    )

    assert placed.order.user_id == 0
    assert settled.id == order["id"]
    assert payment.order_id == order["id"]
    assert (await calls.call("orders.get", order)).id == order["id"]
    assert (await calls.refusal("orders.get", {"id": order["id"]})).reason == "sign_in_first"
    assert (await calls.refusal("orders.get", {**order, "access_token": "wrong"})).reason == "orders.not_found"


async def test_customers_see_of_a_level_whether_there_is_stock(shop: Shop, calls: Calls, things: Things):
    level = {"product_id": things.product.id}
    seen = await calls.call("inventory.levels", level, token=things.person.token)
    of_staff = await calls.call("inventory.levels", level, token=await shop.staff())

    assert [field.name for field, _ in seen.ListFields()] == ["product_id"]
    assert not seen.HasField("on_hand")
    assert of_staff.HasField("on_hand")


async def test_a_refusal_does_not_say_how_much_there_is_beyond_ten(shop: Shop, calls: Calls, things: Things):
    product = await new_product(shop)
    stock = {"product_id": product.id, "on_hand": 50, "reason": "counted"}
    await calls.call("inventory.set", stock, token=await shop.staff())
    placed = await calls.call(
        "orders.place", {"lines": [{"product_id": product.id, "quantity": 51}]}, token=things.person.token
    )
    waiting = {"id": placed.order.id, "wait_ms": 10_000}

    settled = await calls.call("orders.settled", waiting, token=things.person.token)
    refused = await calls.refusal("orders.settled", {**waiting, "refusals": True}, token=things.person.token)

    assert [(line.requested, line.available) for line in settled.reason.lines] == [(51, 10)]
    assert [(line.requested, line.available) for line in refused.details["OutOfStock"].items] == [(51, 10)]
    assert refused.reason == "orders.out_of_stock"


async def test_a_value_that_only_a_newer_service_knows_is_unspecified(calls: Calls, things: Things):
    codec = CODECS.named("mercato.users.v1.User")
    user = codec.typed(codec.read(await calls.call("users.get", {"id": things.person.id}, token=things.person.token)))

    assert codec.built(user).role == 1
    assert codec.built(msgspec.structs.replace(user, role="robot")).role == 0


async def test_the_own_account_needs_no_id(calls: Calls, things: Things):
    assert (await calls.call("users.get", token=things.person.token)).id == things.person.id


# ---------------------------------------------------------------------------------------------------------- connections

MAX_CONCURRENT_STREAMS: Final = 3
"""A setting of HTTP/2, by which a client sees whose limits a server has."""
OF_THIS_TEST: Final = 7
ENHANCE_YOUR_CALM: Final = 11
"""An error code of HTTP/2."""


async def until_closed(shop: Shop, *, greets: bool, **limits: float) -> RawClient:
    """Connects to a port of the shop with limits of its own, and gives what came until the server closed it."""
    own = msgspec.structs.replace(GrpcLimits(), streams=OF_THIS_TEST, **limits)
    port = topology.public_grpc(shop.app, shop.harness.host.telemetry, HOST, 0, limits=own)
    async with port as address, raw_client(address, greets=greets) as client:
        async with asyncio.timeout(BOUND_SECONDS):
            await client.until_closed()
    return client


async def test_a_connection_that_sends_nothing_is_closed(shop: Shop):
    client = await until_closed(shop, greets=False, handshake_seconds=0.2)

    assert client.settings[MAX_CONCURRENT_STREAMS] == OF_THIS_TEST


async def test_an_idle_connection_is_closed(shop: Shop):
    client = await until_closed(shop, greets=True, idle_seconds=0.2)

    assert client.settings[MAX_CONCURRENT_STREAMS] == OF_THIS_TEST
    assert GOAWAY in {kind for kind, _, _ in client.frames}


async def test_a_connection_that_answers_no_probe_is_closed(shop: Shop):
    client = await until_closed(shop, greets=True, ping_seconds=0.2, ping_answer_seconds=0.2)

    assert client.settings[MAX_CONCURRENT_STREAMS] == OF_THIS_TEST
    assert PING in {kind for kind, flags, _ in client.frames if not flags & ACK}


async def test_a_client_that_probes_the_port_of_a_shop_too_often_is_closed(shop: Shop):
    async with raw_client(shop.grpc_address) as client, asyncio.timeout(BOUND_SECONDS):
        client.ping(GrpcLimits().client_ping_strikes + 2)
        await client.until_closed()

    assert client.settings[MAX_CONCURRENT_STREAMS] == GrpcLimits().streams
    [reason] = [payload for kind, _, payload in client.frames if kind == GOAWAY and b"too_many_pings" in payload]
    assert int.from_bytes(reason[4:8]) == ENHANCE_YOUR_CALM


async def test_the_documented_limits_are_those_of_the_port():
    limits = GrpcLimits()
    stated = (
        f"messages of {limits.message_bytes // 2**20} MiB, {limits.streams} calls of a connection at once, "
        f"{CALLS_OF_ONE} of an address, {limits.calls} in all. A connection is closed that has not begun HTTP/2 "
        f"(and TLS) after {limits.handshake_seconds:g} seconds, that has no call for {limits.idle_seconds:g} seconds, "
        f"that does not answer a probe (PING) for {limits.ping_answer_seconds:g} seconds, or that probes more often "
        f"than every {limits.client_ping_seconds:g} seconds, the third time."
    )

    assert limits.client_ping_strikes == 2, "the third is closed"
    assert stated in " ".join((ROOT / "docs/grpc.md").read_text().split())


# --------------------------------------------------------------------------------------------------- what operators see


async def test_a_call_has_the_request_id_that_its_client_gave(shop: Shop, calls: Calls, things: Things):
    call = calls.begin("users.get", token=things.person.token, metadata=[("x-request-id", "mine")])
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine"

    text = (await shop.get("/metrics")).text
    labels = 'rpc_method="mercato.users.v1.UsersService/Get",rpc_response_status_code="OK"'
    assert f"mercato_grpc_request_duration_seconds_count{{{labels}}}" in text


async def test_a_refused_call_has_the_ids_of_its_request_and_its_trace(calls: Calls):
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    ids = [("x-request-id", "mine"), ("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01")]

    refused = await calls.refusal("users.get", metadata=ids)

    assert refused.trailer["x-request-id"] == "mine"
    assert (refused.details["RequestInfo"].request_id, refused.details["RequestInfo"].serving_data) == (
        "mine",
        trace_id,
    )


async def test_the_security_log_has_the_address_of_the_caller(shop: Shop, calls: Calls):
    person = await new_person(shop)
    tokens = await calls.call("users.sign_in", {"email": person.email, "password": PASSWORD})

    log = await calls.call("users.own_security_log", token=tokens.access_token)

    assert log.entries[0].address == HOST


async def test_health_and_reflection_name_the_services(calls: Calls):
    channel: Any = calls.channel  # the generated stubs have no types
    stub: Any = health_pb2_grpc.HealthStub(channel)
    reflected: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    reflected = reflected.ServerReflectionInfo()
    await reflected.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = await reflected.read()
    await reflected.done_writing()

    for service in ("", "mercato.orders.v1.OrdersService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    names = {service.name for service in listed.list_services_response.service}
    assert {"mercato.orders.v1.OrdersService", "mercato.users.v1.UsersService", "grpc.health.v1.Health"} <= names


class Context:
    """A call of a client, as far as the edge asks for it."""

    def __init__(self, token: str | None, *, address: str = "10.0.0.7", remaining: float | None = None) -> None:
        self.code = grpc.StatusCode.OK
        self._token = token
        self._address = address
        self._remaining = remaining

    def peer(self) -> str:
        return f"ipv4:{self._address}:50000"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),)

    def time_remaining(self) -> float | None:
        return self._remaining

    def set_trailing_metadata(self, trailer: object) -> None:
        pass

    async def abort(self, code: grpc.StatusCode, details: str, trailer: object) -> None:
        self.code = code
        raise grpc.aio.AbortError(details)


@pytest.fixture
def edge(shop: Shop) -> Edge:
    return Edge(
        shop.app, topology.SERVICES, ["orders"], update_schemas.committed_numbers(), shop.harness.host.telemetry
    )


async def code_of(edge: Edge, method: str, request: dict[str, Any], context: Any) -> grpc.StatusCode:
    found = edge.methods[f"/mercato.orders.v1.OrdersService/{method}"]
    with contextlib.suppress(grpc.aio.AbortError):
        message = class_of(f"mercato.orders.v1.{found.request.type.__name__}")(**request)
        await edge.call(found, message.SerializeToString(), context)
    return context.code


async def test_an_operation_has_the_time_that_its_client_has_left(edge: Edge, things: Things):
    token = things.person.token

    assert await code_of(edge, "List", {}, Context(token, remaining=0.0)) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await code_of(edge, "List", {}, Context(token, remaining=BOUND_SECONDS)) is grpc.StatusCode.OK
    assert await code_of(edge, "List", {}, Context(token)) is grpc.StatusCode.OK


async def slow_order(calls: Calls, token: str | None) -> int:
    """An order whose payment takes a minute."""
    wanted = {"lines": [{"product_id": 100}], "payment_method": "sandbox:slow:60000"}
    return (await calls.call("orders.place", wanted, token=token)).order.id


async def test_one_address_has_a_bounded_number_of_calls(edge: Edge, calls: Calls, things: Things):
    token = things.person.token
    waiting = {"id": await slow_order(calls, token), "wait_ms": 60_000}
    running = [
        asyncio.create_task(code_of(edge, "Settled", waiting, Context(token, address="10.0.0.7")))
        for _ in range(CALLS_OF_ONE)
    ]
    await asyncio.sleep(0)  # each is counted before it first waits

    beyond = await code_of(edge, "List", {}, Context(token, address="10.0.0.7"))
    of_another = await code_of(edge, "List", {}, Context(token, address="10.0.0.8"))
    edge.stop_waiting()

    assert (beyond, of_another) == (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK)
    await asyncio.gather(*running)
    assert await code_of(edge, "List", {}, Context(token, address="10.0.0.7")) is grpc.StatusCode.OK


async def test_a_port_that_closes_answers_what_waits_and_says_that_it_does_not_serve(
    shop: Shop, calls: Calls, things: Things
):
    token = things.person.token
    order = await slow_order(calls, token)
    port = topology.public_grpc(shop.app, shop.harness.host.telemetry, HOST, 0)
    async with Calls(await port.__aenter__()) as own:
        channel: Any = own.channel  # the generated stubs have no types
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="mercato.orders.v1.OrdersService"))
        states = [(await watched.read()).status]
        waiting = own.begin("orders.settled", {"id": order, "wait_ms": 60_000}, token=token)
        await own.call("orders.get", {"id": order}, token=token)  # on the same connection, after it

        closing = asyncio.create_task(port.__aexit__(None, None, None))
        states.append((await watched.read()).status)
        watched.cancel()

        assert (await waiting).id == order
        await closing

    assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_a_drain_answers_running_calls_and_loses_no_acknowledged_order(cluster: Cluster):
    shop = await Shop.start(cluster, is_open=False, has_grpc=True)
    placed: list[int] = []
    codes: set[grpc.StatusCode] = set()

    async def place(calls: Calls, token: str | None) -> None:
        while not codes:
            call = calls.begin("orders.place", {"lines": [{"product_id": 100}]}, token=token)
            code = await call.code()
            if code is grpc.StatusCode.OK:
                placed.append((await call).order.id)
            else:
                codes.add(code)

    try:
        people = [await new_person(shop) for _ in range(8)]
        async with Calls.of(shop) as calls:
            working = [asyncio.create_task(place(calls, person.token)) for person in people]
            await until_true(lambda: len(placed) >= 20)
            await shop.stack.aclose()
            await asyncio.gather(*working)
        # CANCELLED: a call that was still running when the time to drain was over, as on a busy machine.
        assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        kept = await shop.harness.values("SELECT id FROM orders WHERE id = ANY($1::bigint[])", placed, of="orders")
        assert set(kept) == set(placed)
    finally:
        await shop.close()
