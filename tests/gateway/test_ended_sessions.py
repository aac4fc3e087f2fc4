"""An access token ends with its session, in every process that verifies tokens, however the shop is placed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.contracts.users import SetRole, Users
from mercato.gateway.asgi import Asgi
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import DEMO_PASSWORD, STAFF_EMAIL, STAFF_PASSWORD, Shop
from mercato.testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROCESSES = {GATEWAY: "/users/me", "users": "/users/me", "orders": "/orders", "payments": "/payments"}
"""A path that a process serves to people who are signed in."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["local", "http", "nats"])
async def shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    made = await Shop.start(cluster, request.param, is_open=False)
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def processes(shop: Shop) -> dict[str, Asgi]:
    """The rows of the public API as each process serves them, which verifies tokens by itself."""
    return {
        name: topology.gateway(
            shop.harness.host,
            open_to=None,
            services=tuple(topology.SERVICES) if name == GATEWAY else (name,),
            caller=name,
        )
        for name in PROCESSES
    }


async def status(app: Asgi, path: str, token: str) -> int:
    """Of an answer of one process."""
    answered: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    headers = [(b"host", b"shop.example"), (b"authorization", f"Bearer {token}".encode())]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return answered[0]


async def statuses(processes: dict[str, Asgi], token: str) -> set[int]:
    return {await status(app, PROCESSES[name], token) for name, app in processes.items()}


async def signed_in(shop: Shop, email: str = "alice@example.com", password: str = DEMO_PASSWORD) -> dict[str, Any]:
    reply = await shop.post("/login", {"email": email, "password": password})
    assert reply.status == 200, reply.body
    return reply.json


async def until_refused(processes: dict[str, Asgi], token: str) -> None:
    async def are_refused() -> bool:
        return await statuses(processes, token) == {401}

    await until(are_refused, "every process refuses the token of a session that has ended")


async def test_signing_out_ends_the_access_token_everywhere(shop: Shop, processes: dict[str, Asgi]) -> None:
    one, other = await signed_in(shop), await signed_in(shop)
    for tokens in (one, other):
        assert await statuses(processes, tokens["access_token"]) == {200}
    assert (await shop.post("/logout", {"refresh_token": one["refresh_token"]})).status == 204

    await until_refused(processes, one["access_token"])
    assert await statuses(processes, other["access_token"]) == {200}


async def test_a_new_password_ends_the_access_tokens_of_the_other_sessions(
    shop: Shop, processes: dict[str, Asgi]
) -> None:
    own, other = await signed_in(shop), await signed_in(shop)
    change = {
        "current_password": DEMO_PASSWORD,
        "new_password": DEMO_PASSWORD,
        "refresh_token": own["refresh_token"],
    }
    reply = await shop.post("/users/me/password", change, token=own["access_token"])
    assert reply.status == 204, reply.body

    await until_refused(processes, other["access_token"])
    assert await statuses(processes, own["access_token"]) == {200}


async def test_a_former_member_of_staff_has_no_access_anywhere(shop: Shop, processes: dict[str, Asgi]) -> None:
    bob = await signed_in(shop, "bob@example.com")
    users = shop.harness.client(Users)

    async def set_role(role: Any) -> None:
        request = SetRole(id=bob["user"]["id"], role=role)
        await topology.as_the_shop(shop.harness.host, lambda: users.set_role(request))

    await set_role("staff")
    await until_refused(processes, bob["access_token"])
    as_staff = await signed_in(shop, "bob@example.com")
    assert await statuses(processes, as_staff["access_token"]) == {200}
    await set_role("customer")

    await until_refused(processes, as_staff["access_token"])


async def test_own_sessions_are_listed_and_ended_one_or_all_others(shop: Shop, processes: dict[str, Asgi]) -> None:
    reply = await shop.post("/register", {"email": "carol@example.com", "name": "Carol", "password": DEMO_PASSWORD})
    assert reply.status == 201, reply.body
    one, two, own = [await signed_in(shop, "carol@example.com") for _ in range(3)]
    listed = (await shop.get("/users/me/sessions", token=own["access_token"])).json
    assert [session["is_current"] for session in listed] == [True, False, False]
    assert listed[0].keys() == {"id", "created_at", "last_used_at", "expires_at", "is_current"}
    page = await shop.get("/users/me/sessions?limit=1", token=own["access_token"])
    following = page.headers["link"][1:].partition(">")[0]
    assert (await shop.get(following, token=own["access_token"])).json == listed[1:2]

    path = f"/users/me/sessions/{listed[1]['id']}"
    assert (await shop.request("DELETE", path, token=own["access_token"])).status == 204
    assert_problem(await shop.request("DELETE", path, token=own["access_token"]), 404, "users.session_not_found")
    await until_refused(processes, two["access_token"])
    assert await statuses(processes, one["access_token"]) == {200}
    assert (await shop.request("DELETE", "/users/me/sessions", token=own["access_token"])).status == 204
    await until_refused(processes, one["access_token"])
    assert await statuses(processes, own["access_token"]) == {200}


@pytest.mark.parametrize("wrong", ["1", "x", "F" * 32, "0" * 31, "0" * 33, "%0A" + "0" * 31])
async def test_what_is_no_id_of_a_session_is_named(shop: Shop, wrong: str) -> None:
    reply = await shop.request("DELETE", f"/users/me/sessions/{wrong}", token=await shop.alice())

    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"path id"}


async def test_a_process_that_starts_later_knows_what_has_ended(shop: Shop) -> None:
    tokens = await signed_in(shop)
    await shop.post("/logout", {"refresh_token": tokens["refresh_token"]})
    late = topology.gateway(shop.harness.host, open_to=None)

    assert await status(late, "/users/me", tokens["access_token"]) == 401


async def test_staff_go_on_while_the_log_is_followed(shop: Shop, processes: dict[str, Asgi]) -> None:
    staff = await signed_in(shop, STAFF_EMAIL, STAFF_PASSWORD)

    assert await statuses(processes, staff["access_token"]) == {200}


async def ready(shop: Shop) -> Response:
    return await shop.get("/health/ready")


async def test_a_process_is_ready_once_it_knows_what_has_ended(shop: Shop) -> None:
    async def is_ready() -> bool:
        return (await ready(shop)).status == 200

    await until(is_ready, "the process has read which sessions have ended")
    assert "gateway" not in (await ready(shop)).json["services"]
