"""How often one caller may: beyond the burst it is refused with a time to retry, and no other caller is refused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mercato import topology
from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.gateway.app import Gateway
from mercato.gateway.asgi import Asgi
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.rates import (
    FORGOTTEN_SECONDS,
    FREE_FAILURES,
    PasswordTries,
    RateLimiter,
)
from mercato.gateway.route import Limits
from mercato.gateway.routes import ROUTES
from mercato.gateway.routes.users import CREDENTIALS, REGISTRATIONS
from mercato.gateway.shared_counts import SharedCounts
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

UNKNOWN_TOKEN = {"refresh_token": "an unknown token"}
FEW = Limits(per_second=1, burst=5)
AGAIN_SECONDS = 60.0
FLOOD = 300
FLOOD_MAX = 10 * FLOOD


def limiter_of(clock: Clock) -> RateLimiter:
    return RateLimiter(SharedCounts(clock.monotonic), clock)


def tries_of(clock: Clock) -> PasswordTries:
    return PasswordTries(SharedCounts(clock.monotonic), clock)


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
    assert 5 <= accepted(limiter_of(SystemClock()), "row", ANONYMOUS_ACTOR, "192.0.2.1") <= 15


async def test_rows_and_callers_are_counted_apart() -> None:
    limiter = limiter_of(SystemClock())
    callers = [
        (ANONYMOUS_ACTOR, "192.0.2.1"),
        (ANONYMOUS_ACTOR, "192.0.2.2"),
        (Actor("customer", 1), "192.0.2.1"),
        (Actor("staff", 1), ""),
    ]
    for row, (actor, address) in itertools.product(("one", "other"), callers):
        assert accepted(limiter, row, actor, address) >= 5
    assert accepted(limiter, "one", *callers[0], times=1) in (0, 1)


async def test_an_account_is_counted_wherever_it_calls_from() -> None:
    limiter, caller = limiter_of(SystemClock()), Actor("customer", 1)
    passed = sum(accepted(limiter, "row", caller, f"192.0.2.{i}", times=1) for i in range(100))
    assert passed < 50


async def test_rows_that_cost_a_hash_or_give_a_session_are_limited() -> None:
    limited = {f"{route.method} {route.path}" for route in ROUTES if route.limits in (CREDENTIALS, REGISTRATIONS)}
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
        "DELETE /users/me",
        "GET /users/me/export",
        "PATCH /users/{id}",
    }


async def flood(shop: Shop, headers: Callable[[int], Mapping[str, str]] = lambda _n: {}) -> list[Response]:
    """Asks more often than the row lets a caller; again where a busy machine is slower than the rate of the row."""
    replies: list[Response] = []
    while len(replies) < FLOOD_MAX and 429 not in {reply.status for reply in replies}:
        replies += await asyncio.gather(
            *(shop.post("/logout", UNKNOWN_TOKEN, headers=headers(n)) for n in range(FLOOD))
        )
    return replies


async def test_a_caller_beyond_its_rate_gets_a_time_to_retry(guarded_shop: Shop) -> None:
    replies = await flood(guarded_shop)
    refused = [reply for reply in replies if reply.status != 204]
    assert len(replies) - len(refused) >= 1
    assert refused, f"{FLOOD} at once are more than the burst and the rate let through"
    for reply in refused:
        assert_problem(reply, 429, "too_many_requests")
        assert int(reply.headers["retry-after"]) >= 1
    # Others, and other rows, do not notice.
    person = await new_person(guarded_shop)
    assert (await guarded_shop.post("/logout", UNKNOWN_TOKEN, token=person.token)).status == 204
    assert (await guarded_shop.get("/products/100")).status == 200
    # And they may again, by themselves.
    async with asyncio.timeout(AGAIN_SECONDS):
        while (await guarded_shop.post("/logout", UNKNOWN_TOKEN)).status != 204:
            await asyncio.sleep(0.1)


async def test_no_header_makes_another_caller(guarded_shop: Shop) -> None:
    names = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "CF-Connecting-IP")
    replies = await flood(guarded_shop, lambda n: dict.fromkeys(names, f"198.51.100.{n % 256}"))
    assert 429 in {reply.status for reply in replies}


# ---------------------------------------------------------------------------------------------------- wrong passwords

HERE, ELSEWHERE = "192.0.2.1", "192.0.2.2"


class StoppedClock(SystemClock):
    """Goes forward when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.seconds


def fail(tries: PasswordTries, times: int = 1, account: str = "alice", address: str = HERE) -> None:
    for _ in range(times):
        tries.begin(account, address)
        tries.end(account, address, is_right=False)


def wait_of(tries: PasswordTries, account: str = "alice", address: str = HERE) -> int:
    """Seconds that a try has to wait; 0 where it may begin, which is then over without a check."""
    try:
        tries.begin(account, address)
    except TooManyRequests as error:
        return error.retry_after_s or 0
    tries.end(account, address, is_right=None)
    return 0


async def test_wrong_passwords_delay_further_tries_more_and_more_up_to_a_bound() -> None:
    clock = StoppedClock()
    tries = tries_of(clock)
    fail(tries, FREE_FAILURES - 1)
    assert wait_of(tries) == 0
    waits: list[int] = []
    for _ in range(9):
        fail(tries)
        waits.append(wait_of(tries))
        clock.seconds += waits[-1] - 0.5
        assert wait_of(tries) == 1
        clock.seconds += 0.5
        assert wait_of(tries) == 0

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_only_tries_for_this_account_from_this_address_wait() -> None:
    tries = tries_of(StoppedClock())
    fail(tries, FREE_FAILURES)

    assert wait_of(tries) > 0
    assert (wait_of(tries, address=ELSEWHERE), wait_of(tries, account="bob")) == (0, 0)


async def test_the_right_password_and_a_long_pause_forget_the_wrong_ones() -> None:
    clock = StoppedClock()
    tries = tries_of(clock)
    for _ in range(2):
        fail(tries, FREE_FAILURES)
        clock.seconds += 60
        tries.begin("alice", HERE)
        tries.end("alice", HERE, is_right=True)
        assert wait_of(tries) == 0
    fail(tries, FREE_FAILURES)
    clock.seconds += FORGOTTEN_SECONDS
    fail(tries, FREE_FAILURES - 1)
    assert wait_of(tries) == 0


async def test_after_wrong_passwords_tries_come_one_after_the_other() -> None:
    clock = StoppedClock()
    tries = tries_of(clock)
    fail(tries, FREE_FAILURES)
    clock.seconds += 60
    tries.begin("alice", HERE)
    assert wait_of(tries) == 1
    tries.end("alice", HERE, is_right=None)
    assert wait_of(tries) == 0


async def ask(app: Asgi, address: str, path: str, body: Mapping[str, Any]) -> int:
    """The status of an answer to a caller at an address."""
    answered: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"shop.example"), (b"content-type", b"application/json")],
        "client": (address, 1234),
    }
    await app(scope, receive, send)
    return answered[0]


async def test_wrong_passwords_from_elsewhere_keep_no_owner_out(guarded_shop: Shop) -> None:
    app = topology.gateway(guarded_shop.harness.host, open_to=None)
    person = await new_person(guarded_shop)
    wrong, right = ({"email": person.email, "password": password} for password in ("a wrong password", PASSWORD))
    spellings = (person.email, person.email.upper(), f" {person.email}")
    statuses = [await ask(app, HERE, "/login", {**wrong, "email": spelling}) for spelling in spellings * 2]

    assert statuses == [401] * FREE_FAILURES + [429], "however the address is spelled"
    assert await ask(app, HERE, "/login", right) == 429
    assert await ask(app, ELSEWHERE, "/login", right) == 200


async def test_accounts_that_are_opened_from_one_address_are_bounded_and_only_those(guarded_shop: Shop) -> None:
    app, per_hour = topology.gateway(guarded_shop.harness.host, open_to=None), REGISTRATIONS.done_per_hour
    assert isinstance(app, Gateway)
    assert per_hour is not None
    for _ in range(per_hour - 1):
        app._rates.note_done("POST /register", per_hour, HERE)
    accounts = [{"email": f"{unique('new')}@example.com", "name": "New", "password": PASSWORD} for _ in range(2)]
    for _ in range(3):
        assert await ask(app, HERE, "/register", {**accounts[0], "password": "short"}) == 400

    assert [await ask(app, HERE, "/register", account) for account in accounts] == [201, 429]
    assert await ask(app, ELSEWHERE, "/register", accounts[1]) == 201
