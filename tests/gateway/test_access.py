"""Access: denied by default, owners see their own, and an open shop refuses web pages of other origins."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jwt
from joserfc.jwk import KeySet, OKPKey

from gateway.harness import Things, without_ids
from mercato.chassis.hosting.keys import key_deriver, service_secrets
from mercato.contracts.roles import ANONYMOUS, CUSTOMER, STAFF
from mercato.gateway.auth import ALGORITHMS
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.harness import TEST_SECRET
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, UNKNOWN_ID, new_order, new_person
from mercato.testing.snapshots import state_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

REFUSED = {"sign_in_first": 401, "forbidden": 403}


def named(value: Route | str) -> str:
    return f"{value.method} {value.path}" if isinstance(value, Route) else value


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def things_of_customer(guarded_shop: Shop) -> Things:
    """For requests that are refused and change nothing: one set is enough for all of them."""
    return await Things.of(guarded_shop, await new_person(guarded_shop))


@pytest.mark.parametrize(
    ("route", "role"), [(route, role) for route in ROUTES for role in sorted(route.roles)], ids=named
)
async def test_a_row_is_open_to_its_roles(guarded_shop: Shop, route: Route, role: str) -> None:
    caller = await new_person(guarded_shop, STAFF if role == STAFF else CUSTOMER)
    things = await Things.of(guarded_shop, caller)
    reply = await guarded_shop.request(
        route.method, things.path(route), things.body(route), token=None if role == ANONYMOUS else caller.token
    )
    assert reply.code not in REFUSED if reply.status >= 400 else reply.status in (200, 201, 204)


@pytest.mark.parametrize(
    ("route", "role"),
    [(route, role) for route in ROUTES for role in (ANONYMOUS, CUSTOMER) if role not in route.roles],
    ids=named,
)
async def test_a_row_is_open_to_no_other_role(
    guarded_shop: Shop, things_of_customer: Things, route: Route, role: str
) -> None:
    things = things_of_customer
    before = await state_of(guarded_shop)
    reply = await guarded_shop.request(
        route.method, things.path(route), things.body(route), token=None if role == ANONYMOUS else things.person.token
    )
    assert_problem(reply, 401 if role == ANONYMOUS else 403, "sign_in_first" if role == ANONYMOUS else "forbidden")
    assert ("www-authenticate" in reply.headers) == (role == ANONYMOUS)
    assert await state_of(guarded_shop) == before


async def test_every_row_is_open_to_staff() -> None:
    assert [named(route) for route in ROUTES if STAFF not in route.roles] == []


@pytest.mark.parametrize("route", ROUTES, ids=named)
async def test_a_row_opens_nothing_that_its_operation_does_not(route: Route) -> None:
    assert route.roles <= route.operation.allow


async def test_a_row_that_does_not_say_who_may_cannot_be_made() -> None:
    assert "roles" in {field.name for field in msgspec.structs.fields(Route) if field.required}


async def test_a_refusal_comes_before_a_look_at_the_request(guarded_shop: Shop) -> None:
    broken = {"raw": b"{", "headers": {"Content-Type": "application/json"}}
    assert_problem(await guarded_shop.post("/payments", **broken), 401, "sign_in_first")
    assert_problem(await guarded_shop.post("/products", token=await guarded_shop.alice(), **broken), 403, "forbidden")


# ------------------------------------------------------------------------------------------------------------ owners

OWNED = [route for route in ROUTES if "{" in route.path and CUSTOMER in route.roles and ANONYMOUS not in route.roles]
"""The rows about one thing that customers may ask for, and callers without an account may not: it has an owner."""


@pytest.mark.parametrize("route", OWNED, ids=named)
async def test_a_row_answers_for_anothers_thing_as_for_one_that_does_not_exist(
    guarded_shop: Shop, route: Route
) -> None:
    owner, other = await new_person(guarded_shop), await new_person(guarded_shop)
    things = await Things.of(guarded_shop, owner, needs_refund=route.path.startswith("/refunds/"))
    unknown_things = msgspec.structs.replace(
        things,
        person=msgspec.structs.replace(owner, id=UNKNOWN_ID),
        order_id=UNKNOWN_ID,
        payment_id=UNKNOWN_ID,
        refund_id="0" * 32,
    )
    before = await state_of(guarded_shop)

    async def ask(asked: Things) -> tuple[int, dict[str, str], str]:
        reply = await guarded_shop.request(route.method, asked.path(route), things.body(route), token=other.token)
        return without_ids(reply, asked.person.id, asked.order_id, asked.payment_id, asked.refund_id)

    foreign, unknown = await ask(things), await ask(unknown_things)
    assert foreign == unknown
    # Below /users/me an id is that of an entry of the caller's own; one that there is not may be deleted.
    assert foreign[0] == 404 or route.path.startswith("/users/me/")
    assert await state_of(guarded_shop) == before


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/orders/{order}", None),
        ("POST", "/orders/{order}/cancel", {"reason": "mine now"}),
        ("GET", "/users/{user}", None),
        ("PATCH", "/users/{user}", {"name": "Mine now"}),
        ("PATCH", "/users/{user}", {"email": "not an e-mail"}),
        ("POST", "/orders", {"user_id": "{user}", "product_id": 100}),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"If-Match": '"7"'}], ids=["", "If-Match"])
async def test_anothers_id_answers_like_one_that_does_not_exist(
    guarded_shop: Shop, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    owner, other = await new_person(guarded_shop), await new_person(guarded_shop)
    order_id = await new_order(guarded_shop, owner.id)

    async def ask(order: int, user: int) -> tuple[int, dict[str, str], str]:
        sent = json.loads(json.dumps(body).replace('"{user}"', str(user)))
        url = path.format(order=order, user=user)
        reply = await guarded_shop.request(method, url, sent, headers=headers, token=other.token)
        return without_ids(reply, order, user)

    before = await state_of(guarded_shop)
    foreign, unknown = await ask(order_id, owner.id), await ask(UNKNOWN_ID, UNKNOWN_ID)
    assert foreign == unknown
    assert foreign[0] in (404, 400)
    assert await state_of(guarded_shop) == before


async def test_the_owner_sees_what_the_other_does_not(guarded_shop: Shop) -> None:
    owner = await new_person(guarded_shop)
    order_id = await new_order(guarded_shop, owner.id)
    for path in (f"/orders/{order_id}", f"/orders/{order_id}/history", f"/users/{owner.id}"):
        assert (await guarded_shop.get(path, token=owner.token)).status == 200


@pytest.mark.parametrize("filters", ["", "user_id={owner}", "status=pending", "limit=200&before=9007199254740991"])
async def test_no_filter_shows_orders_of_others(guarded_shop: Shop, filters: str) -> None:
    owner, other = await new_person(guarded_shop), await new_person(guarded_shop)
    await new_order(guarded_shop, owner.id)
    own = await new_order(guarded_shop, other.id)
    reply = await guarded_shop.get(f"/orders?{filters.format(owner=owner.id)}", token=other.token)
    assert reply.status == 200
    assert [order["id"] for order in reply.json] == ([] if "user_id" in filters else [own])


async def test_a_customer_cannot_give_the_role_of_staff(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    sneaky = {"email": f"sneaky.{person.email}", "name": "x", "password": PASSWORD, "role": "staff"}
    assert (await guarded_shop.post("/register", sneaky)).wrong_fields == {"role"}
    assert (await guarded_shop.patch("/users/me", {"role": "staff"}, token=person.token)).wrong_fields == {"role"}
    assert_problem(
        await guarded_shop.put(f"/users/{person.id}/role", {"role": "staff"}, token=person.token), 403, "forbidden"
    )


# ------------------------------------------------------------------------------------------------------------ tokens


async def test_signing_out_ends_the_session_and_the_access_token_runs_out_by_itself(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    login = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json
    refresh = {"refresh_token": login["refresh_token"]}
    assert (await guarded_shop.post("/logout", refresh)).status == 204
    assert_problem(await guarded_shop.post("/token/refresh", refresh), 401, "users.session_ended")
    # An access token is good for its fifteen minutes: no service is asked about it.
    assert (await guarded_shop.get("/users/me", token=login["access_token"])).status == 200
    assert (await guarded_shop.post("/logout", refresh)).status == 204, "signing out twice is signing out"


async def test_a_role_counts_from_the_next_session_on(guarded_shop: Shop) -> None:
    person, staff = await new_person(guarded_shop), await guarded_shop.staff()
    login = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json
    assert (await guarded_shop.put(f"/users/{person.id}/role", {"role": "staff"}, token=staff)).status == 200
    refresh = {"refresh_token": login["refresh_token"]}
    assert_problem(await guarded_shop.post("/token/refresh", refresh), 401, "users.session_ended")
    fresh = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json
    assert (await guarded_shop.get("/users", token=fresh["access_token"])).status == 200


async def test_another_password_ends_the_sessions(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    login = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json
    change = {"current_password": PASSWORD, "new_password": f"another {PASSWORD}"}
    assert (await guarded_shop.post("/users/me/password", change, token=login["access_token"])).status == 204
    refresh = {"refresh_token": login["refresh_token"]}
    assert_problem(await guarded_shop.post("/token/refresh", refresh), 401, "users.session_ended")


async def test_a_refresh_that_is_sent_twice_gets_the_same_refresh_token(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    login = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json
    first = await guarded_shop.post("/token/refresh", {"refresh_token": login["refresh_token"]})
    again = await guarded_shop.post("/token/refresh", {"refresh_token": login["refresh_token"]})
    assert (first.status, again.status) == (200, 200)
    assert first.json["refresh_token"] == again.json["refresh_token"]
    last = await guarded_shop.post("/token/refresh", {"refresh_token": first.json["refresh_token"]})
    assert last.status == 200


# The key of the users service of a test's shop. With it, a token is wrong in nothing but what the test changes.
USERS_SECRET = service_secrets(TEST_SECRET, ["users"])["users"]
KEY = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(key_deriver(USERS_SECRET)("users/access-token/1")))


def minted(header: dict[str, Any], claims: dict[str, Any], key: OKPKey = KEY) -> str:
    headers = {"alg": "EdDSA", "typ": "at+jwt", "kid": KEY.thumbprint(), **header}
    content = {"iss": "mercato", "aud": "mercato", "sub": "1", "role": "customer", "sid": "0" * 32, **claims}
    content.setdefault("exp", time.time() + 600)
    return jwt.encode(headers, content, key, registry=ALGORITHMS)


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


FORGED = {
    "expired": minted({}, {"exp": time.time() - 1}),
    "another audience": minted({}, {"aud": "another"}),
    "another issuer": minted({}, {"iss": "another"}),
    "another type": minted({"typ": "JWT"}, {}),
    "a role of services": minted({}, {"role": "service"}),
    "another key": minted({}, {}, OKPKey.import_key(Ed25519PrivateKey.generate())),
    "an unknown key id": minted({"kid": "another"}, {}),
    "no algorithm": f"{part({'alg': 'none', 'typ': 'at+jwt'})}.{minted({}, {}).split('.')[1]}.",
    "no signature": minted({}, {}).rpartition(".")[0] + ".",
    "no token": "not-a-token",
}


async def test_the_forgeries_are_wrong_in_one_thing_only(guarded_shop: Shop) -> None:
    assert (await guarded_shop.get("/users/me", token=minted({}, {}))).json["name"] == "Alice"


@pytest.mark.parametrize("forgery", FORGED)
@pytest.mark.parametrize(("method", "path"), [("GET", "/users/me"), ("GET", "/products"), ("POST", "/orders")])
async def test_a_forged_token_is_refused_wherever_it_comes(
    guarded_shop: Shop, forgery: str, method: str, path: str
) -> None:
    reply = await guarded_shop.request(method, path, token=FORGED[forgery])
    assert_problem(reply, 401, "unauthenticated")
    assert reply.headers["www-authenticate"] == 'Bearer realm="mercato"'
    assert FORGED[forgery] not in reply.body.decode()


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Basic YWxpY2U6eA==", "Token abc", "abc"])
async def test_another_scheme_is_refused(guarded_shop: Shop, header: str) -> None:
    reply = await guarded_shop.get("/users/me", headers={"Authorization": header})
    assert_problem(reply, 401, "unauthenticated")


async def test_a_wrong_token_is_refused_in_an_open_shop_as_well(open_shop: Shop) -> None:
    assert_problem(await open_shop.get("/users", token="abc"), 401, "unauthenticated")
    assert_problem(await open_shop.get("/users", token=minted({}, {})), 403, "forbidden")


async def test_the_published_keys_verify_a_real_token(guarded_shop: Shop) -> None:
    reply = await guarded_shop.get("/.well-known/jwks.json")
    assert reply.status == 200
    [key] = reply.json["keys"]
    assert "d" not in key, "the private half stays here"
    assert (key["kty"], key["crv"], key["use"]) == ("OKP", "Ed25519", "sig")
    token = jwt.decode(await guarded_shop.alice(), KeySet.import_key_set(reply.json), registry=ALGORITHMS)
    assert (token.header["typ"], token.header["kid"]) == ("at+jwt", key["kid"])
    assert (token.claims["sub"], token.claims["role"], token.claims["iss"]) == ("1", "customer", "mercato")


# --------------------------------------------------------------------------------------------------------- open shop


@pytest.mark.parametrize("path", ["/users", "/", "/health/live", "/metrics", "/nothing", "/.well-known/jwks.json"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "127.0.0.2"])
async def test_an_open_shop_does_not_answer_under_a_foreign_name(open_shop: Shop, path: str, host: str) -> None:
    assert_problem(await open_shop.get(path, headers={"Host": host}), 403, "host_not_allowed")


async def test_an_open_shop_answers_under_its_own_names(open_shop: Shop) -> None:
    port = open_shop.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LocalHost:{port}"):
        assert (await open_shop.get("/users", headers={"Host": host})).status == 200
        assert (await open_shop.get("/users", headers={"Host": host, "Origin": f"http://{host}"})).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://localhost"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/orders"), ("POST", "/orders/{order}/cancel"), ("GET", "/users"), ("GET", "/metrics")],
)
async def test_a_request_of_a_page_of_another_origin_is_refused_and_changes_nothing(
    open_shop: Shop, origin: str, method: str, path: str
) -> None:
    order_id = await new_order(open_shop, 1)
    before = await state_of(open_shop)
    body = {"user_id": 1, "product_id": 100} if path == "/orders" else None
    reply = await open_shop.request(method, path.format(order=order_id), body, headers={"Origin": origin})
    assert_problem(reply, 403, "host_not_allowed")
    assert "access-control-allow-origin" not in reply.headers
    assert await state_of(open_shop) == before


async def test_a_body_with_the_content_type_of_a_form_is_refused(open_shop: Shop) -> None:
    # What a page can send without asking first: the three content types of forms.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        body = b'{"user_id": 1, "product_id": 100}'
        reply = await open_shop.post("/orders", raw=body, headers={"Content-Type": kind})
        assert_problem(reply, 415, "unsupported_media_type")


async def test_a_preflight_request_to_an_open_shop_gets_no_cors_headers(open_shop: Shop) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    reply = await open_shop.request("OPTIONS", "/orders", headers=asked)
    assert reply.status in (403, 405)
    assert not any(name.startswith("access-control") for name in reply.headers)


async def test_a_guarded_shop_answers_under_any_name(guarded_shop: Shop) -> None:
    headers = {"Host": "shop.example", "Origin": "https://shop.example"}
    assert (await guarded_shop.get("/products", headers=headers)).status == 200


async def test_callers_at_the_same_moment_are_not_mixed_up(guarded_shop: Shop) -> None:
    people = [await new_person(guarded_shop) for _ in range(5)]
    replies = await asyncio.gather(
        *(guarded_shop.get(f"/users/{other.id}", token=person.token) for person in people for other in people)
    )
    seen = [reply.status for reply in replies]
    assert seen == [200 if person is other else 404 for person in people for other in people]


@pytest.mark.parametrize("path", ["/login", "/logout", "/token/refresh"])
async def test_a_bad_token_does_not_keep_its_owner_from_a_new_one(guarded_shop: Shop, path: str) -> None:
    reply = await guarded_shop.post(path, {}, token="abc")
    assert_problem(reply, 400, "invalid_request")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Via"])
async def test_an_open_shop_does_not_answer_through_a_proxy(open_shop: Shop, header: str) -> None:
    for path in ("/users", "/docs"):
        assert_problem(await open_shop.get(path, headers={header: "203.0.113.7"}), 403, "host_not_allowed")


async def test_metrics_are_refused_through_a_proxy(guarded_shop: Shop) -> None:
    assert (await guarded_shop.get("/metrics")).status == 200
    reply = await guarded_shop.get("/metrics", headers={"X-Forwarded-For": "203.0.113.7"})
    assert_problem(reply, 401, "sign_in_first")
