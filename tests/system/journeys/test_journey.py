"""A customer's whole way through the shop, over real HTTP, with the power failing in the middle of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytest

from mercato.testing.caller import Caller, everything
from mercato.testing.process import Process, used_folder

PASSWORD = "a long enough password"
KEY = "cart-17"


PLACES: Final[Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]]] = {
    "local": (("--auth", "required"), {}),
    "loopback": (("--auth", "open"), {"MERCATO_TRANSPORT": "loopback"}),
    "nats": (("--auth", "required", "--split", "--transport", "nats"), {}),
    "http": (("--auth", "required", "--split", "--transport", "http"), {}),
    "grpc": (("--auth", "required", "--split", "--transport", "grpc"), {}),
}
"""The transport that sends all calls twice is refused where tokens are required."""


@pytest.mark.parametrize(
    "place", ["local", "nats", *(pytest.param(place, marks=pytest.mark.long) for place in ("loopback", "http", "grpc"))]
)
def test_from_registration_to_an_order_that_survives_a_kill(place: str):
    options, environment = PLACES[place]
    with used_folder() as data:
        with Process(data, *options, environment=environment) as shop, shop.ready().caller() as carol:
            user_id = register_and_sign_in(carol)
            refresh_token = carol.sign_in("carol@example.com", PASSWORD).json["refresh_token"]
            products = choose(carol)
            placed = order(carol, user_id, products)
            assert placed.status == 201
            assert "idempotent-replayed" not in placed.headers
            seen = carol.get(f"/orders/{placed.json['id']}").json
            assert seen == placed.json
            shop.kill()
            shop.assert_gone()
            token = carol.token

        with Process(data, *options, environment=environment) as shop, shop.ready().caller() as carol:
            carol.token = token
            assert carol.get(f"/orders/{seen['id']}").json == seen

            replay = order(carol, user_id, products)
            assert (replay.status, replay.json) == (201, placed.json)
            assert replay.headers["idempotent-replayed"] == "true"
            assert [one["id"] for one in everything(carol, "/orders")] == [seen["id"]]

            refreshed = carol.post("/token/refresh", {"refresh_token": refresh_token})
            assert refreshed.status == 200
            carol.token = refreshed.json["access_token"]
            assert carol.get("/users/me").json["email"] == "carol@example.com"

            assert_hidden_from_others(shop, seen["id"], is_open="open" in options)
            shop.stop()


def register_and_sign_in(caller: Caller) -> int:
    account = {"email": "carol@example.com", "name": "Carol", "password": PASSWORD}
    registered = caller.post("/register", account)
    assert registered.status == 201, registered.text
    assert caller.post("/register", account).json["code"] == "users.email_taken"
    assert caller.post("/login", {"email": account["email"], "password": "guessed"}).status == 401
    caller.sign_in(account["email"], PASSWORD)
    return registered.json["id"]


def choose(caller: Caller) -> list[dict[str, Any]]:
    """Looks around like a person: pages through everything, then searches; gives two products."""
    shelf = everything(caller, "/products?limit=5")
    assert len(shelf) > 5
    assert len({product["id"] for product in shelf}) == len(shelf)
    found = caller.get("/products?q=headphones").json
    assert found
    assert found[0]["id"] in {product["id"] for product in shelf}
    other = next(
        p for p in shelf if p["id"] != found[0]["id"] and p["price"]["currency"] == found[0]["price"]["currency"]
    )
    return [found[0], other]


def order(caller: Caller, user_id: int, products: list[dict[str, Any]]):
    items = [{"product_id": product["id"], "quantity": number} for number, product in enumerate(products, start=1)]
    return caller.post("/orders", {"user_id": user_id, "items": items}, Idempotency_Key=KEY)


def assert_hidden_from_others(shop: Process, order_id: int, *, is_open: bool) -> None:
    with shop.caller() as anonymous:
        assert anonymous.get(f"/orders/{order_id}").status == (200 if is_open else 401)
        anonymous.sign_in("alice@example.com", "demo-password")
        assert anonymous.get(f"/orders/{order_id}").status == 404
        assert everything(anonymous, "/orders") == []
