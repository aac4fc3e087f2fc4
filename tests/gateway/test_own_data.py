"""What the shop keeps about an account, shown to its owner and erased, over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from mercato.gateway import route
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person
from mercato.testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

ORDER = {"items": [{"product_id": 100, "quantity": 1}], "payment_method": "sandbox:ok"}
ERASING = {"password": PASSWORD}


async def order(shop: Shop, token: str | None) -> dict[str, Any]:
    reply = await shop.request("POST", "/orders", ORDER, token=token, headers={"prefer": "wait=5"})
    assert reply.status == 201, reply.body
    return reply.json


async def test_the_export_has_the_account_its_sessions_orders_and_payments(guarded_shop: Shop) -> None:
    person, other = await new_person(guarded_shop), await new_person(guarded_shop)
    placed = [await order(guarded_shop, person.token) for _ in range(2)]
    await order(guarded_shop, other.token)

    reply = await guarded_shop.get("/users/me/export", token=person.token)

    assert reply.status == 200, reply.body
    export = reply.json
    assert (export["account"]["email"], len(export["sessions"]), export["next"]) == (person.email, 1, {})
    assert [found["id"] for found in export["orders"]] == [found["id"] for found in reversed(placed)]
    assert {found["order_id"] for found in export["payments"]} == {found["id"] for found in placed}


async def test_what_an_export_leaves_out_is_found_where_it_says(
    guarded_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "PART_LIMIT", 0)
    person = await new_person(guarded_shop)
    placed = await order(guarded_shop, person.token)
    export = (await guarded_shop.get("/users/me/export", token=person.token)).json
    assert (export["orders"], export["payments"], export["security_log"]) == ([], [], [])
    followed = await guarded_shop.get(export["next"]["orders"], token=person.token)
    assert [found["id"] for found in followed.json] == [placed["id"]]
    log = await guarded_shop.get(export["next"]["security_log"], token=person.token)
    assert [entry["kind"] for entry in log.json] == ["signed_in"]


async def test_staff_export_their_own_orders_alone(guarded_shop: Shop) -> None:
    person, member = await new_person(guarded_shop), await new_person(guarded_shop, "staff")
    await order(guarded_shop, person.token)
    export = (await guarded_shop.get("/users/me/export", token=member.token)).json
    assert (export["account"]["id"], export["orders"], export["payments"]) == (member.id, [], [])


async def test_an_erased_account_is_gone_and_its_order_stays(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    placed = await order(guarded_shop, person.token)

    done = await guarded_shop.request("DELETE", "/users/me", ERASING, token=person.token)

    assert (done.status, done.body) == (204, b"")
    assert_problem(
        await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD}), 401, "users.wrong_credentials"
    )

    async def is_refused() -> bool:
        return (await guarded_shop.get("/orders", token=person.token)).status == 401

    await until(is_refused, "the token of an erased account is refused")
    # The answer of the first request may have been lost: its repetition is answered after the end of the session too.
    again = await guarded_shop.request("DELETE", "/users/me", ERASING, token=person.token)
    assert (again.status, again.body) == (204, b"")

    member = await new_person(guarded_shop, "staff")
    kept = await guarded_shop.get(f"/orders/{placed['id']}", token=member.token)
    assert (kept.status, kept.json["user_id"]) == (200, person.id)
    assert_problem(await guarded_shop.get(f"/users/{person.id}", token=member.token), 404, "users.not_found")

    account = {"email": person.email, "name": "Person", "password": PASSWORD}
    registered = await guarded_shop.post("/register", account)
    assert registered.status == 201
    assert registered.json["id"] != person.id
    signed_in = await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})
    token = signed_in.json["access_token"]
    assert (await guarded_shop.get("/orders", token=token)).json == []
    assert_problem(await guarded_shop.get(f"/orders/{placed['id']}", token=token), 404, "orders.not_found")


async def test_the_token_of_an_ended_session_erases_nothing(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    tokens = (await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})).json
    await guarded_shop.post("/logout", {"refresh_token": tokens["refresh_token"]})
    refused = await guarded_shop.request("DELETE", "/users/me", ERASING, token=tokens["access_token"])
    assert_problem(refused, 401, "users.session_ended")
    assert (await guarded_shop.get("/users/me", token=person.token)).status == 200


async def test_wrong_passwords_delay_further_tries(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    wrong = {"password": "a wrong password"}
    for _ in range(5):
        refused = await guarded_shop.request("DELETE", "/users/me", wrong, token=person.token)
        assert_problem(refused, 401, "users.wrong_credentials")
    assert (await guarded_shop.request("DELETE", "/users/me", ERASING, token=person.token)).status == 429
