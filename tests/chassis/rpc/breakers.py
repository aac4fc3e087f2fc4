"""Breakers with a clock that tests move."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from mercato.chassis.rpc.circuit_breaker import Breaker, State
from mercato.chassis.rpc.limits import CallLimits

WINDOW, MINIMUM, OPEN, LONGEST, PROBE = 10.0, 4, 5.0, 30.0, 15.0


class ManualClock:
    def __init__(self) -> None:
        self.seconds = 1_003.7

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime.datetime:
        raise AssertionError("a breaker has nothing to do with the wall clock")


def breaker_with(
    clock: ManualClock, *, jitter: Callable[[], float] = lambda: 0.0, on_change: Callable[[State], None] | None = None
) -> Breaker:
    return Breaker(
        "stock",
        clock=clock,
        jitter=jitter,
        limits=CallLimits(
            window_seconds=WINDOW, minimum_calls=MINIMUM, open_seconds=OPEN, longest_open_seconds=LONGEST
        ),
        probe_seconds=PROBE,
        on_change=on_change,
    )
