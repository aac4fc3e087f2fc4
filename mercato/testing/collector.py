"""A collector of traces: takes what OpenTelemetry's exporter sends over HTTP, and remembers the spans."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

LOOPBACK: Final = "127.0.0.1"
KINDS: Final = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


class CollectedSpan(msgspec.Struct, frozen=True):
    """A span as a collector sees it; ids in hexadecimal digits, `parent_id` empty at the root."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    is_failed: bool
    attributes: Mapping[str, Any]
    links: tuple[tuple[str, str], ...]
    start_ns: int
    end_ns: int


class Collector:
    """Collects for the time of a `with` block; `environment` makes a process of Mercato export to it."""

    def __init__(self) -> None:
        self._received: list[CollectedSpan] = []
        self._server = ThreadingHTTPServer((LOOPBACK, 0), _handler(self._received))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """Exports at once, not after OpenTelemetry's default of five seconds."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{LOOPBACK}:{self._server.server_address[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def spans(self, trace_id: str | None = None) -> Sequence[CollectedSpan]:
        """All spans that have arrived, or those of one trace."""
        return [span for span in [*self._received] if trace_id in (None, span.trace_id)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(received: list[CollectedSpan]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that the library calls
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces", self.path
            received.extend(_spans(ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # as the library has it
            """Writes nothing."""

    return Handler


def _spans(request: Any) -> list[CollectedSpan]:
    return [
        CollectedSpan(
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            service=_attributes(resource.resource.attributes)["service.name"],
            name=span.name,
            kind=KINDS[span.kind],
            is_failed=span.status.code == span.status.STATUS_CODE_ERROR,
            attributes=_attributes(span.attributes),
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            start_ns=span.start_time_unix_nano,
            end_ns=span.end_time_unix_nano,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
