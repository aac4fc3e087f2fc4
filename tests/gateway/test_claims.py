"""Orders of guests that become those of an account."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor
from mercato.contracts.orders import ClaimOrder, Orders
from mercato.operations.audit.checking import audit
from mercato.testing.cluster import Cluster
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import Person, new_person, new_product, token_of
from mercato.testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["local", "loopback"])
async def shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    """A shop of these tests alone: what guests order is limited by their address."""
    own = await Shop.start(cluster, request.param, is_open=False)
    yield own
    await own.close()


async def guest_order(shop: Shop, headers: Mapping[str, str] | None = None, **fields: object) -> Any:
    product = await new_product(shop)
    staff = await shop.staff()
    assert (await shop.put(f"/products/{product.id}/stock", {"on_hand": 100}, token=staff)).status == 200
    order = {"product_id": product.id, **fields}
    while (reply := await shop.post("/orders", order, headers={"Prefer": "wait=20", **(headers or {})})).status == 429:
        await asyncio.sleep(float(reply.headers["retry-after"]))
    assert reply.status == 201, reply.body
    return reply.json


async def proven_person(shop: Shop) -> Person:
    person = await new_person(shop)
    proof = {"token": await token_of(shop, "proof", person.id)}
    assert (await shop.post("/email/proof", proof)).status == 204
    return person


async def claim(shop: Shop, order: Any, person: Person, token: str | None = None) -> Response:
    body = {"access_token": token or order["access_token"]}
    return await shop.post(f"/orders/{order['id']}/claim", body, token=person.token)


async def test_a_claimed_order_is_its_accounts_and_its_token_opens_it_no_more(shop: Shop) -> None:
    person = await proven_person(shop)
    order = await guest_order(shop, email=person.email.upper())
    reply = await claim(shop, order, person)
    assert (reply.status, reply.json["id"], reply.json["user_id"]) == (200, order["id"], person.id), reply.body
    assert [each["id"] for each in (await shop.get("/orders", token=person.token)).json] == [order["id"]]
    path = f"/orders/{order['id']}"
    assert (await shop.get(path, token=person.token)).json == reply.json
    moves = (await shop.get(f"{path}/history", token=person.token)).json
    claimed = [(move["axis"], move["before"], move["after"], move["by"]) for move in moves][-1]
    assert claimed == ("owner", "guest", "account", f"customer {person.id}")
    assert moves[-1]["version"] == reply.json["version"]

    query = f"?access_token={order['access_token']}"
    for answer in (
        await shop.get(path + query),
        await shop.get(f"{path}/history{query}"),
        await shop.post(f"{path}/cancel{query}"),
        await shop.post(f"/payments{query}", {"order_id": order["id"]}),
    ):
        assert_problem(answer, 404, "orders.not_found")
    assert (await shop.get(path, token=person.token)).json["status"] == "pending"


async def test_the_owner_pays_what_a_guest_has_ordered(shop: Shop) -> None:
    person, order = await proven_person(shop), await guest_order(shop)
    assert (await claim(shop, order, person)).status == 200
    paid = await shop.post("/payments", {"order_id": order["id"], "amount": "99.99"}, token=person.token)
    assert (paid.status, paid.json["status"], paid.json["user_id"]) == (201, "captured", person.id), paid.body
    assert (await shop.get(f"/orders/{order['id']}", token=person.token)).json["payment"] == "paid"


async def test_what_a_guest_has_paid_is_its_owners_and_is_refunded(shop: Shop) -> None:
    person, other = await proven_person(shop), await proven_person(shop)
    order, others = await guest_order(shop), await guest_order(shop)
    made: list[Any] = []
    for each in (order, others):
        reply = await shop.post(f"/payments?access_token={each['access_token']}", {"order_id": each["id"]})
        assert (reply.status, reply.json["user_id"]) == (201, None), reply.body
        made.append(reply.json)
    assert (await claim(shop, order, person)).status == 200

    own = await shop.get(f"/payments/{made[0]['id']}", token=person.token)
    assert (own.status, own.json["user_id"], own.json["status"]) == (200, person.id, "captured")
    assert [each["id"] for each in (await shop.get("/payments", token=person.token)).json] == [made[0]["id"]]
    for caller, payment in ((person, made[1]), (other, made[0])):
        hidden = await shop.get(f"/payments/{payment['id']}", token=caller.token)
        assert_problem(hidden, 404, "payments.not_found")
    key = {"Idempotency-Key": str(uuid.uuid4())}
    path = f"/payments/{made[0]['id']}/refunds"
    refunded = await shop.post(path, {"amount": "10.00"}, headers=key, token=await shop.staff())
    assert (refunded.status, refunded.json["status"]) == (201, "succeeded"), refunded.body
    shown = await shop.get(f"/orders/{order['id']}/refunds", token=person.token)
    assert [each["amount"]["amount"] for each in shown.json] == ["10.00"]


async def test_of_two_claims_at_once_one_wins_and_repetitions_answer_alike(shop: Shop) -> None:
    people = [await proven_person(shop), await proven_person(shop)]
    for _ in range(4):
        order = await guest_order(shop)
        replies = await asyncio.gather(*(claim(shop, order, person) for person in people * 2))
        owner = (await shop.get(f"/orders/{order['id']}", token=await shop.staff())).json["user_id"]
        for person, reply in zip(people * 2, replies, strict=True):
            again = await claim(shop, order, person)
            if person.id == owner:
                assert (reply.status, reply.json["user_id"]) == (200, owner), reply.body
                assert again.json == reply.json
            else:
                assert_problem(reply, 409, "orders.already_claimed")
                assert_problem(again, 409, "orders.already_claimed")


async def test_only_a_proven_address_and_that_of_the_order_claims_it(shop: Shop) -> None:
    unproven, other, person = await new_person(shop), await proven_person(shop), await proven_person(shop)
    order, plain = await guest_order(shop, email=person.email), await guest_order(shop)
    assert_problem(await claim(shop, plain, unproven), 403, "orders.email_not_proven")
    assert_problem(await claim(shop, order, other), 403, "orders.another_email")
    for token in ("wrong", "A" * 43, plain["access_token"]):
        assert_problem(await claim(shop, order, person, token), 404, "orders.not_found")
    missing = {"id": order["id"] + 1_000_000, "access_token": order["access_token"]}
    assert_problem(await claim(shop, missing, person), 404, "orders.not_found")
    path, body = f"/orders/{order['id']}/claim", {"access_token": order["access_token"]}
    assert_problem(await shop.post(path, body), 401, "sign_in_first")
    guest = {"Authorization": f"Guest {order['access_token']}"}
    assert_problem(await shop.post(path, body, headers=guest), 401, "sign_in_first")
    assert (await claim(shop, order, person)).status == 200


async def test_a_replay_of_the_guests_request_answers_as_before(shop: Shop) -> None:
    person, headers = await proven_person(shop), {"Idempotency-Key": str(uuid.uuid4())}
    product = await new_product(shop)
    order = {"product_id": product.id}
    first = await shop.post("/orders", order, headers=headers)
    assert first.status == 201, first.body
    assert (await claim(shop, first.json, person)).status in (200, 409)
    while (claimed := await claim(shop, first.json, person)).status == 409:
        assert_problem(claimed, 409, "orders.payment_in_progress")
    again = await shop.post("/orders", order, headers=headers)
    assert (again.status, again.headers["idempotent-replayed"]) == (201, "true")
    assert again.json == first.json


async def test_an_open_shop_asks_for_an_account(cluster: Cluster) -> None:
    own = await Shop.start(cluster)
    try:
        reply = await own.post("/orders/1001/claim", {"access_token": "A" * 43})
        assert_problem(reply, 401, "sign_in_first")
    finally:
        await own.close()


POINTS = ("orders.claim.before_commit", "orders.claim.after_commit", "claim.assign.after_call")


@pytest.mark.parametrize("point", POINTS)
async def test_a_claim_that_a_crash_interrupts_is_finished(cluster: Cluster, inject: Inject, point: str) -> None:
    options = {"orders_lease_seconds": "0.5", "orders_sweep_seconds": "0.05"}
    own = await Shop.start(cluster, is_open=False, options=options)
    try:
        person, order = await proven_person(own), await guest_order(own)
        made = await own.post(f"/payments?access_token={order['access_token']}", {"order_id": order["id"]})
        assert made.status == 201, made.body
        remove = inject(point, fail)
        orders, asked = own.harness.client(Orders), ClaimOrder(id=order["id"], access_token=order["access_token"])
        with own.harness.acting(Actor("customer", person.id)):
            interrupted = asyncio.gather(orders.claim(asked), return_exceptions=True)
            if point == "claim.assign.after_call":
                await until(lambda: _is_retried(own.harness))
            else:
                await interrupted
        remove()
        await interrupted
        if point == "orders.claim.before_commit":
            assert (await own.get(f"/orders/{order['id']}?access_token={order['access_token']}")).status == 200
            assert (await claim(own, order, person)).status == 200

        async def is_assigned() -> bool:
            return (await own.get(f"/payments/{made.json['id']}", token=person.token)).status == 200

        await until(is_assigned, "the payment was never given to the owner of its order")
        assert (await claim(own, order, person)).json["user_id"] == person.id
        found = await audit(cluster.server.admin_dsn, own.harness.dsns)
        assert [(each.name, each.rows) for each in found.violated] == []
    finally:
        await own.close()


async def _is_retried(harness: ServiceHarness) -> bool:
    return await harness.values("SELECT tries FROM sagas WHERE kind = 'claim' AND tries > 0", of="orders") != []


async def test_the_audit_finds_nothing_wrong_with_claimed_orders(shop: Shop, cluster: Cluster) -> None:
    person = await proven_person(shop)
    for email in (None, person.email):
        order = await guest_order(shop, email=email)
        paid = await shop.post(f"/payments?access_token={order['access_token']}", {"order_id": order["id"]})
        assert paid.status == 201, paid.body
        assert (await claim(shop, order, person)).status == 200
    found = await audit(cluster.server.admin_dsn, shop.harness.dsns)
    assert [(each.name, each.rows) for each in found.violated] == []
