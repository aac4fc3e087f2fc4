"""How often one caller may: beyond the burst they hear when to come back, and nobody else hears anything."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping

import pytest

from mercato.chassis.contract import ANONYMOUS, Actor
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.rates import RateLimiter
from mercato.gateway.route import Limits
from mercato.gateway.routes import ROUTES
from mercato.gateway.routes.users import CREDENTIALS
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person

pytestmark = pytest.mark.asyncio(loop_scope="session")

NOBODYS = {"refresh_token": "a token that nobody has"}
FEW = Limits(per_second=1, burst=5)
AGAIN_SECONDS = 60.0
FLOOD = 300
FLOOD_MAX = 10 * FLOOD


def accepted(limiter: RateLimiter, row: str, actor: Actor, address: str, times: int = 50) -> int:
    """How many of so many requests at once pass."""
    passed = 0
    for _ in range(times):
        with contextlib.suppress(TooManyRequests):
            limiter.check(row, FEW, actor, address)
            passed += 1
    return passed


async def test_a_burst_passes_and_then_the_rate() -> None:
    # One more a second may pass while this runs.
    assert 5 <= accepted(RateLimiter(), "row", ANONYMOUS, "192.0.2.1") <= 15


async def test_rows_and_callers_are_counted_apart() -> None:
    limiter = RateLimiter()
    callers = [
        (ANONYMOUS, "192.0.2.1"),
        (ANONYMOUS, "192.0.2.2"),
        (Actor("customer", 1), "192.0.2.1"),
        (Actor("staff", 1), ""),
    ]
    for row, (actor, address) in itertools.product(("one", "other"), callers):
        assert accepted(limiter, row, actor, address) >= 5
    assert accepted(limiter, "one", *callers[0], times=1) in (0, 1)


async def test_an_account_is_counted_wherever_it_calls_from() -> None:
    limiter, somebody = RateLimiter(), Actor("customer", 1)
    passed = sum(accepted(limiter, "row", somebody, f"192.0.2.{i}", times=1) for i in range(100))
    assert passed < 50


async def test_rows_that_cost_a_hash_or_give_a_session_are_limited() -> None:
    limited = {f"{route.method} {route.path}" for route in ROUTES if route.limits is CREDENTIALS}
    assert limited == {
        "POST /register",
        "POST /login",
        "POST /token/refresh",
        "POST /logout",
        "POST /password/forgot",
        "POST /password/reset",
        "POST /email/proof",
        "POST /users/me/proof",
        "POST /users/me/password",
        "PATCH /users/me",
        "PATCH /users/{id}",
    }


async def flood(shop: Shop, headers: Callable[[int], Mapping[str, str]] = lambda _n: {}) -> list[Response]:
    """Asks more often than the row lets a caller; again where a busy machine is slower than the rate of the row."""
    replies: list[Response] = []
    while len(replies) < FLOOD_MAX and 429 not in {reply.status for reply in replies}:
        replies += await asyncio.gather(*(shop.post("/logout", NOBODYS, headers=headers(n)) for n in range(FLOOD)))
    return replies


async def test_who_asks_too_often_hears_when_to_come_back(guarded_shop: Shop) -> None:
    replies = await flood(guarded_shop)
    refused = [reply for reply in replies if reply.status != 204]
    assert len(replies) - len(refused) >= 1
    assert refused, f"{FLOOD} at once are more than the burst and the rate let through"
    for reply in refused:
        assert_problem(reply, 429, "too_many_requests")
        assert int(reply.headers["retry-after"]) >= 1
    # Others, and other rows, do not notice.
    person = await new_person(guarded_shop)
    assert (await guarded_shop.post("/logout", NOBODYS, token=person.token)).status == 204
    assert (await guarded_shop.get("/products/100")).status == 200
    # And they may again, by themselves.
    async with asyncio.timeout(AGAIN_SECONDS):
        while (await guarded_shop.post("/logout", NOBODYS)).status != 204:
            await asyncio.sleep(0.1)


async def test_no_header_makes_another_caller(guarded_shop: Shop) -> None:
    names = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "CF-Connecting-IP")
    replies = await flood(guarded_shop, lambda n: dict.fromkeys(names, f"198.51.100.{n % 256}"))
    assert 429 in {reply.status for reply in replies}
