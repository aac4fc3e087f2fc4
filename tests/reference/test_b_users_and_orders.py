"""Reference system B: an order service that asks a user service before it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, new_person
from mercato.testing.transports import TRANSPORTS
from mercato.testing.waiting import BOUND_SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="session")

ORDER = {"user_id": 1, "product_id": 100}
LEFT_ALONE_SECONDS = 3


async def test_staff_see_every_user_page_by_page(open_shop: Shop) -> None:
    made = {(await new_person(open_shop)).id for _ in range(5)}
    seen: list[int] = []
    path: str | None = "/users?limit=2"
    while path:
        page = await open_shop.get(path)
        assert page.status == 200
        assert len(page.json) <= 2
        seen += [user["id"] for user in page.json]
        path = next_page(page)
    assert seen == sorted(set(seen)), "each once, in order"
    assert {1, 2} | made <= set(seen)


async def test_the_orders_of_a_user_are_that_users(open_shop: Shop) -> None:
    person, other = await new_person(open_shop), await new_person(open_shop)
    own = [await new_order(open_shop, person.id) for _ in range(3)]
    await new_order(open_shop, other.id)
    reply = await open_shop.get(f"/orders?user_id={person.id}")
    assert [order["id"] for order in reply.json] == own[::-1]
    assert {order["user_id"] for order in reply.json} == {person.id}


async def test_an_unknown_user_has_no_orders(open_shop: Shop) -> None:
    reply = await open_shop.get("/orders?user_id=999999999")
    assert (reply.status, reply.json) == (200, [])


# ------------------------------------------------------------------------------------------- the user service is down


@pytest_asyncio.fixture(loop_scope="session", params=TRANSPORTS)
async def shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    """A shop of its own: no other test needs its users."""
    own = await Shop.start(cluster, request.param)
    yield own
    await give_back(cluster, own)
    await own.close()


def users_database(shop: Shop) -> str:
    return shop.harness.dsns["users"].partition("?")[0].rpartition("/")[2]


async def take_away(cluster: Cluster, shop: Shop) -> None:
    name = users_database(shop)
    await cluster.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    await cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


async def give_back(cluster: Cluster, shop: Shop) -> None:
    await cluster.execute(f'ALTER DATABASE "{users_database(shop)}" ALLOW_CONNECTIONS true')


async def until(answer: Callable[[], Awaitable[Response]], status: int) -> Response:
    """Asks until it is answered with this status; until then, each answer is a clear 503."""
    async with asyncio.timeout(BOUND_SECONDS):
        while (reply := await answer()).status != status:
            assert_unavailable(reply)
            await asyncio.sleep(0.1)
    return reply


def assert_unavailable(reply: Response) -> None:
    assert_problem(reply, 503, "unavailable")
    assert reply.json["details"] == {"service": "users"}
    assert int(reply.headers["retry-after"]) >= 1


async def test_without_users_orders_answer_503_and_come_back_by_themselves(shop: Shop, cluster: Cluster) -> None:
    assert (await shop.post("/orders", ORDER)).status == 201
    orders_before = (await shop.get("/orders?limit=200")).json
    await take_away(cluster, shop)

    for _ in range(5):
        assert_unavailable(await shop.post("/orders", ORDER))
        products = await shop.get("/products?limit=3")
        assert (products.status, len(products.json)) == (200, 3), "what does not need users goes on"
    assert (await shop.get("/orders?limit=200")).json == orders_before, "a refused order leaves nothing"
    ready = await shop.get("/health/ready")
    assert (ready.status, ready.json["services"]["users"]) == (503, "down")
    assert (await shop.get("/health/live")).status == 200

    await give_back(cluster, shop)
    placed = await until(lambda: shop.post("/orders", ORDER), 201)
    assert (await shop.get("/orders?limit=200")).json == [placed.json, *orders_before]
    assert (await shop.get("/health/ready")).status == 200


@pytest.mark.slow
@pytest.mark.long
async def test_while_the_breaker_is_open_the_answer_comes_at_once(shop: Shop, cluster: Cluster) -> None:
    await take_away(cluster, shop)

    async def asked_again_until_left_alone_for_long() -> Response:
        # Each probe that fails doubles the time for which the breaker stays open; Retry-After says how long that is.
        async with asyncio.timeout(BOUND_SECONDS):
            while True:
                reply = await shop.post("/orders", ORDER)
                assert_unavailable(reply)
                if int(reply.headers["retry-after"]) >= LEFT_ALONE_SECONDS:
                    return reply

    await asked_again_until_left_alone_for_long()
    assert 'mercato_breaker_open{operations="reads",service="users"} 1.0' in (await shop.get("/metrics")).body.decode()
    await give_back(cluster, shop)
    # The users are there again, and the open breaker does not call them before its time is over: no answer waits.
    assert_unavailable(await shop.post("/orders", ORDER))
    await until(lambda: shop.post("/orders", ORDER), 201)
    assert 'mercato_breaker_open{operations="reads",service="users"} 0.0' in (await shop.get("/metrics")).body.decode()


def next_page(reply: Response) -> str | None:
    link = reply.headers.get("link")
    return link[1 : link.index(">")] if link else None
