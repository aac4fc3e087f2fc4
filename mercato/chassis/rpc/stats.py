"""Statistics of the operations of one process since its start, for operators who inspect its services."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

KEPT_DURATIONS: Final = 512
"""The 99th percentile is that of so many batches, the latest ones."""


class OperationStats(msgspec.Struct, frozen=True):
    """Of one operation. A refused batch counts as an error; an error that the service answers does not."""

    batches: int
    errors: int
    requests: int
    seconds: float
    """The total time for which batches ran."""
    p99_ms: float
    """Of the latest batches, from the start of the work to the answer."""


class OperationRecorder:
    """Records what one operation does."""

    def __init__(self) -> None:
        self._batches = 0
        self._errors = 0
        self._requests = 0
        self._seconds = 0.0
        self._durations: collections.deque[float] = collections.deque(maxlen=KEPT_DURATIONS)

    def answered(self, requests: int, seconds: float) -> None:
        """A batch of so many requests was answered after so long."""
        self._batches += 1
        self._requests += requests
        self._seconds += seconds
        self._durations.append(seconds)

    def failed(self, seconds: float = 0.0) -> None:
        """A batch was refused, or failed unexpectedly, after running for `seconds`."""
        self._batches += 1
        self._errors += 1
        self._seconds += seconds

    def stats(self) -> OperationStats:
        durations = sorted(self._durations)
        p99 = durations[len(durations) * 99 // 100] if durations else 0.0
        return OperationStats(self._batches, self._errors, self._requests, self._seconds, p99 * 1_000)


class CalleeStats(msgspec.Struct, frozen=True):
    """How a process calls one class of the operations of a service: its reads, or its writes."""

    service: str
    operations: str
    """`reads` or `writes`."""
    breaker: str
    """`closed`, `open` or `half_open`."""
    in_flight: int
    """Requests without an answer yet."""
    retry_budget: float | None = None
    """Requests to the service that may be sent again now; None where the service is in the same process."""


class InstanceStats(msgspec.Struct, frozen=True):
    """One service of one process."""

    service: str
    id: str
    """New at each start."""
    version: str
    pid: int
    up_seconds: float
    open_breakers: tuple[str, ...]
    """The services that its process does not call now, because their breakers are open."""
    operations: Mapping[str, OperationStats]
    """By name; only those that were called."""
    callees: tuple[CalleeStats, ...] = ()
    """The services that any service of its process has called."""


class Inspected(msgspec.Struct, frozen=True):
    """One instance of a service, as a registry names it, and its stats; `problem` says why there are none."""

    where: str
    """Its address, or its id."""
    stats: InstanceStats | None = None
    problem: str = ""


class Stats:
    """Of one process. `instance` is its id."""

    def __init__(self, instance: str, version: str) -> None:
        self.instance = instance
        self.version = version
        self.open_breakers: Callable[[], Iterable[str]] = tuple
        self.callees: Callable[[], Iterable[CalleeStats]] = tuple
        self._started = time.monotonic()
        self._recorders: dict[str, dict[str, OperationRecorder]] = {}

    def recorder(self, service: str, operation: str) -> OperationRecorder:
        """Always the same for one operation."""
        return self._recorders.setdefault(service, {}).setdefault(operation, OperationRecorder())

    def of(self, service: str) -> InstanceStats:
        recorded = self._recorders.get(service, {})
        operations = {name: recorder.stats() for name, recorder in recorded.items()}
        up_seconds = time.monotonic() - self._started
        breakers = tuple(sorted(self.open_breakers()))
        callees = tuple(self.callees())
        return InstanceStats(
            service, self.instance, self.version, os.getpid(), up_seconds, breakers, operations, callees
        )
