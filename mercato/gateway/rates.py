"""How often one caller may use a route (GCRA), and how soon one may try a password again after wrong ones.

Per process: with N workers a caller may do up to N times as much. An address is that of the connection: behind a proxy,
all its clients have one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec
from throttled import RateLimiterType, Throttled, rate_limiter, store

from mercato.chassis.contract import ANONYMOUS, Actor, Kind, ServiceError
from mercato.chassis.http import network_of
from mercato.chassis.observability.clock import Clock
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.route import Limits, RouteRequest

REMEMBERED_CALLERS: Final = 10_000
HOUR_SECONDS: Final = 3_600

FREE_FAILURES: Final = 5
"""Wrong passwords in a row that delay nothing: people mistype them."""
FIRST_DELAY_SECONDS: Final = 1.0
"""It doubles with each further failure, up to `LONGEST_DELAY_SECONDS`."""
LONGEST_DELAY_SECONDS: Final = 60.0
FORGOTTEN_SECONDS: Final = 900.0
"""After the last failure."""
REMEMBERED_FAILURES: Final = 10_000


class RateLimiter:
    """Counts by route and by who calls: the signed-in account, else the address that the connection comes from."""

    def __init__(self) -> None:
        self._store = store.MemoryStore(options={"MAX_SIZE": REMEMBERED_CALLERS})
        self._throttles: dict[str, Throttled] = {}

    def check(self, route: str, limits: Limits, actor: Actor, address: str) -> None:
        """Raises `TooManyRequests` with the seconds to wait."""
        assert limits.per_second is not None
        throttle = self._throttles.get(route)
        if throttle is None:
            throttle = self._throttles[route] = Throttled(
                using=RateLimiterType.GCRA.value,
                quota=rate_limiter.per_sec(limits.per_second, burst=limits.burst),
                store=self._store,
            )
        caller = f"{actor.role}:{actor.id}" if actor.id else address
        result = throttle.limit(f"{route} {caller}")
        if result.limited:
            raise TooManyRequests(max(1, math.ceil(result.state.retry_after)))

    def check_done(self, route: str, per_hour: int, address: str) -> None:
        """Raises `TooManyRequests` where callers from an address have done it too often; `note_done` counts."""
        if self._of_done(route, per_hour).peek(f"{route} done {network_of(address)}").remaining < 1:
            raise TooManyRequests(math.ceil(HOUR_SECONDS / per_hour))

    def note_done(self, route: str, per_hour: int, address: str) -> None:
        self._of_done(route, per_hour).limit(f"{route} done {network_of(address)}")

    def _of_done(self, route: str, per_hour: int) -> Throttled:
        name = f"{route} done"
        if name not in self._throttles:
            self._throttles[name] = Throttled(
                using=RateLimiterType.GCRA.value,
                quota=rate_limiter.per_hour(per_hour, burst=per_hour),
                store=self._store,
            )
        return self._throttles[name]


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


class Failures(msgspec.Struct):
    count: int
    last_at: float
    is_tried: bool = False


class PasswordTries:
    """Delays further tries for an account from an address where wrong passwords have come for it.

    Only from there: failures elsewhere keep no owner out. Beyond `FREE_FAILURES`, tries come one after the other.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: OrderedDict[tuple[str, str], Failures] = OrderedDict()

    def begin(self, account: str, address: str) -> None:
        """Raises `TooManyRequests` with the seconds to wait. `end` follows otherwise."""
        found = self._failures.get((account, network_of(address)))
        if found is None or found.count < FREE_FAILURES:
            return
        now = self._clock.monotonic()
        if now - found.last_at >= FORGOTTEN_SECONDS:
            found.count = 0
            return
        delay = min(FIRST_DELAY_SECONDS * 2 ** (found.count - FREE_FAILURES), LONGEST_DELAY_SECONDS)
        wait = 1.0 if found.is_tried else found.last_at + delay - now
        if wait > 0:
            raise TooManyRequests(math.ceil(wait))
        found.is_tried = True

    def end(self, account: str, address: str, *, is_right: bool | None) -> None:
        """None: the password was not checked."""
        key = (account, network_of(address))
        if is_right:
            self._failures.pop(key, None)
        elif (found := self._failures.get(key)) is not None:
            found.is_tried = False
        if is_right is not False:
            return
        failures = self._failures.setdefault(key, Failures(0, 0.0))
        failures.count += 1
        failures.last_at = self._clock.monotonic()
        self._failures.move_to_end(key)
        if len(self._failures) > REMEMBERED_FAILURES:
            self._failures.popitem(last=False)
