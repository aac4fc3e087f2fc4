"""The security log over HTTP: it has the addresses of clients, and staff read it."""

from __future__ import annotations

import pytest

from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person

pytestmark = pytest.mark.asyncio(loop_scope="session")

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


async def test_customers_do_not_read_it(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    assert_problem(await guarded_shop.get("/security-log", token=person.token), 403, "forbidden")
