"""What each process says of itself to the operator. Every process serves this, at an address of its own."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from mercato.chassis.contract import Contract, Empty, Message, Retry, single

from .roles import STAFF_ONLY

TraceId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


class TraceSpan(Message):
    """A span in one trace. Ids in hexadecimal digits; times in nanoseconds since 1970."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a span without a parent."""
    name: str
    service: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    failure: str = ""
    """The code of the error, or its type."""
    order_id: int = 0
    """The order that the trace is about, as far as it was known then; 0: not known."""


class FindTraces(Message):
    """Asks for a trace, or for those about an order; with neither for the ids of the latest traces."""

    trace_id: TraceId | None = None
    order_id: int | None = None


class FoundTraces(Message):
    spans: tuple[TraceSpan, ...]
    """In the order of traces, the oldest first, and within one in the order of ends."""
    traces: tuple[str, ...] = ()
    """The ids of the traces, the oldest first."""


class ProcessMetrics(Message):
    text: str
    """The metrics of this process alone, in Prometheus' text format."""


class Processes(Contract, name="process"):
    traces = single(FindTraces, FoundTraces, allow=STAFF_ONLY, retry=Retry.SAFE)
    """What this process has of the traces of the last hour."""
    metrics = single(Empty, ProcessMetrics, allow=STAFF_ONLY, retry=Retry.SAFE)
