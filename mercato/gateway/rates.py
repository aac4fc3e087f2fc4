"""How often a caller may use a route (GCRA), and the delay before another password after wrong ones.

The processes of a gateway on one machine count together (`shared_counts.py`); each of several machines counts by itself
(docs/decisions/0033-rates-of-one-machine.md). An address is that of the connection: all clients of a proxy have one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, Kind, ServiceError
from mercato.chassis.http import network_of
from mercato.chassis.observability.clock import Clock
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.route import Limits, RouteRequest
from mercato.gateway.shared_counts import NOTHING, Changed, Numbers, SharedCounts

HOUR_SECONDS: Final = 3_600

FREE_FAILURES: Final = 5
"""Wrong passwords in a row without a delay: people mistype them."""
FIRST_DELAY_SECONDS: Final = 1.0
"""It doubles with each further failure, up to `LONGEST_DELAY_SECONDS`."""
LONGEST_DELAY_SECONDS: Final = 60.0
DOUBLINGS: Final = 10
"""The limit of the exponent: more than `LONGEST_DELAY_SECONDS` needs."""
FORGOTTEN_SECONDS: Final = 900.0
"""The failures of an account count until so long after the last one."""
TRIED_SECONDS: Final = 30.0
"""An attempt that has not ended by then has ended with its process."""


class RateLimiter:
    """Counts by route and caller: the signed-in account, else the address of the connection."""

    def __init__(self, counts: SharedCounts, clock: Clock) -> None:
        self._counts = counts
        self._clock = clock

    def check(self, route: str, limits: Limits, actor: Actor, address: str) -> None:
        """Raises `TooManyRequests` with the seconds to wait."""
        assert limits.per_second is not None
        caller = f"{actor.role}:{actor.id}" if actor.id else address
        now, interval, burst = self._clock.monotonic(), 1 / limits.per_second, limits.burst
        _refuse_for(self._counts.change(f"{route} {caller}", lambda numbers: _take(numbers, now, interval, burst)))

    def check_done(self, route: str, per_hour: int, address: str) -> None:
        """Raises `TooManyRequests` where callers from an address have done it too often; `note_done` counts."""
        now, key = self._clock.monotonic(), _done_key(route, address)
        _refuse_for(self._counts.change(key, lambda numbers: _keep(numbers, now, HOUR_SECONDS / per_hour, per_hour)))

    def note_done(self, route: str, per_hour: int, address: str) -> None:
        now = self._clock.monotonic()
        self._counts.change(_done_key(route, address), lambda numbers: _count(numbers, now, HOUR_SECONDS / per_hour))


# GCRA: the number of a key is the time at which its next request would come at the rate; `burst` may come before.
# These functions change the numbers of a key, and give the seconds to wait.


def _take(numbers: Numbers, now: float, interval: float, burst: int) -> Changed:
    """Counts a request, unless it has to wait."""
    kept = _keep(numbers, now, interval, burst)
    return kept if kept.wait > 0 else _count(numbers, now, interval)


def _keep(numbers: Numbers, now: float, interval: float, burst: int) -> Changed:
    """Counts nothing; the wait is not positive where a request may come."""
    due = max(numbers[0], now)
    return Changed(numbers, numbers[0], due - (burst - 1) * interval - now)


def _count(numbers: Numbers, now: float, interval: float) -> Changed:
    due = max(numbers[0], now) + interval
    return Changed((due, 0.0, 0.0), due)


def _refuse_for(changed: Changed) -> None:
    if changed.wait > 0:
        raise TooManyRequests(max(1, math.ceil(changed.wait)))


def _done_key(route: str, address: str) -> str:
    return f"{route} done {network_of(address)}"


class GuardedRoute(Protocol):
    """A route that checks passwords, or opens accounts."""

    rates: str
    limits: Limits
    tries: Callable[[RouteRequest], str | None] | None
    call: Callable[[Any], Awaitable[Any]]


async def call_guarded(
    route: GuardedRoute, request: RouteRequest, asked: Any, address: str, rates: RateLimiter, tries: PasswordTries
) -> Any:
    """The answer of a route that checks passwords or opens accounts. Raises `TooManyRequests`, and its errors."""
    account = route.tries(request) if route.tries else None
    per_hour = route.limits.done_per_hour if request.actor == ANONYMOUS_ACTOR else None
    if per_hour is not None:
        rates.check_done(route.rates, per_hour, address)
    if account is not None:
        tries.begin(account, address)
    is_right = None
    try:
        answer = await route.call(asked)
        is_right = True
    except ServiceError as error:
        is_right = False if error.kind is Kind.UNAUTHENTICATED else None
        raise
    finally:
        if account is not None:
            tries.end(account, address, is_right=is_right)
    if per_hour is not None:
        rates.note_done(route.rates, per_hour, address)
    return answer


class PasswordTries:
    """Delays further attempts for an account from an address that has sent wrong passwords for it.

    Only from there: failures from other addresses do not lock the owner out. Beyond `FREE_FAILURES`, attempts are made
    one after the other. The numbers of a key are how many have failed in a row, when the last one did, and until when
    another one is in progress.
    """

    def __init__(self, counts: SharedCounts, clock: Clock) -> None:
        self._counts = counts
        self._clock = clock

    def begin(self, account: str, address: str) -> None:
        """Raises `TooManyRequests` with the seconds to wait. `end` follows otherwise."""
        now = self._clock.monotonic()
        _refuse_for(self._counts.change(_key(account, address), lambda numbers: _begin_attempt(numbers, now)))

    def end(self, account: str, address: str, *, is_right: bool | None) -> None:
        """`is_right`: None where the password was not checked."""
        now = self._clock.monotonic()
        self._counts.change(_key(account, address), lambda numbers: _end_attempt(numbers, now, is_right))


def _begin_attempt(numbers: Numbers, now: float) -> Changed:
    count, last_at, tried_until = numbers
    if count < FREE_FAILURES:
        return Changed(numbers, last_at + FORGOTTEN_SECONDS if count else 0.0)
    delay = min(FIRST_DELAY_SECONDS * 2 ** min(count - FREE_FAILURES, DOUBLINGS), LONGEST_DELAY_SECONDS)
    wait = 1.0 if tried_until > now else last_at + delay - now
    until = now + TRIED_SECONDS if wait <= 0 else tried_until
    return Changed((count, last_at, until), last_at + FORGOTTEN_SECONDS, wait)


def _end_attempt(numbers: Numbers, now: float, is_right: bool | None) -> Changed:
    if is_right:
        return Changed(NOTHING, 0.0)
    count, last_at, _ = numbers
    if is_right is False:
        count, last_at = count + 1, now
    return Changed((count, last_at, 0.0), last_at + FORGOTTEN_SECONDS if count else 0.0)


def _key(account: str, address: str) -> str:
    return f"password of {account} from {network_of(address)}"
