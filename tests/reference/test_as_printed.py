"""The requests of the five reference systems, byte for byte as their documents print them (`routes/reference.py`)."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from mercato import topology
from mercato.chassis.http import bind
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person, new_product, token_of, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def send(
    shop: Shop, line: str, body: str | None = None, token: str | None = None, port: int | None = None
) -> Response:
    """Sends a request line and a body over a socket, as they are."""
    port = port or urlsplit(shop.url).port
    lines = [f"{line} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    if (token := token or shop.default_token) is not None:
        lines.append(f"Authorization: Bearer {token}")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([*lines, "", body or ""]).encode())
    head, _, sent = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
    return Response(int(status.split()[1]), headers, sent)


# --------------------------------------------------------------------- A: order and payment


async def waiting_order(shop: Shop) -> int:
    """The number of an order of a laptop whose stock is held, and that waits for its payment."""
    reply = await shop.post("/orders", {"user_id": 1, "product_id": 1}, headers={"Prefer": "wait=20"})
    assert (reply.status, reply.json["status"]) == (201, "pending"), reply.body
    return reply.json["id"]


async def test_a_an_order_of_an_item_and_an_amount(guarded_shop: Shop) -> None:
    reply = await send(guarded_shop, "POST /orders", '{"item_id": 1, "amount": 1299.99}', await guarded_shop.alice())
    assert reply.status == 201, reply.body
    assert (reply.json["item_id"], reply.json["amount"], reply.json["user_id"]) == (1, "1299.99", 1)
    assert reply.headers["location"] == f"/orders/{reply.json['id']}"


async def test_a_another_amount_than_that_of_the_catalogue_is_refused(guarded_shop: Shop) -> None:
    reply = await send(guarded_shop, "POST /orders", '{"item_id": 1, "amount": 42}', await guarded_shop.alice())
    assert_problem(reply, 409, "orders.price_changed")


async def test_a_wrong_fields_have_the_names_of_the_form(open_shop: Shop) -> None:
    reply = await send(open_shop, "POST /orders", '{"item_id": "one", "amount": "much", "colour": "red"}')
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"item_id", "amount", "colour"}


async def test_a_a_payment_is_processed_by_query_parameters(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    reply = await send(open_shop, f"POST /payments/process?order_id={order_id}&amount=1299.99")
    assert reply.status == 200, reply.body
    assert (reply.json["order_id"], reply.json["status"]) == (order_id, "captured")
    assert reply.json["message"] == f"The payment of 1299.99 USD for order {order_id} was processed."
    assert (await open_shop.get(f"/orders/{order_id}")).json["payment"] == "paid"


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("order_id=one&amount=1299.99", {"?order_id"}),
        ("order_id=1001&amount=much", {"?amount"}),
        ("order_id=1001", {"?amount"}),
        ("amount=1299.99", {"?order_id"}),
    ],
)
async def test_a_what_is_not_a_number_is_named(open_shop: Shop, query: str, fields: set[str]) -> None:
    reply = await send(open_shop, f"POST /payments/process?{query}")
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == fields


async def test_a_an_unknown_order_is_not_found(open_shop: Shop) -> None:
    assert_problem(
        await send(open_shop, "POST /payments/process?order_id=999999999&amount=1299.99"), 404, "orders.not_found"
    )


async def test_a_another_amount_than_is_due_is_a_conflict(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    reply = await send(open_shop, f"POST /payments/process?order_id={order_id}&amount=42")
    assert_problem(reply, 409, "orders.amount_not_due")


async def test_a_a_payment_that_the_provider_refuses_is_402(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    query = f"order_id={order_id}&amount=1299.99&payment_method=sandbox:declined"
    assert_problem(await send(open_shop, f"POST /payments/process?{query}"), 402, "orders.payment_declined")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_a_payments_are_processed_by_post_alone(open_shop: Shop, method: str) -> None:
    reply = await send(open_shop, f"{method} /payments/process?order_id=1001&amount=1299.99")
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "OPTIONS, POST"


# --------------------------------------------------------------------- B: users and orders


async def test_b_users_are_an_array(open_shop: Shop) -> None:
    reply = await send(open_shop, "GET /users")
    assert reply.status == 200
    assert {"id": 1, "name": "Alice"}.items() <= reply.json[0].items()


async def test_b_orders_of_a_user_are_an_array(open_shop: Shop) -> None:
    placed = await send(open_shop, "POST /orders", '{"user_id": 1, "product_id": 100, "amount": 99.99}')
    reply = await send(open_shop, "GET /orders?user_id=1")
    assert reply.status == 200
    assert {"id": placed.json["id"], "user_id": 1, "amount": "99.99"}.items() <= reply.json[0].items()


async def test_b_an_unknown_user_has_no_orders(open_shop: Shop) -> None:
    reply = await send(open_shop, "GET /orders?user_id=999999999")
    assert (reply.status, reply.json) == (200, [])


# --------------------------------------------------------------------- C: orders and customers


@pytest.mark.parametrize(
    ("items", "bought"),
    [
        ("[1, 2]", [(1, 1), (2, 1)]),
        ("[1, 2, 1]", [(1, 2), (2, 1)]),
        ('[{"product_id": 1, "quantity": 2}]', [(1, 2)]),
    ],
)
async def test_c_a_customer_orders_items(open_shop: Shop, items: str, bought: list[tuple[int, int]]) -> None:
    reply = await send(open_shop, "POST /orders", f'{{"customer_id": 1, "items": {items}}}')
    assert reply.status == 201, reply.body
    assert [(item["product_id"], item["quantity"]) for item in reply.json["items"]] == bought
    assert reply.json["order_id"] == reply.json["id"]


@pytest.mark.parametrize("body", ['{"items": []}', '{"items": [1, 2]}'])
async def test_c_without_a_customer_the_field_is_named(open_shop: Shop, body: str) -> None:
    reply = await send(open_shop, "POST /orders", body)
    assert_problem(reply, 400, "invalid_request")
    assert "customer_id" in reply.wrong_fields


async def test_c_an_order_can_be_read_by_its_number(open_shop: Shop) -> None:
    placed = await send(open_shop, "POST /orders", '{"customer_id": 1, "items": [1, 2]}')
    reply = await send(open_shop, f"GET /orders/{placed.json['order_id']}")
    assert (reply.status, reply.json["customer_id"]) == (200, 1)
    assert [item["product_id"] for item in reply.json["items"]] == [1, 2]
    assert_problem(await send(open_shop, "GET /orders/999999999"), 404, "orders.not_found")


async def test_c_a_customer_has_a_name_and_an_email(open_shop: Shop) -> None:
    reply = await send(open_shop, "GET /customers/1")
    assert (reply.status, reply.json["name"], reply.json["email"]) == (200, "Alice", "alice@example.com")
    assert_problem(await send(open_shop, "GET /customers/999999999"), 404, "users.not_found")


async def test_c_a_customer_who_does_not_exist_orders_nothing(open_shop: Shop) -> None:
    reply = await send(open_shop, "POST /orders", '{"customer_id": 999999999, "items": [1, 2]}')
    assert_problem(reply, 404, "users.not_found")


# --------------------------------------------------------------------- D: users, products, orders


async def test_d_an_order_of_products_by_sku_is_confirmed(open_shop: Shop) -> None:
    placed = await send(open_shop, "POST /orders", '{"user_id": "1", "product_ids": ["p1", "p2"]}')
    assert placed.status == 201, placed.body
    assert (placed.json["product_ids"], placed.json["status"], placed.json["user_id"]) == (["P1", "P2"], "pending", 1)
    assert [item["name"] for item in placed.json["items"]] == ["Laptop", "Smartphone"]
    reply = await send(open_shop, f"PATCH /orders/{placed.json['id']}", '{"status": "confirmed"}')
    assert (reply.status, reply.json["status"]) == (200, "confirmed"), reply.body


async def test_d_a_product_that_is_named_twice_is_bought_twice(open_shop: Shop) -> None:
    placed = await send(open_shop, "POST /orders", '{"user_id": "1", "product_ids": ["p1", "P1", 1]}')
    assert placed.status == 201, placed.body
    assert [(item["product_id"], item["quantity"]) for item in placed.json["items"]] == [(1, 3)]


async def test_d_a_sku_that_there_is_not_is_named(open_shop: Shop) -> None:
    reply = await send(open_shop, "POST /orders", '{"user_id": "1", "product_ids": ["p1", "no-such-sku"]}')
    assert_problem(reply, 404, "products.sku_not_found")
    assert reply.json["details"] == {"sku": "no-such-sku"}


@pytest.mark.parametrize("line", ["GET /products/p1", "GET /products/P1", "GET /products/1"])
async def test_d_a_product_is_found_by_its_sku_or_number(open_shop: Shop, line: str) -> None:
    reply = await send(open_shop, line)
    assert reply.status == 200, reply.body
    assert (reply.json["id"], reply.json["sku"], reply.json["name"]) == (1, "P1", "Laptop")
    assert reply.headers["etag"]


async def test_d_a_sku_itself_comes_before_one_in_another_case(open_shop: Shop) -> None:
    sku = unique("Same")
    for made in (sku.upper(), sku):
        body = {"sku": made, "name": made, "price": {"amount": "1.00"}, "category": "things"}
        assert (await open_shop.post("/products", body)).status == 201
    assert (await send(open_shop, f"GET /products/{sku}")).json["sku"] == sku
    assert (await send(open_shop, f"GET /products/{sku.lower()}")).json["sku"] == sku.upper()


async def test_d_an_unknown_sku_is_not_found(open_shop: Shop) -> None:
    assert_problem(await send(open_shop, "GET /products/no-such-sku"), 404, "products.sku_not_found")
    assert_problem(await send(open_shop, "GET /products/_"), 400, "invalid_request")
    product = await new_product(open_shop)
    changed = await send(open_shop, f"PATCH /products/{product.sku}", '{"name": "Other"}')
    assert_problem(changed, 400, "invalid_request")


async def test_d_a_user_has_a_username(open_shop: Shop) -> None:
    reply = await send(open_shop, "GET /user/1")
    assert reply.status == 200
    assert {"id": 1, "username": "Alice", "email": "alice@example.com"}.items() <= reply.json.items()
    assert_problem(await send(open_shop, "GET /user/999999999"), 404, "users.not_found")


async def registered(shop: Shop, name: str) -> Response:
    return await send(shop, "POST /register", f'{{"username": "{name}", "email": "{unique(name)}@example.com"}}')


async def signed_in(shop: Shop, name: str, password: str) -> Response:
    return await send(shop, "POST /login", f'{{"username": "{name}", "password": "{password}"}}')


async def set_password(shop: Shop, user_id: int, password: str) -> Response:
    """Sets a password by the link of the newest letter."""
    token = await token_of(shop, "reset", user_id)
    return await shop.post("/password/reset", {"token": token, "new_password": password})


async def test_d_an_account_is_opened_without_a_password(open_shop: Shop) -> None:
    reply = await send(open_shop, "POST /register", '{"username": "carol", "email": "carol@example.com"}')
    assert reply.status == 201, reply.body
    printed = {"id": reply.json["id"], "username": "carol", "email": "carol@example.com", "email_proven": False}
    assert printed.items() <= reply.json.items()
    assert reply.headers["location"] == f"/users/{reply.json['id']}"
    assert (await send(open_shop, f"GET /user/{reply.json['id']}")).json == reply.json


async def test_d_an_account_without_a_password_is_not_signed_in_to_until_its_link_set_one(guarded_shop: Shop) -> None:
    name = unique("carol")
    account = (await registered(guarded_shop, name)).json
    for password in ("", "carol", PASSWORD):
        assert_problem(await signed_in(guarded_shop, name, password), 401, "users.wrong_credentials")
        by_email = await guarded_shop.post("/login", {"email": account["email"], "password": password})
        assert_problem(by_email, 401, "users.wrong_credentials")

    assert (await set_password(guarded_shop, account["id"], PASSWORD)).status == 204
    reply = await signed_in(guarded_shop, name, PASSWORD)
    assert reply.status == 200, reply.body
    assert reply.json["message"] == f"{name} is signed in."
    assert (reply.json["user"]["id"], reply.json["user"]["email_proven"]) == (account["id"], True)
    assert reply.json["refresh_token"]
    me = await guarded_shop.get("/users/me", token=reply.json["access_token"])
    assert (me.status, me.json["id"]) == (200, account["id"])
    by_email = await signed_in(guarded_shop, account["email"].upper(), PASSWORD)
    assert (by_email.status, by_email.json["user"]["id"]) == (200, account["id"])


async def test_d_registering_an_address_again_changes_nothing_of_its_account(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    again = await send(guarded_shop, "POST /register", f'{{"username": "mallory", "email": "{person.email}"}}')
    assert_problem(again, 409, "users.email_taken")
    letters = "SELECT count(*) FROM letters WHERE kind = 'reset' AND user_id = $1"
    assert await guarded_shop.harness.values(letters, person.id, of="users") == [0]
    old = await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})
    assert (old.status, old.json["user"]["name"]) == (200, "Person")


async def test_d_a_name_signs_in_to_the_oldest_account_that_has_a_password(guarded_shop: Shop) -> None:
    name = unique("carol")
    unset, first, second = [(await registered(guarded_shop, name)).json["id"] for _ in range(3)]
    assert (await set_password(guarded_shop, second, "the second of them")).status == 204
    assert (await set_password(guarded_shop, first, "the first of them")).status == 204
    reply = await signed_in(guarded_shop, name, "the first of them")
    assert (reply.status, reply.json["user"]["id"]) == (200, first)
    assert_problem(await signed_in(guarded_shop, name, "the second of them"), 401, "users.wrong_credentials")
    assert unset < first < second


async def test_d_what_is_wrong_with_an_account_has_the_names_of_the_form(open_shop: Shop) -> None:
    for body, fields in (
        ('{"username": "  ", "email": "nowhere"}', {"username", "email"}),
        ('{"username": "carol"}', {"email"}),
        ('{"username": "carol", "email": "c@example.com", "role": "staff"}', {"role"}),
    ):
        reply = await send(open_shop, "POST /register", body)
        assert_problem(reply, 400, "invalid_request")
        assert reply.wrong_fields == fields


async def test_d_wrong_passwords_for_a_name_make_further_tries_wait(guarded_shop: Shop) -> None:
    name = unique("guessed")
    tries = [await signed_in(guarded_shop, name if odd else name.upper(), "a guess") for odd in [True, False] * 4]
    assert [reply.status for reply in tries][:5] == [401] * 5
    assert_problem(tries[-1], 429, "too_many_requests")


@pytest.mark.parametrize(
    ("service", "line", "body", "status"),
    [
        ("users", "GET /user/1", None, 200),
        ("users", "GET /customers/1", None, 200),
        ("users", "POST /login", '{"username": "Alice", "password": "demo-password"}', 200),
        ("products", "GET /products/p1", None, 200),
        ("orders", "POST /orders", '{"user_id": "1", "product_ids": ["p1", "p2"]}', 201),
        ("orders", "POST /orders", '{"customer_id": 1, "items": [1, 2]}', 201),
        ("orders", "POST /payments/process?order_id=999999999&amount=1299.99", None, 404),
        ("products", "GET /user/1", None, 404),
    ],
)
async def test_d_a_service_on_its_own_port_answers_its_own(
    open_shop: Shop, service: str, line: str, body: str | None, status: int
) -> None:
    listener = bind("127.0.0.1", 0)
    address = ("127.0.0.1", listener.getsockname()[1])
    host = open_shop.harness.host
    app = topology.gateway(host, open_to=address, services=(service,), caller=service)
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(topology.server(app, listener, host.telemetry, ready.set).run_until(stop))
    await ready.wait()
    try:
        reply = await send(open_shop, line, body, port=address[1])
    finally:
        stop.set()
        await serving
    assert reply.status == status, reply.body


async def test_d_the_profile_of_another_is_not_shown(guarded_shop: Shop) -> None:
    other = await new_person(guarded_shop)
    for path in ("/user/1", "/customers/1"):
        assert_problem(await send(guarded_shop, f"GET {path}"), 401, "sign_in_first")
        assert_problem(await send(guarded_shop, f"GET {path}", token=other.token), 404, "users.not_found")
