"""How often one caller may use a route (GCRA), and how soon one may try a password again after wrong ones.

The processes of a gateway on one machine count together (`shared_counts.py`); of several machines, each counts by
itself (docs/decisions/0033-rates-of-one-machine.md). An address is that of the connection: behind a proxy, all its
clients have one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from mercato.chassis.contract import ANONYMOUS, Actor, Kind, ServiceError
from mercato.chassis.http import network_of
from mercato.chassis.observability.clock import Clock
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.route import Limits, RouteRequest
from mercato.gateway.shared_counts import NOTHING, Numbers, SharedCounts

HOUR_SECONDS: Final = 3_600

FREE_FAILURES: Final = 5
"""Wrong passwords in a row that delay nothing: people mistype them."""
FIRST_DELAY_SECONDS: Final = 1.0
"""It doubles with each further failure, up to `LONGEST_DELAY_SECONDS`."""
LONGEST_DELAY_SECONDS: Final = 60.0
DOUBLINGS: Final = 10
"""More than `LONGEST_DELAY_SECONDS` needs."""
FORGOTTEN_SECONDS: Final = 900.0
"""After the last failure."""
TRIED_SECONDS: Final = 30.0
"""A try that has not ended by then has ended with its process."""


class RateLimiter:
    """Counts by route and by who calls: the signed-in account, else the address that the connection comes from."""

    def __init__(self, counts: SharedCounts, clock: Clock) -> None:
        self._counts = counts
        self._clock = clock

    def check(self, route: str, limits: Limits, actor: Actor, address: str) -> None:
        """Raises `TooManyRequests` with the seconds to wait."""
        assert limits.per_second is not None
        caller = f"{actor.role}:{actor.id}" if actor.id else address
        self._take(f"{route} {caller}", 1 / limits.per_second, limits.burst)

    def check_done(self, route: str, per_hour: int, address: str) -> None:
        """Raises `TooManyRequests` where callers from an address have done it too often; `note_done` counts."""
        self._take(f"{route} done {network_of(address)}", HOUR_SECONDS / per_hour, per_hour, only_looks=True)

    def note_done(self, route: str, per_hour: int, address: str) -> None:
        self._take(f"{route} done {network_of(address)}", HOUR_SECONDS / per_hour, per_hour, is_refused=False)

    def _take(
        self, key: str, interval: float, burst: int, *, only_looks: bool = False, is_refused: bool = True
    ) -> None:
        """GCRA: the number of a key is when its next request would come at the rate; `burst` may come before."""
        now, wait = self._clock.monotonic(), 0.0

        def take(numbers: Numbers) -> tuple[Numbers, float]:
            nonlocal wait
            due = max(numbers[0], now)
            wait = due - (burst - 1) * interval - now
            if only_looks or (wait > 0 and is_refused):
                return numbers, numbers[0]
            return (due + interval, 0.0, 0.0), due + interval

        self._counts.change(key, take)
        if wait > 0 and is_refused:
            raise TooManyRequests(max(1, math.ceil(wait)))


class GuardedRoute(Protocol):
    """A route that checks passwords, or opens accounts."""

    name: str
    limits: Limits
    tries: Callable[[RouteRequest], str | None] | None
    call: Callable[[Any], Awaitable[Any]]


async def call_guarded(
    route: GuardedRoute, request: RouteRequest, asked: Any, address: str, rates: RateLimiter, tries: PasswordTries
) -> Any:
    """The answer of a route that checks passwords or opens accounts. Raises `TooManyRequests` and its errors."""
    account = route.tries(request) if route.tries else None
    per_hour = route.limits.done_per_hour if request.actor == ANONYMOUS else None
    if per_hour is not None:
        rates.check_done(route.name, per_hour, address)
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
        rates.note_done(route.name, per_hour, address)
    return answer


class PasswordTries:
    """Delays further tries for an account from an address where wrong passwords have come for it.

    Only from there: failures elsewhere keep no owner out. Beyond `FREE_FAILURES`, tries come one after the other. The
    numbers of a key are how many have failed in a row, when the last one did, and until when another one is going on.
    """

    def __init__(self, counts: SharedCounts, clock: Clock) -> None:
        self._counts = counts
        self._clock = clock

    def begin(self, account: str, address: str) -> None:
        """Raises `TooManyRequests` with the seconds to wait. `end` follows otherwise."""
        now, wait = self._clock.monotonic(), 0.0

        def begin(numbers: Numbers) -> tuple[Numbers, float]:
            nonlocal wait
            count, last_at, tried_until = numbers
            if count < FREE_FAILURES:
                return numbers, last_at + FORGOTTEN_SECONDS if count else 0.0
            delay = min(FIRST_DELAY_SECONDS * 2 ** min(count - FREE_FAILURES, DOUBLINGS), LONGEST_DELAY_SECONDS)
            wait = 1.0 if tried_until > now else last_at + delay - now
            if wait <= 0:
                tried_until = now + TRIED_SECONDS
            return (count, last_at, tried_until), last_at + FORGOTTEN_SECONDS

        self._counts.change(_key(account, address), begin)
        if wait > 0:
            raise TooManyRequests(math.ceil(wait))

    def end(self, account: str, address: str, *, is_right: bool | None) -> None:
        """None: the password was not checked."""
        now = self._clock.monotonic()

        def end(numbers: Numbers) -> tuple[Numbers, float]:
            if is_right:
                return NOTHING, 0.0
            count, last_at, _ = numbers
            if is_right is False:
                count, last_at = count + 1, now
            return (count, last_at, 0.0), last_at + FORGOTTEN_SECONDS if count else 0.0

        self._counts.change(_key(account, address), end)


def _key(account: str, address: str) -> str:
    return f"password of {account} from {network_of(address)}"
