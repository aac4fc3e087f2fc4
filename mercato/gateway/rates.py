"""How often one caller may use a route (GCRA). Per process: with N workers a caller may do up to N times as much."""

from __future__ import annotations

import math
from typing import Final

from throttled import RateLimiterType, Throttled, rate_limiter, store

from mercato.chassis.contract import Actor
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.route import Limits

REMEMBERED_CALLERS: Final = 10_000


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
