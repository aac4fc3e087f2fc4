"""Reference system D: users, products and orders behind a gateway."""

from __future__ import annotations

import pytest

from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, Person, new_person, new_product, staff_token, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")


def account() -> dict[str, str]:
    return {"email": f"{unique('dora')}@example.com", "name": "Dora", "password": PASSWORD}


# ------------------------------------------------------------------------------------------------------------- users


async def test_an_account_is_registered(open_shop: Shop) -> None:
    wanted = account()
    reply = await open_shop.post("/register", wanted)
    assert (reply.status, reply.headers["location"]) == (201, f"/users/{reply.json['id']}")
    assert (reply.json["email"], reply.json["name"], reply.json["role"]) == (wanted["email"], "Dora", "customer")
    assert "password" not in reply.body.decode()
    assert (await open_shop.get(f"/users/{reply.json['id']}")).json == reply.json


async def test_two_people_may_have_one_name(open_shop: Shop) -> None:
    first, second = await open_shop.post("/register", account()), await open_shop.post("/register", account())
    assert (first.status, second.status) == (201, 201)
    assert first.json["id"] != second.json["id"]


async def test_an_email_is_taken_once(open_shop: Shop) -> None:
    wanted = account()
    assert (await open_shop.post("/register", wanted)).status == 201
    again = await open_shop.post("/register", wanted | {"email": wanted["email"].upper()})
    assert_problem(again, 409, "users.email_taken")


async def test_signing_in_gives_an_access_and_a_refresh_token(guarded_shop: Shop) -> None:
    wanted = account()
    registered = await guarded_shop.post("/register", wanted)
    reply = await guarded_shop.post("/login", {"email": wanted["email"], "password": PASSWORD})
    assert reply.status == 200
    assert (reply.json["token_type"], reply.json["expires_in"], reply.json["user"]) == ("Bearer", 900, registered.json)
    me = await guarded_shop.get("/users/me", token=reply.json["access_token"])
    assert (me.status, me.json) == (200, registered.json)
    fresh = await guarded_shop.post("/token/refresh", {"refresh_token": reply.json["refresh_token"]})
    assert fresh.status == 200
    assert (await guarded_shop.get("/users/me", token=fresh.json["access_token"])).json == registered.json


async def test_a_wrong_password_and_an_unknown_email_are_answered_alike(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    wrong = await guarded_shop.post("/login", {"email": person.email, "password": "not the password"})
    unknown = await guarded_shop.post("/login", {"email": "unknown@example.com", "password": "not the password"})
    assert_problem(wrong, 401, "users.wrong_credentials")
    one, other = wrong.json, unknown.json
    assert one.pop("trace_id") != other.pop("trace_id")
    assert one == other


async def test_a_profile_is_read_and_changed_by_its_owner(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    own = await guarded_shop.get(f"/users/{person.id}", token=person.token)
    assert (own.status, own.json["email"]) == (200, person.email)
    changed = await guarded_shop.patch("/users/me", {"name": "Dorothea"}, token=person.token)
    assert (changed.status, changed.json["name"], changed.json["version"]) == (200, "Dorothea", 2)
    assert (await guarded_shop.get("/users/me", token=person.token)).json == changed.json


async def test_an_unknown_profile_is_not_found(guarded_shop: Shop) -> None:
    assert_problem(await guarded_shop.get("/users/999999", token=await guarded_shop.staff()), 404, "users.not_found")


# ---------------------------------------------------------------------------------------------------------- products


async def test_the_catalogue_is_read_without_an_account(guarded_shop: Shop) -> None:
    reply = await guarded_shop.get("/products?limit=200")
    prices = {product["id"]: product["price"] for product in reply.json}
    assert prices[1] == {"amount": "1299.99", "currency": "USD"}
    assert prices[2] == {"amount": "899.99", "currency": "USD"}
    assert prices[100] == {"amount": "99.99", "currency": "USD"}
    assert len(prices) >= 23
    assert (await guarded_shop.get("/products/100")).json["name"] == "Headphones"
    assert_problem(await guarded_shop.get("/products/999999"), 404, "products.not_found")


async def test_staff_create_and_change_products(guarded_shop: Shop) -> None:
    staff, sku = await guarded_shop.staff(), unique("DORA")
    wanted = {"sku": sku, "name": "Lamp", "price": {"amount": "49.90", "currency": "EUR"}, "category": "lamps"}
    made = await guarded_shop.post("/products", wanted, token=staff)
    assert (made.status, made.headers["location"]) == (201, f"/products/{made.json['id']}")
    assert made.json["price"] == {"amount": "49.90", "currency": "EUR"}
    path = made.headers["location"]
    changed = await guarded_shop.patch(path, {"price": {"amount": "39.90", "currency": "EUR"}}, token=staff)
    assert (changed.status, changed.json["price"]["amount"]) == (200, "39.90")
    assert (await guarded_shop.get(path)).json == changed.json
    archived = await guarded_shop.post(f"{path}/archive", token=staff)
    assert (archived.status, archived.json["status"]) == (200, "archived")
    order = await guarded_shop.post("/orders", {"user_id": 1, "product_id": made.json["id"]}, token=staff)
    assert_problem(order, 409, "products.archived")


async def test_products_are_searched_and_filtered(open_shop: Shop) -> None:
    found = await open_shop.get("/products?q=headphones")
    assert 100 in {product["id"] for product in found.json}
    audio = await open_shop.get("/products?category=audio&max_price=100&sort=price&limit=200")
    prices = [float(product["price"]["amount"]) for product in audio.json]
    assert prices == sorted(prices)
    assert prices
    assert max(prices) <= 100
    assert {product["category"] for product in audio.json} == {"audio"}


# ------------------------------------------------------------------------------------------------------------ orders


async def ordered(shop: Shop, person: Person) -> str:
    product = await new_product(shop, price_minor=10_00)
    path, staff = f"/products/{product.id}/stock", await staff_token(shop)
    assert (await shop.put(path, {"on_hand": 3}, token=staff)).status == 200
    items = [{"product_id": 100, "quantity": 1}, {"product_id": product.id, "quantity": 3}]
    reply = await shop.post("/orders", {"user_id": person.id, "items": items}, token=person.token)
    assert (reply.status, reply.json["total"]["amount"]) == (201, "129.99")
    return reply.headers["location"]


async def test_an_order_of_several_products_is_created_and_read(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    path = await ordered(guarded_shop, person)
    read = await guarded_shop.get(path, token=person.token)
    assert (read.status, len(read.json["items"]), read.json["status"]) == (200, 2, "pending")


async def test_a_second_order_does_not_overwrite_the_first(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    first, second = await ordered(guarded_shop, person), await ordered(guarded_shop, person)
    assert first != second
    listed = await guarded_shop.get("/orders", token=person.token)
    assert [f"/orders/{order['id']}" for order in listed.json] == [second, first]


async def test_an_order_keeps_the_price_that_it_was_placed_with(open_shop: Shop) -> None:
    product = await new_product(open_shop, price_minor=10_00)
    assert (await open_shop.put(f"/products/{product.id}/stock", {"on_hand": 1})).status == 200
    placed = await open_shop.post("/orders", {"user_id": 1, "product_id": product.id})
    price = {"amount": "20.00", "currency": "USD"}
    assert (await open_shop.patch(f"/products/{product.id}", {"price": price})).status == 200
    assert (await open_shop.get(placed.headers["location"])).json == placed.json


async def test_the_status_of_an_order_moves_along_its_graph(guarded_shop: Shop) -> None:
    person, staff = await new_person(guarded_shop), await guarded_shop.staff()
    path = await ordered(guarded_shop, person)
    for axis, state in (
        ("status", "confirmed"),
        ("fulfilment", "shipped"),
        ("fulfilment", "delivered"),
        ("status", "completed"),
        ("fulfilment", "returned"),
    ):
        moved = await guarded_shop.patch(path, {axis: state}, token=staff)
        assert (moved.status, moved.json[axis]) == (200, state)
    illegal = await guarded_shop.patch(path, {"status": "pending"}, token=staff)
    assert_problem(illegal, 409, "orders.illegal_move")
    assert illegal.json["details"]["legal"] == []
    history = await guarded_shop.get(f"{path}/history", token=person.token)
    assert [(entry["axis"], entry["after"]) for entry in history.json][-5:] == [
        ("status", "confirmed"),
        ("fulfilment", "shipped"),
        ("fulfilment", "delivered"),
        ("status", "completed"),
        ("fulfilment", "returned"),
    ]


async def test_a_customer_cancels_what_is_not_shipped(guarded_shop: Shop) -> None:
    person, staff = await new_person(guarded_shop), await guarded_shop.staff()
    early, late = await ordered(guarded_shop, person), await ordered(guarded_shop, person)
    cancelled = await guarded_shop.post(f"{early}/cancel", {"reason": "too dear"}, token=person.token)
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    await guarded_shop.patch(late, {"status": "confirmed", "fulfilment": "shipped"}, token=staff)
    assert_problem(await guarded_shop.post(f"{late}/cancel", token=person.token), 409, "orders.illegal_move")


async def test_an_invalid_payload_is_answered_with_every_wrong_field(open_shop: Shop) -> None:
    body = {"user_id": "one", "items": [{"product_id": 100, "quantity": 0}, {"quantity": 1}], "coupon": "X"}
    reply = await open_shop.post("/orders", body)
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"user_id", "items[0].quantity", "items[1].product_id", "coupon"}
    assert all(error["message"] for error in reply.json["errors"])


# ----------------------------------------------------------------------------------------------------------- gateway


async def test_the_gateway_routes_authenticates_and_limits(guarded_shop: Shop) -> None:
    assert_problem(await guarded_shop.get("/orders"), 401, "sign_in_first")
    assert_problem(await guarded_shop.get("/users", token=await guarded_shop.alice()), 403, "forbidden")
    assert_problem(await guarded_shop.get("/carts"), 404, "route_not_found")


async def test_every_service_says_whether_it_is_well(open_shop: Shop) -> None:
    ready = await open_shop.get("/health/ready")
    assert (ready.status, ready.json["status"]) == (200, "ready")
    assert {"users", "products", "orders"} <= ready.json["services"].keys()
    assert set(ready.json["services"].values()) == {"up"}


async def test_staff_find_an_order_by_its_state(guarded_shop: Shop) -> None:
    person, staff = await new_person(guarded_shop), await staff_token(guarded_shop)
    path = await ordered(guarded_shop, person)
    await guarded_shop.patch(path, {"status": "confirmed", "fulfilment": "shipped"}, token=staff)
    query = f"user_id={person.id}&status=confirmed&payment=unpaid&fulfilment=shipped"
    found = await guarded_shop.get(f"/orders?{query}", token=staff)
    assert [f"/orders/{order['id']}" for order in found.json] == [path]
    assert (await guarded_shop.get(f"/orders?{query.replace('unpaid', 'paid')}", token=staff)).json == []
