"""`mercato top`: what each service does at the moment, again and again: rates, percentiles, errors, queue, breaker."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from mercato import topology
from mercato.chassis.contract import Empty
from mercato.chassis.hosting.host import GATEWAY
from mercato.cli import databases
from mercato.cli.asking import AskedProcess, asking, each
from mercato.cli.progress import note, show, table
from mercato.cli.waterfall import duration

HEADERS: Final = ("SERVICE", "PROCESSES", "CALLS/S", "P50", "P99", "ERRORS/S", "QUEUE P99", "IN FLIGHT", "BREAKER")
CLEAR: Final = "\033[H\033[J"
MISSING: Final = 1

HTTP_SECONDS: Final = "http_server_request_duration_seconds"
STATUS: Final = "http_response_status_code"
CALL_SECONDS: Final = "rpc_server_call_duration_seconds"
REQUESTS: Final = "mercato_requests"
FAILED: Final = "mercato_requests_failed"
WAITS: Final = "mercato_queue_wait_seconds"
IN_FLIGHT: Final = "mercato_calls_in_flight"
IS_OPEN: Final = "mercato_breaker_open"

Series = tuple[str, frozenset[tuple[str, str]]]
Samples = Mapping[Series, float]


class Row(msgspec.Struct, frozen=True):
    """What one service did between two looks. Rates are per second; times in nanoseconds, None without calls."""

    service: str
    processes: int
    calls: float
    p50: int | None
    p99: int | None
    errors: float
    queue_p99: int | None
    in_flight: int
    breaker: str
    """`open` if some process does not call it."""


def top(data: Path, at: Sequence[str], *, every: float, count: int | None, as_json: bool) -> int:
    """Prints a table each `every` seconds, `count` times; None: until Ctrl-C. Gives 1 if no process answers."""
    return databases.run(lambda: _until_ctrl_c(_top(data, at, every=every, count=count, as_json=as_json)))


async def _until_ctrl_c(shown: Coroutine[Any, Any, int]) -> int:
    try:
        return await shown
    except asyncio.CancelledError:
        return 0  # Ctrl-C is how watching ends


async def _top(data: Path, at: Sequence[str], *, every: float, count: int | None, as_json: bool) -> int:
    is_screen = sys.stdout.isatty() and not as_json
    async with asking(data, at) as asked:
        before, began = await _looked(asked), time.monotonic()
        done = 0
        while count is None or done < count:
            await asyncio.sleep(every)
            after, now = await _looked(asked), time.monotonic()
            if not after:
                note("mercato: no process of the shop answers any more")
                return MISSING
            rows = list(rows_of(before, after, now - began))
            if as_json:
                show(json.dumps({"seconds": round(now - began, 3), "services": msgspec.to_builtins(rows)}))
            else:
                before_table = CLEAR if is_screen else "\n" if done else ""
                show(before_table + "\n".join(table([HEADERS, *map(_cells, rows)])))
            before, began, done = after, now, done + 1
    return 0


async def _looked(asked: Sequence[AskedProcess]) -> Mapping[str, Samples]:
    """The samples of each process that answers, by its name."""
    answers, _ = await each(asked, lambda process: process.metrics(Empty()))
    return {name: samples_of(answer.text) for name, answer in answers.items()}


def samples_of(text: str) -> Samples:
    """The samples of metrics in Prometheus' text format."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def rows_of(before: Mapping[str, Samples], after: Mapping[str, Samples], seconds: float) -> Iterator[Row]:
    """A row for the gateway, then one for each service that some process serves. Processes are by name."""
    change = _change(before, after)
    yield _gateway(change, after, seconds)
    for service in topology.SERVICES:
        served = sum(any(_is_of(series, CALL_SECONDS, service) for series in samples) for samples in after.values())
        if served:
            yield _service(service, served, change, after, seconds)


def _change(before: Mapping[str, Samples], after: Mapping[str, Samples]) -> Samples:
    """What counters have risen by, over all processes; one that has started again begins at 0."""
    change: dict[Series, float] = {}
    for name, samples in after.items():
        earlier = before.get(name, {})
        for series, value in samples.items():
            risen = value - earlier.get(series, 0.0)
            change[series] = change.get(series, 0.0) + (risen if risen >= 0 else value)
    return change


def _gateway(change: Samples, after: Mapping[str, Samples], seconds: float) -> Row:
    requests = {series: value for series, value in change.items() if series[0] == f"{HTTP_SECONDS}_count"}
    failed = sum(value for (_, labels), value in requests.items() if dict(labels)[STATUS].startswith("5"))
    p50, p99 = percentiles(change, HTTP_SECONDS, "")
    answering = sum(
        any(name == f"{HTTP_SECONDS}_count" and value for (name, _), value in samples.items())
        for samples in after.values()
    )
    return Row(GATEWAY, answering, sum(requests.values()) / seconds, p50, p99, failed / seconds, None, 0, "-")


def _service(service: str, served: int, change: Samples, after: Mapping[str, Samples], seconds: float) -> Row:
    def total(name: str) -> float:
        return sum(value for series, value in change.items() if _is_of(series, f"{name}_total", service))

    p50, p99 = percentiles(change, CALL_SECONDS, f"{service}.")
    _, waited = percentiles(change, WAITS, f"{service}.")
    now = [
        (name, value)
        for samples in after.values()
        for (name, labels), value in samples.items()
        if name in (IN_FLIGHT, IS_OPEN) and dict(labels)["service"] == service
    ]
    in_flight = round(sum(value for name, value in now if name == IN_FLIGHT))
    breaker = "open" if any(value for name, value in now if name == IS_OPEN) else "closed"
    calls, errors = total(REQUESTS) / seconds, total(FAILED) / seconds
    return Row(service, served, calls, p50, p99, errors, waited, in_flight, breaker)


def _is_of(series: Series, name: str, service: str) -> bool:
    return series[0].startswith(name) and dict(series[1]).get("rpc_method", "").startswith(f"{service}.")


def percentiles(change: Samples, histogram: str, prefix: str) -> tuple[int | None, int | None]:
    """The 50th and the 99th percentile in nanoseconds, over the series of operations whose names begin with `prefix`.

    Between two bounds of a histogram they are interpolated; above the last one they are that. None without values.
    """
    counts: dict[float, float] = {}
    for (name, labels), value in change.items():
        if name == f"{histogram}_bucket":
            named = dict(labels)
            if (named.get("rpc_method") or named.get("operation") or "").startswith(prefix):
                bound = float(named["le"])
                counts[bound] = counts.get(bound, 0.0) + value
    bounds = sorted(counts)
    if not bounds or not counts[bounds[-1]]:
        return None, None
    return _percentile(bounds, counts, 0.5), _percentile(bounds, counts, 0.99)


def _percentile(bounds: Sequence[float], counts: Mapping[float, float], share: float) -> int:
    wanted = share * counts[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= wanted:
            if math.isinf(bound):
                break
            inside = counts[bound] - below
            return round(1e9 * (lower + (bound - lower) * ((wanted - below) / inside if inside else 1)))
        lower, below = bound, counts[bound]
    return round(1e9 * lower)


def _cells(row: Row) -> tuple[str, ...]:
    def time_of(nanoseconds: int | None) -> str:
        return "-" if nanoseconds is None else duration(nanoseconds)

    return (
        row.service,
        str(row.processes),
        f"{row.calls:.1f}",
        time_of(row.p50),
        time_of(row.p99),
        f"{row.errors:.1f}",
        time_of(row.queue_p99),
        str(row.in_flight),
        row.breaker,
    )
