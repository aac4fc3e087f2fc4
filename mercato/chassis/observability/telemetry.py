"""What a process tells about itself: JSON logs and Prometheus metrics.

Logs are one JSON object a line on standard error, with the trace and request id of the call that is being served.
Metrics have their labels bound at start-up, so that counting on the hot path is one addition.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, BinaryIO, Final

import msgspec
import prometheus_client
import structlog
from prometheus_client.multiprocess import MultiProcessCollector

from mercato.chassis.contract import current

SECONDS_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

MULTIPROCESS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Names a folder in which the workers of one shop share their metrics; prometheus-client reads it at import."""

# ------------------------------------------------------------------------------------------------------------ logs


def configure_logging(level: str = "info", stream: BinaryIO | None = None) -> None:
    """Sends the logs of this process to `stream` (standard error). Levels: debug, info, warning, error."""
    structlog.configure(
        processors=[
            _add_call,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.BytesLoggerFactory(stream or sys.stderr.buffer),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


class _ToStructlog(logging.Handler):
    """What libraries say through the standard library's logging comes out as the same JSON lines."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.stdlib.get_logger(record.name)
        message = record.getMessage()
        told: dict[str, Any] = {"exc_info": record.exc_info}
        if _is_of_the_driver(record.name, message):
            told = {"reason": _in_a_line(record.exc_info[1])} if record.exc_info and record.exc_info[1] else {}
        logger.log(record.levelno, message, logger=record.name, **told)


def _is_of_the_driver(logger: str, message: str) -> bool:
    """What asyncpg says by itself, and what asyncio says of its tasks: that a server went away, each for itself.

    Where in the driver that was noticed helps nobody, and a restart of the server would fill the log with traces.
    """
    return logger.partition(".")[0] == "asyncpg" or (logger == "asyncio" and "asyncpg" in message)


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _add_call(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    call = current.get(None)
    if call is not None:
        event.setdefault("trace_id", call.trace_id)
        event.setdefault("request_id", call.request_id)
    return event


def _to_json(event: Any, **_options: Any) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)


# --------------------------------------------------------------------------------------------------------- metrics


class BatchObserver:
    """What one operation's batcher reports."""

    def __init__(self, telemetry: Telemetry, operation: str) -> None:
        self._size = telemetry.batch_size.labels(operation)
        self._wait = telemetry.queue_wait_seconds.labels(operation)
        self._refused = telemetry.calls_refused.labels(operation)
        self._failed = telemetry.batches_failed.labels(operation)
        self._operation = operation

    def sent(self, size: int, longest_wait_s: float) -> None:
        self._size.observe(size)
        self._wait.observe(longest_wait_s)

    def refused(self, count: int) -> None:
        self._refused.inc(count)

    def failed(self, error: BaseException) -> None:
        self._failed.inc()
        structlog.stdlib.get_logger("mercato.batching").error("batch_failed", operation=self._operation, exc_info=error)


class Telemetry:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        registry = self.registry
        self.requests = prometheus_client.Counter(
            "mercato_http_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.request_seconds = prometheus_client.Histogram(
            "mercato_http_request_seconds",
            "From the first byte of a request's body to the last of its answer.",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.requests_refused = prometheus_client.Counter(
            "mercato_http_requests_refused", "Requests refused before any route saw them.", ["code"], registry=registry
        )
        self.batch_size = prometheus_client.Histogram(
            "mercato_batch_size", "Requests in a batch.", ["operation"], buckets=SIZE_BUCKETS, registry=registry
        )
        self.queue_wait_seconds = prometheus_client.Histogram(
            "mercato_queue_wait_seconds",
            "How long the first request of a batch waited for a lane.",
            ["operation"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.calls_refused = prometheus_client.Counter(
            "mercato_calls_refused", "Calls refused because the queue was full.", ["operation"], registry=registry
        )
        self.batches_failed = prometheus_client.Counter(
            "mercato_batches_failed", "Batches that failed unexpectedly.", ["operation"], registry=registry
        )
        self.pool_busy = prometheus_client.Gauge(
            "mercato_pool_connections_busy",
            "Database connections in use.",
            ["service"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.pool_size = prometheus_client.Gauge(
            "mercato_pool_connections_limit",
            "Database connections that the pool may open.",
            ["service"],
            registry=registry,
            multiprocess_mode="livesum",
        )

        self.breaker_open = prometheus_client.Gauge(
            "mercato_breaker_open",
            "1 while calls to a service are refused because it does not answer.",
            ["service"],
            registry=registry,
            multiprocess_mode="livemax",
        )

        self.events_lag_seconds = prometheus_client.Gauge(
            "mercato_events_lag_seconds",
            "Age of the oldest event of a source that a consumer had not processed when it last read.",
            ["consumer", "source"],
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self.events_parked = prometheus_client.Gauge(
            "mercato_events_parked",
            "Events that wait for a retry, or behind one that does; counted up to ten thousand.",
            ["consumer", "source"],
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self.events_refused = prometheus_client.Gauge(
            "mercato_events_refused",
            "1 while a source refuses a consumer: its log was restored, or rows were deleted unread.",
            ["consumer", "source"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.events_delivered = prometheus_client.Counter(
            "mercato_events_delivered", "Events that had their effect.", ["consumer"], registry=registry
        )
        self.events_retried = prometheus_client.Counter(
            "mercato_events_retried", "Tries that failed, and will be repeated.", ["consumer"], registry=registry
        )
        self.events_dead = prometheus_client.Counter(
            "mercato_events_dead", "Events that were given up; they can be replayed.", ["consumer"], registry=registry
        )

        self.saga_fenced = prometheus_client.Counter(
            "mercato_saga_fenced",
            "Saves of a driver that were refused because somebody else had taken its saga over.",
            ["service"],
            registry=registry,
        )
        self.saga_taken_over = prometheus_client.Counter(
            "mercato_saga_taken_over", "Sagas that a sweeper went on with.", ["service"], registry=registry
        )
        self.saga_retried = prometheus_client.Counter(
            "mercato_saga_retried", "Steps that have to be tried again.", ["service"], registry=registry
        )

        self.reconciled = prometheus_client.Counter(
            "mercato_reconciliation_repaired", "What was wrong, and was put right.", ["kind"], registry=registry
        )
        self.mismatches = prometheus_client.Gauge(
            "mercato_reconciliation_mismatches",
            "What is wrong, and waits for somebody to look at it.",
            ["kind"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )

    def batches(self, operation: str) -> BatchObserver:
        return BatchObserver(self, operation)

    def exposition(self) -> tuple[bytes, str]:
        """The metrics as text and its content type; of all workers together where they share a folder."""
        registry = self.registry
        if os.environ.get(MULTIPROCESS_VARIABLE):
            registry = prometheus_client.CollectorRegistry()
            MultiProcessCollector(registry)  # pyright: ignore[reportUnknownMemberType, reportUnusedCallResult, reportArgumentType]
        return prometheus_client.generate_latest(registry), prometheus_client.CONTENT_TYPE_LATEST
