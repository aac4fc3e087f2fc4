"""The note of a customer, from the request to every answer that shows the order."""

from __future__ import annotations

import pytest

from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person, staff_token, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

NOTE = 'Please ring twice: the dog\'s name is "Bo" \\ 🐕'


async def test_a_note_is_shown_wherever_its_order_is(open_shop: Shop) -> None:
    person, key = await new_person(open_shop), {"Idempotency-Key": unique("note")}
    body = {"user_id": person.id, "product_id": 100, "customer_note": NOTE}

    placed = await open_shop.post("/orders", body, headers=key, token=person.token)
    replayed = await open_shop.post("/orders", body, headers=key, token=person.token)
    other = await open_shop.post("/orders", {**body, "customer_note": "no"}, headers=key, token=person.token)

    assert (placed.status, placed.json["customer_note"]) == (201, NOTE)
    assert replayed.json["customer_note"] == NOTE
    assert_problem(other, 422, "idempotency_key_reused")
    order = f"/orders/{placed.json['id']}"
    cancelled = await open_shop.post(f"{order}/cancel", {}, token=person.token)
    assert (cancelled.json["status"], cancelled.json["customer_note"]) == ("cancelled", NOTE)
    for token in (person.token, await staff_token(open_shop)):
        assert (await open_shop.get(order, token=token)).json["customer_note"] == NOTE
    [listed] = (await open_shop.get(f"/orders?user_id={person.id}")).json
    assert listed["customer_note"] == NOTE


async def test_an_order_without_a_note_has_an_empty_one(open_shop: Shop) -> None:
    person = await new_person(open_shop)
    placed = await open_shop.post("/orders", {"user_id": person.id, "product_id": 100}, token=person.token)
    assert placed.json["customer_note"] == ""


@pytest.mark.parametrize("note", ["x" * 501, "a\x00b", 7, None])
async def test_a_note_that_cannot_be_kept_is_refused_and_named(open_shop: Shop, note: object) -> None:
    person = await new_person(open_shop)
    body = {"user_id": person.id, "product_id": 100, "customer_note": note}

    refused = await open_shop.post("/orders", body, token=person.token)

    assert refused.status in (400, 422), refused.body
    assert refused.wrong_fields == {"customer_note"}
    assert (await open_shop.get(f"/orders?user_id={person.id}")).json == []


async def test_a_note_of_500_characters_is_kept(open_shop: Shop) -> None:
    person = await new_person(open_shop)
    body = {"user_id": person.id, "product_id": 100, "customer_note": "ü" * 500}
    assert (await open_shop.post("/orders", body, token=person.token)).json["customer_note"] == "ü" * 500
