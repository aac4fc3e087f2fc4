"""Which traces are recorded, and what becomes of their spans. What a span is: `contract/context.py`.

Each request is in one of these classes, which is decided when it arrives, and goes with it to all processes
    sampled     `share` of all requests, and those whose client asks for it (W3C `traceparent`), up to `ASKED_A_SECOND`:
                exported by OpenTelemetry, and kept
    kept        up to `KEPT_A_SECOND` others: kept in the memory of each process, for operators
    others      their spans are dropped when they end; without an exporter the request has none

A request of the last two classes that fails or is slow (`SLOW_SECONDS`) exports the spans of this process, marked
`mercato.partial`, at most `PARTIAL_A_SECOND`: other processes have dropped theirs.

What it costs: a batch makes some objects, a request that is not recorded only if there is an exporter. Whole traces of
all requests that fail need `share` 1, and a collector that chooses among them when they have ended.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import msgspec

from mercato.chassis.contract import Context, Internal, OutcomeUnknown
from mercato.chassis.contract.context import KEPT, SAMPLED, SERVER, Place, Span

from .recent_traces import NOTHING, EndedSpan, RecentTraces

SLOW_SECONDS: Final = 1.0
ASKED_A_SECOND: Final = 10.0
KEPT_A_SECOND: Final = 5.0
PARTIAL_A_SECOND: Final = 10.0
BURST_SECONDS: Final = 10.0
"""A budget that was not used is kept for so long."""
FAILURES: Final = (Internal.code, OutcomeUnknown.code)
"""The failures of a batch that are worth its spans: the others are answers, or those of another process."""
PARTIAL: Final = "mercato.partial"


class Exporter(Protocol):
    """Sends spans to a collector. Never blocks, never raises."""

    def export(self, span: EndedSpan, /) -> None: ...
    def close(self) -> None: ...


class Budget:
    """So many a second. `now` is a time of `time.perf_counter`."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._most = per_second * BURST_SECONDS
        self._left = self._most
        self._at = 0.0
        self._spent_until = 0.0 if per_second else math.inf

    def take(self, now: float) -> bool:
        if now < self._spent_until:
            return False
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            self._spent_until = now + (1 - self._left) / self._per_second
            return False
        self._left -= 1
        return True


class Tracing:
    """The spans of one process. Off until `start`: then a request has no span, and nothing below it has one."""

    def __init__(self) -> None:
        self.is_on = False
        self.share = 0.0
        self.recent = RecentTraces()
        self._exporter: Exporter | None = None
        self._slow_seconds = SLOW_SECONDS
        self._asked, self._kept, self._partial = map(Budget, (ASKED_A_SECOND, KEPT_A_SECOND, PARTIAL_A_SECOND))
        self._epoch_ns = time.time_ns() - round(time.perf_counter() * 1e9)

    def start(
        self,
        share: float,
        exporter: Exporter | None = None,
        *,
        kept_a_second: float = KEPT_A_SECOND,
        slow_seconds: float = SLOW_SECONDS,
    ) -> None:
        """From now on a `share` of the requests is sampled, and sampled spans go to `exporter`.

        A request or batch that takes `slow_seconds` or longer is slow.
        """
        self.is_on = True
        self.share = share
        self._kept = Budget(kept_a_second)
        self._exporter = exporter
        self._slow_seconds = slow_seconds

    def close(self) -> None:
        """Exports what is left. After the last request."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.close()

    # ---------------------------------------------------------------------------------------------------------- roots

    def request(
        self, name: str, service: str, trace_id: str, parent_id: int, *, asked: bool, started: float
    ) -> Span | None:
        """The span of a request from outside; None if its spans go nowhere. `asked`: its client wants it sampled."""
        flags = 0
        if random.random() < self.share or (asked and self._asked.take(started)):
            flags = SAMPLED | KEPT
        elif self._kept.take(started):
            flags = KEPT
        elif self._exporter is None:
            return None
        places = [Place(trace_id, flags, parent_id)] if flags else ()
        return Span(name, service, SERVER, self, places, started=started)

    def batch(self, name: str, service: str, spans: Sequence[Span], kind: str = SERVER) -> Span:
        """The span of a batch, below the spans of the requests or events that it carries; these are all different."""
        places: dict[str, Place] = {}
        for caller in spans:
            if caller.places:
                for place in caller.below():
                    places.setdefault(place.trace_id, place)
        batch = Span(name, service, kind, self, list(places.values()))
        for caller in spans:
            if not caller.places:
                caller.adopt(batch)
        return batch

    # ------------------------------------------------------------------------------------------------ what has ended

    def end_request(self, span: Span, trace_id: str, failure: str, *, is_failed: bool) -> None:
        """Ends the span of a request from outside; exports what is known of one that has failed or was slow."""
        span.end(failure)
        if is_failed or self.is_slow(span):
            self.export_partial(span, trace_id)

    def end_batch(self, span: Span, contexts: Sequence[Context]) -> None:
        """Exports a batch that failed or was slow, if its requests came from another process, which cannot."""
        if span.places or self._exporter is None or any(context.span is not None for context in contexts):
            return
        if span.failure in FAILURES or self.is_slow(span):
            self.export_partial(span, contexts[0].trace_id)

    def is_slow(self, span: Span) -> bool:
        return span.ended is not None and span.ended - span.started >= self._slow_seconds

    def record(self, span: Span, /) -> None:
        for ended in self._ended(span, span.places):
            if ended.flags & KEPT:
                self.recent.add(ended)
            if ended.flags & SAMPLED and self._exporter is not None:
                self._exporter.export(ended)

    def _ended(self, span: Span, places: Sequence[Place]) -> Iterator[EndedSpan]:
        assert span.ended is not None
        for place in places:
            yield EndedSpan(
                place.trace_id, span.id, place.parent_id, span.name, span.service, span.kind,
                self._epoch_ns + round(span.started * 1e9), self._epoch_ns + round(span.ended * 1e9),
                place.flags, span.failure, span.attributes or NOTHING, tuple(span.links), place.about,
            )  # fmt: skip

    def export_partial(self, span: Span, trace_id: str) -> None:
        """Exports what this process has done for a request that was not sampled. `span` has ended."""
        if (
            self._exporter is None
            or any(place.flags & SAMPLED for place in span.places)
            or not self._partial.take(span.started)
        ):
            return
        if span.places:
            for kept in self.recent.trace(trace_id):
                self._export_marked(kept)
            return
        self._export_tree(span, trace_id, 0)

    def _export_tree(self, span: Span, trace_id: str, parent_id: int) -> None:
        if span.ended is None:  # it goes on after the request
            return
        for ended in self._ended(span, (Place(trace_id, 0, parent_id),)):
            self._export_marked(ended)
        for child in span.children or ():
            self._export_tree(child, trace_id, span.id)

    def _export_marked(self, ended: EndedSpan) -> None:
        if self._exporter is not None:
            marked = {**ended.attributes, PARTIAL: True}
            self._exporter.export(msgspec.structs.replace(ended, attributes=marked))
