"""Sends spans to a collector by OTLP over HTTP, with OpenTelemetry's SDK: the extra `otel`.

The collector is configured by OpenTelemetry's own variables: `OTEL_EXPORTER_OTLP_ENDPOINT`, `..._HEADERS`,
`..._CERTIFICATE`, `..._TIMEOUT`. Spans are sent in batches by a thread; while the collector does not answer, spans
beyond a queue of 2 048 are dropped, and nothing else happens.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from mercato.chassis.contract.context import CLIENT, CONSUMER, INTERNAL, PRODUCER, SERVER

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from .recent_traces import EndedSpan

SCOPE: Final = "mercato"
CLOSE_MILLISECONDS: Final = 1_000


class OtlpMissing(Exception):
    """The extra is not installed."""


class OtlpExporter:
    """Exports the spans of a process, which `instance` identifies. Raises `OtlpMissing`."""

    def __init__(self, version: str, instance: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk import resources
            from opentelemetry.sdk.trace import ReadableSpan
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as error:
            raise OtlpMissing(str(error)) from None
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        self._span = ReadableSpan
        self._scope = InstrumentationScope(SCOPE, version)
        self._flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._context = trace.SpanContext
        self._link = trace.Link
        self._status = trace.Status
        self._failed, self._unset = trace.StatusCode.ERROR, trace.StatusCode.UNSET
        kinds = trace.SpanKind
        self._kinds = {
            INTERNAL: kinds.INTERNAL,
            SERVER: kinds.SERVER,
            CLIENT: kinds.CLIENT,
            PRODUCER: kinds.PRODUCER,
            CONSUMER: kinds.CONSUMER,
        }

        class OneOfAService(resources.Resource):
            """Compared by identity, for each service has one: the SDK's own hash encodes all attributes for a span."""

            def __eq__(self, other: object) -> bool:
                return self is other

            def __hash__(self) -> int:
                return id(self)

        @functools.cache
        def resource(service: str) -> Resource:
            made = resources.Resource.create(
                {
                    "service.name": service,
                    "service.namespace": SCOPE,
                    "service.version": version,
                    "service.instance.id": instance,
                }
            )
            return OneOfAService(made.attributes, made.schema_url)

        self._resource = resource

    def export(self, span: EndedSpan, /) -> None:
        failure = span.failure
        # A batch is below one of the calls that it carries, and linked to the others: by a link to the parent, Jaeger
        # takes it for a span that follows from its parent, which is then not waited for.
        attributes = {**span.attributes, "error.type": failure} if failure else span.attributes
        self._processor.on_end(
            self._span(
                name=span.name,
                context=self._place(span.trace_id, span.span_id),
                parent=self._place(span.trace_id, span.parent_id) if span.parent_id else None,
                resource=self._resource(span.service),
                attributes=attributes,
                links=[self._link(self._place(*other)) for other in span.links if other[1] != span.parent_id],
                kind=self._kinds[span.kind],
                status=self._status(self._failed if failure else self._unset),
                start_time=span.start_ns,
                end_time=span.end_ns,
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        self._processor.force_flush(CLOSE_MILLISECONDS)
        self._processor.shutdown()

    def _place(self, trace_id: str, span_id: int):  # a type of the extra
        return self._context(int(trace_id, 16), span_id, is_remote=False, trace_flags=self._flags)
