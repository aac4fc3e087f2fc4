"""Time and randomness as parameters, so that a test can control them."""

from __future__ import annotations

import datetime
import functools
import secrets
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds of a clock that only goes forward; for deadlines and durations inside one process."""
        ...

    def now(self) -> datetime.datetime:
        """The wall clock, in UTC. Not for deadlines that another process or the database checks as well."""
        ...


class Randomness(Protocol):
    def token(self, length_bytes: int, /) -> bytes:
        """Unpredictable bytes."""
        ...


class SystemClock:
    monotonic = staticmethod(time.monotonic)

    now = staticmethod(functools.partial(datetime.datetime.now, datetime.UTC))


class SystemRandomness:
    token = staticmethod(secrets.token_bytes)
