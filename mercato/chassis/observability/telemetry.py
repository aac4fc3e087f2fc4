"""JSON logs and Prometheus metrics of a process.

Logs are one JSON object a line on standard error, with the ids of the call that is being served: trace, span, request,
and actor if it is a person.

A metric is declared where it is counted; its labels are bound at start-up, so that counting on the hot path appends to
a list (`counting.py`). What OpenTelemetry's semantic conventions name has that name, as its exporter for Prometheus
writes it (`http.server.request.duration` is `http_server_request_duration_seconds`); others begin with `mercato_`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import logging.handlers
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, Literal, TypeVar, cast

import msgspec
import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from mercato.chassis.contract import current

from .counting import PendingCounter, PendingGauge, PendingHistogram
from .exemplars import Exemplars, WithExemplars
from .tracing import Tracing

LOG_FILE_BYTES: Final = 16 * 1024 * 1024
SECONDS_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

URL_PASSWORD: Final = re.compile(r"(://[^\s:/@]*:)[^\s@]+@")
ROW_VALUES: Final = re.compile(r"(DETAIL:).*")

M = TypeVar("M", PendingCounter, PendingGauge, PendingHistogram)

MULTIPROCESS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Names a folder in which the workers of one shop share their metrics; prometheus-client reads it at import."""
SETTLE_SECONDS: Final = 0.25
"""How long a count may be missing in what other workers show: one that is killed loses so much."""

# ------------------------------------------------------------------------------------------------------------ logs


def configure_logging(level: str = "info", stream: BinaryIO | None = None) -> None:
    """Sends the logs of this process to `stream` (standard error). Levels: debug, info, warning, error."""
    structlog.configure(
        processors=[
            _add_call,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _without_secrets,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.BytesLoggerFactory(cast(BinaryIO, LogStream(stream or _standard_error()))),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


class LogStream:
    """The stream of log lines. Writing never raises: a log that fails must not fail the work that it reports.

    A line that cannot be written, to a closed pipe or a full disk, is dropped and counted; the next one is tried again.
    """

    lost_lines: ClassVar[int] = 0
    """Counted over this process."""
    copy: ClassVar[LogFile | None] = None
    """Gets each line too; one for the process."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> None:
        if LogStream.copy is not None:
            LogStream.copy.write(line)
        try:
            left = memoryview(line)
            while left:
                left = left[self._stream.write(left) or len(left) :]
        except (OSError, ValueError):  # a file that is closed raises ValueError
            LogStream.lost_lines += 1

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class LogFile(logging.handlers.RotatingFileHandler):
    """A file of log lines, with one older file beside it (`.1`). A line that cannot be written is lost, and counted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LOG_FILE_BYTES, backupCount=1, encoding="utf-8", delay=True)

    def write(self, line: bytes) -> None:
        self.handle(logging.makeLogRecord({"msg": line.decode(errors="replace").rstrip("\n")}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name that the library calls
        LogStream.lost_lines += 1


def also_log_to(path: Path) -> None:
    """From now on each line of the log of this process is also written to a file. Raises `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    LogStream.copy = LogFile(path)


def _standard_error() -> BinaryIO:
    """Without a buffer: Python flushes a buffer at the end of the process, which would fail once more."""
    buffered = sys.stderr.buffer
    return cast(BinaryIO, getattr(buffered, "raw", buffered))


class _ToStructlog(logging.Handler):
    """Writes what libraries log through the standard library's logging as the same JSON lines."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.stdlib.get_logger(record.name)
        message = record.getMessage()
        fields: dict[str, Any] = {"exc_info": record.exc_info}
        if _is_of_the_driver(record.name, message):
            fields = {"reason": _in_a_line(record.exc_info[1])} if record.exc_info and record.exc_info[1] else {}
        logger.log(record.levelno, message, logger=record.name, **fields)


def _is_of_the_driver(logger: str, message: str) -> bool:
    """Whether a record reports a lost connection of asyncpg: logged by asyncpg, or by asyncio about its tasks.

    Each connection logs one. The traceback only shows where in the driver it was noticed, and a restart of the server
    would fill the log with them.
    """
    return logger.partition(".")[0] == "asyncpg" or (logger == "asyncio" and "asyncpg" in message)


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _add_call(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    call = current.get(None)
    if call is not None:
        event.setdefault("trace_id", call.trace_id)
        event.setdefault("request_id", call.request_id)
        if call.actor.id:
            event.setdefault("actor_id", call.actor.id)
        if call.span is not None:
            event.setdefault("span_id", f"{call.span.id:016x}")
            event.setdefault("service", call.span.service)
    return event


def _without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Removes the passwords of URLs and the row values of PostgreSQL's messages from a traceback."""
    trace = event.get("exception")
    if isinstance(trace, str):
        event["exception"] = ROW_VALUES.sub(r"\1 (left out)", URL_PASSWORD.sub(r"\1***@", trace))
    return event


def _to_json(event: Any, **_options: Any) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=repr)
    except UnicodeEncodeError:  # a name of a file that is no text
        return json.dumps(event, default=repr).encode()


# --------------------------------------------------------------------------------------------------------- metrics


class WorkerProcesses(Collector):
    """The `process_` metrics of all workers that share a folder of metrics, with a label `pid`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for pid in sorted({file.stem.rpartition("_")[2] for file in self._folder.glob("*_*.db")}):
            for family in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():
                named = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    named.add_sample(sample.name, {"pid": pid}, sample.value)
        yield from families.values()


class Telemetry:
    """The metrics of one process. Declaring a name again gives the same metric."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # a further series for each metric, which no query uses
        self.registry = CollectorRegistry()
        self.tracing = Tracing()
        self.exemplars = Exemplars()
        self._declared: dict[str, PendingCounter | PendingGauge | PendingHistogram] = {}
        self._is_described = False

    def counter(self, name: str, about: str, labels: Sequence[str] = ()) -> PendingCounter:
        """`name` is without `_total`."""
        return self._once(PendingCounter, name, lambda: PendingCounter(name, about, labels, registry=self.registry))

    def histogram(
        self, name: str, about: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS_BUCKETS
    ) -> PendingHistogram:
        self.exemplars.declare(name, buckets)
        made = lambda: PendingHistogram(name, about, labels, buckets=buckets, registry=self.registry)  # noqa: E731
        return self._once(PendingHistogram, name, made)

    def gauge(
        self,
        name: str,
        about: str,
        labels: Sequence[str] = (),
        *,
        workers: Literal["livesum", "livemax", "mostrecent", "livemostrecent"],
    ) -> PendingGauge:
        """`workers`: how the values of several processes are combined; `live`: only of those that still run."""
        made = lambda: PendingGauge(name, about, labels, registry=self.registry, multiprocess_mode=workers)  # noqa: E731
        return self._once(PendingGauge, name, made)

    def _once(self, kind: type[M], name: str, make: Callable[[], M]) -> M:
        metric = self._declared.get(name)
        if metric is None:
            metric = self._declared[name] = make()
        assert isinstance(metric, kind), f"{name} is declared as two kinds of metric"
        return metric

    def settle(self) -> None:
        """Adds up what is pending."""
        for metric in list(self._declared.values()):
            metric.settle()

    async def settle_for_ever(self) -> None:
        """Settles again and again, so that no list grows and other workers show what is counted here.

        Once more when it is cancelled.
        """
        try:
            while True:
                await asyncio.sleep(SETTLE_SECONDS)
                self.settle()
        finally:
            self.settle()

    def describe_process(self, version: str) -> None:
        """Adds the build, and the system's figures about this process: CPU, memory, file descriptors, start."""
        build = self.gauge("mercato_build_info", "1, with the version.", ["version", "python"], workers="livemax")
        build.labels(version, platform.python_version()).set(1)
        if not self._is_described:
            self._is_described = True
            ProcessCollector(registry=self.registry)

    def own_exposition(self) -> str:
        """The metrics of this process alone, as text."""
        return prometheus_client.generate_latest(self.registry).decode()

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics as text, and its content type; of all workers together if they share a folder.

        Whom `accept` (a header) says to read OpenMetrics gets that, with exemplars; others get Prometheus' own format.
        """
        registry = self.registry
        if folder := os.environ.get(MULTIPROCESS_VARIABLE):
            self.settle()
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # pyright: ignore[reportUnknownMemberType, reportUnusedCallResult, reportArgumentType]
            registry.register(WorkerProcesses(Path(folder)))
        encode, content_type = choose_encoder(accept)
        return encode(WithExemplars(registry, self.exemplars)), content_type
