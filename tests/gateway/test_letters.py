"""From a letter to what its link does, over HTTP."""

from __future__ import annotations

import pytest

from mercato.gateway import docs
from mercato.gateway.routes import ROUTES
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person, token_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

NEW_PASSWORD = "a wholly new password"


async def test_a_forgotten_password_is_set_by_the_link_of_a_letter(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    asked = await guarded_shop.post("/password/forgot", {"email": person.email})
    unknown = await guarded_shop.post("/password/forgot", {"email": "never-registered@example.com"})
    assert (asked.status, asked.body, unknown.status, unknown.body) == (204, b"", 204, b"")

    body = {"token": await token_of(guarded_shop, "reset", person.id), "new_password": "short"}
    weak = await guarded_shop.post("/password/reset", body)
    assert_problem(weak, 400, "invalid_request")
    assert [error["field"] for error in weak.json["errors"]] == ["new_password"]
    done = await guarded_shop.post("/password/reset", {**body, "new_password": NEW_PASSWORD})
    assert done.status == 204

    old = await guarded_shop.post("/login", {"email": person.email, "password": PASSWORD})
    assert_problem(old, 401, "users.wrong_credentials")
    new = await guarded_shop.post("/login", {"email": person.email, "password": NEW_PASSWORD})
    assert (new.status, new.json["user"]["email_proven"]) == (200, True)
    again = await guarded_shop.post("/password/reset", {**body, "new_password": "yet another password"})
    assert_problem(again, 409, "users.link_not_valid")


async def test_an_address_is_proven_by_the_link_of_a_letter(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    proof = {"token": await token_of(guarded_shop, "proof", person.id)}
    assert_problem(
        await guarded_shop.post("/password/reset", {**proof, "new_password": NEW_PASSWORD}), 409, "users.link_not_valid"
    )
    assert (await guarded_shop.post("/email/proof", proof)).status == 204
    assert (await guarded_shop.get("/users/me", token=person.token)).json["email_proven"] is True
    assert (await guarded_shop.post("/users/me/proof", token=person.token)).status == 204


async def test_a_proof_is_asked_for_by_an_account_alone(guarded_shop: Shop, open_shop: Shop) -> None:
    assert_problem(await guarded_shop.post("/users/me/proof"), 401, "sign_in_first")
    assert_problem(await open_shop.post("/users/me/proof"), 401, "sign_in_first")


@pytest.mark.parametrize(
    ("path", "sends_to"), [("/account/password", "/password/reset"), ("/account/email", "/email/proof")]
)
async def test_the_page_behind_a_link_sends_to_a_row_of_the_api(guarded_shop: Shop, path: str, sends_to: str) -> None:
    page = await guarded_shop.get(path)
    assert (page.status, page.headers["referrer-policy"]) == (200, "no-referrer")
    assert f'data-path="{sends_to}"' in page.body.decode()
    assert any((route.method, route.path) == ("POST", sends_to) for route in ROUTES)
    assert path in docs.pages(ROUTES)
