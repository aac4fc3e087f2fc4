"""The limits of a process on its calls to services. Each limit is a setting (`hosting/settings.py`)."""

from __future__ import annotations

import msgspec


class CallLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of circuit breakers and retries. Shares are parts of 1, times are in seconds.

    Unless a comment gives another reason, a default is a usual value of such libraries (Hystrix, Resilience4j, the
    retry budget of Finagle).
    """

    window_seconds: float = 10.0
    minimum_calls: int = 20
    """With fewer calls within the window, a breaker stays closed."""
    failure_share: float = 0.5
    slow_share: float = 0.6
    slow_seconds: float = 3.0
    """A call without an answer for so long is slow. A third of the deadline of a client's request: a request that is
    then refused is still answered in time. Checkouts take milliseconds."""
    open_seconds: float = 1.0
    """A database that restarts is available again within about a second; the shop should refuse orders no longer than
    that. Each failed probe doubles it."""
    longest_open_seconds: float = 4.0
    """All is normal within five seconds of the return of a service; a probe every four costs it nothing."""
    retry_share: float = 0.1
    """The share of the requests to a service that may be sent again."""
