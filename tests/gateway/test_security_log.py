"""The security log over HTTP: it has the addresses of clients, and staff read it."""

from __future__ import annotations

from typing import Any

import pytest

from mercato.contracts.money import decimal_string
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, Person, new_person, new_product
from mercato.testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def order(shop: Shop, person: Person, product_id: int) -> dict[str, Any]:
    """A paid order of one piece."""
    stock = await shop.put(f"/products/{product_id}/stock", {"on_hand": 1}, token=await shop.staff())
    assert stock.status == 200, stock.body
    body = {"items": [{"product_id": product_id, "quantity": 1}], "payment_method": "sandbox:ok"}
    placed = await shop.request("POST", "/orders", body, token=person.token, headers={"prefer": "wait=5"})
    assert (placed.status, placed.json["payment"]) == (201, "paid"), placed.body
    return placed.json


def subject_of(placed: dict[str, Any]) -> str:
    return f"order {placed['id']}"


async def until_logged(shop: Shop, subject: str) -> dict[str, Any]:
    """The one entry about a subject, when it is there: it comes by an event."""
    found: list[dict[str, Any]] = []

    async def is_there() -> bool:
        page = await shop.get("/security-log?limit=200", token=await shop.staff())
        found[:] = [entry for entry in page.json if entry["subject"] == subject]
        return bool(found)

    await until(is_there, f"an entry about {subject} is there")
    [entry] = found
    return entry


TAKE_ADDRESS = [r for r in ROUTES if "address" in r.operation.request.__struct_fields__ and not r.system]


@pytest.mark.parametrize("route", TAKE_ADDRESS, ids=lambda route: f"{route.method} {route.path}")
async def test_operations_that_take_the_address_of_the_client_get_it(route: Route) -> None:
    assert route.knows_address


async def test_what_a_client_does_is_read_with_its_address(guarded_shop: Shop) -> None:
    person, member = await new_person(guarded_shop), await new_person(guarded_shop, "staff")
    new_password = "a wholly new password"
    change = {"current_password": PASSWORD, "new_password": new_password}
    done = await guarded_shop.post("/users/me/password", change, token=person.token)
    assert done.status == 204
    role = await guarded_shop.put(f"/users/{person.id}/role", {"role": "staff"}, token=member.token)
    assert role.status == 200

    found = await guarded_shop.get(f"/security-log?account_id={person.id}&limit=2", token=member.token)

    assert [(e["kind"], e["actor_id"], bool(e["address"])) for e in found.json] == [
        ("role_changed", member.id, True),
        ("password_changed", person.id, True),
    ]
    following = found.headers["link"].partition(">")[0].strip("<")
    rest = await guarded_shop.get(following, token=member.token)
    assert [e["kind"] for e in rest.json] == ["signed_in"]


async def test_a_change_of_price_and_a_refund_by_staff_are_read(guarded_shop: Shop) -> None:
    person, member = await new_person(guarded_shop), await new_person(guarded_shop, "staff")
    product = await new_product(guarded_shop)
    placed = await order(guarded_shop, person, product.id)
    paid = (await guarded_shop.get(f"/payments?order_id={placed['id']}", token=member.token)).json[0]
    price = {"price": {"amount": "7.50", "currency": "USD"}}
    changed = await guarded_shop.request("PATCH", f"/products/{product.id}", price, token=member.token)
    assert changed.status == 200, changed.body
    given = await guarded_shop.post(
        f"/payments/{paid['id']}/refunds",
        {"amount": "0.50"},
        token=member.token,
        headers={"idempotency-key": f"log-{placed['id']}"},
    )
    assert given.status == 201, given.body

    before = decimal_string(product.price_minor, 2)
    about = [
        await until_logged(guarded_shop, f"product {product.id}"),
        await until_logged(guarded_shop, subject_of(placed)),
    ]

    assert [(e["kind"], e["account_id"], e["actor_role"], e["actor_id"], e["address"], e["detail"]) for e in about] == [
        ("price_changed", 0, "staff", member.id, "", f"{before} USD to 7.50 USD"),
        ("refunded", person.id, "staff", member.id, "", f"refund {given.json['id']}: 0.00 USD to 0.50 USD"),
    ]


async def test_the_refund_of_an_order_that_its_customer_cancels_is_the_customers(guarded_shop: Shop) -> None:
    person, product = await new_person(guarded_shop), await new_product(guarded_shop)
    placed = await order(guarded_shop, person, product.id)
    assert (await guarded_shop.post(f"/orders/{placed['id']}/cancel", {}, token=person.token)).status == 200

    entry = await until_logged(guarded_shop, subject_of(placed))

    assert (entry["actor_role"], entry["actor_id"], entry["account_id"]) == ("customer", person.id, person.id)
    assert entry["detail"].startswith("refund cancel: 0.00 USD to ")


async def test_an_account_reads_what_is_about_it_and_not_which_member_of_staff_it_was(guarded_shop: Shop) -> None:
    person, member = await new_person(guarded_shop), await new_person(guarded_shop, "staff")
    other = await new_person(guarded_shop)
    for role in ("staff", "customer"):
        changed = await guarded_shop.put(f"/users/{person.id}/role", {"role": role}, token=member.token)
        assert changed.status == 200
    token = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json["access_token"]

    own = (await guarded_shop.get("/users/me/security-log", token=token)).json

    by_staff = ("role_changed", "staff", 0, False)
    by_oneself = ("signed_in", "customer", person.id, True)
    assert [(e["kind"], e["actor_role"], e["actor_id"], bool(e["address"])) for e in own] == [
        by_oneself, by_staff, by_staff, by_oneself,
    ]  # fmt: skip
    assert (await guarded_shop.get("/users/me/export", token=token)).json["security_log"] == own
    page = await guarded_shop.get("/users/me/security-log?limit=3", token=token)
    following = page.headers["link"].partition(">")[0].strip("<")
    assert (await guarded_shop.get(following, token=token)).json == own[3:]
    assert {e["account_id"] for e in (await guarded_shop.get("/users/me/security-log", token=other.token)).json} == {
        other.id
    }


async def test_customers_do_not_read_it(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    assert_problem(await guarded_shop.get("/security-log", token=person.token), 403, "forbidden")
