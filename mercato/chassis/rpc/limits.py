"""What a process grants to the services that it calls. Each limit is a setting (`hosting/settings.py`)."""

from __future__ import annotations

import msgspec


class CallLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of circuit breakers and retries. Shares are parts of 1, times are in seconds.

    Where nothing else is said, a default is one of the usual starting values of libraries of this kind (Hystrix,
    Resilience4j, the retry budget of Finagle).
    """

    window_seconds: float = 10.0
    minimum_calls: int = 20
    """Fewer calls within the window say nothing."""
    failure_share: float = 0.5
    slow_share: float = 0.6
    slow_seconds: float = 3.0
    """A call without an answer for so long is slow. A third of the time that a request of a client has: the answer to
    what is refused then still comes in time. Checkouts take milliseconds."""
    open_seconds: float = 1.0
    """A database that restarts is back within a second or so; a shop should not refuse orders for longer than it must.
    Each failed probe doubles it."""
    longest_open_seconds: float = 4.0
    """All is normal within five seconds of the return of a service; a probe every four costs it nothing."""
    retry_share: float = 0.1
    """Of the requests to a service, those that may be sent again."""
