"""The traces of the last hour, in the memory of this process and within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from mercato.chassis.contract.context import SAMPLED

KEPT_SECONDS: Final = 3_600.0
KEPT_BYTES: Final = 32 * 1024 * 1024
SPAN_BYTES: Final = 120
"""What a span takes beside its bytes: the object, and its place in a list."""
TRACE_BYTES: Final = 600
"""What a trace takes beside its spans: its key, its list, and what it is about."""


NOTHING: Final[Mapping[str, Any]] = {}


class EndedSpan(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A span in one trace, as it is kept and exported. Times in nanoseconds since 1970."""

    trace_id: str
    span_id: int
    parent_id: int
    name: str
    service: str
    kind: str
    start_ns: int
    end_ns: int
    flags: int = SAMPLED
    failure: str = ""
    attributes: Mapping[str, Any] = NOTHING
    links: tuple[tuple[str, int], ...] = ()
    about: int = 0


class _Trace:
    __slots__ = ("abouts", "at", "size", "spans")

    def __init__(self, at: float) -> None:
        self.at = at
        self.spans: list[bytes] = []
        self.abouts: set[int] = set()
        self.size = TRACE_BYTES


class RecentTraces:
    """Spans by trace, encoded. The oldest traces go first: after an hour, or when `limit_bytes` is reached."""

    def __init__(self, limit_bytes: int = KEPT_BYTES, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit_bytes
        self._now = now
        self._traces: dict[str, _Trace] = {}
        self._by_about: dict[int, list[str]] = {}
        self._size = 0
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def size_bytes(self) -> int:
        """An estimate, from above."""
        return self._size

    def add(self, span: EndedSpan) -> None:
        trace = self._traces.get(span.trace_id)
        if trace is None:
            trace = self._traces[span.trace_id] = _Trace(self._now())
            self._size += TRACE_BYTES
        if span.about and span.about not in trace.abouts:
            trace.abouts.add(span.about)
            self._by_about.setdefault(span.about, []).append(span.trace_id)
        encoded = self._encode(span)
        trace.spans.append(encoded)
        trace.size += len(encoded) + SPAN_BYTES
        self._size += len(encoded) + SPAN_BYTES
        self._forget()

    def trace(self, trace_id: str) -> Sequence[EndedSpan]:
        """The spans of a trace, in the order of their ends."""
        trace = self._traces.get(trace_id)
        return [] if trace is None else [msgspec.msgpack.decode(each, type=EndedSpan) for each in trace.spans]

    def latest(self, limit: int) -> Sequence[str]:
        """The ids of the latest traces, the oldest first."""
        return list(self._traces)[-limit:]

    def about(self, about: int) -> Sequence[str]:
        """The traces about an id, the oldest first."""
        return list(self._by_about.get(about, ()))

    def _forget(self) -> None:
        oldest_at = self._now() - KEPT_SECONDS
        while self._traces:
            trace_id = next(iter(self._traces))
            trace = self._traces[trace_id]
            if self._size <= self._limit and trace.at >= oldest_at:
                return
            del self._traces[trace_id]
            self._size -= trace.size
            for about in trace.abouts:
                left = [each for each in self._by_about[about] if each != trace_id]
                if left:
                    self._by_about[about] = left
                else:
                    del self._by_about[about]
