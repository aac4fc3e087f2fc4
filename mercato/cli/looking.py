"""`mercato services` and `mercato doctor`: lists the processes, their health, and why one is not listed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato import topology
from mercato.chassis.rpc.stats import Inspected, InstanceStats
from mercato.cli import databases
from mercato.cli.operator import operating
from mercato.cli.progress import fail, show, table
from mercato.embedded_postgres import SupervisorError
from mercato.embedded_postgres.outside import PLACES, FoundPlace, places, prune as prune_places

SAMPLE_SECONDS: Final = 1.0
"""The time over which calls per second are counted."""
MISSING: Final = 1
CALL_HEADERS: Final = ("CALLER", "INSTANCE", "CALLS", "OPERATIONS", "BREAKER", "IN FLIGHT", "MAY RETRY")
HEADERS: Final = ("SERVICE", "INSTANCE", "PID", "VERSION", "UP", "CALLS/S", "P99", "ERRORS", "HEALTH")

PLACE_STATES: Final = {
    "used": "which uses it",
    "deleted": "which was deleted: --prune removes it",
    "moved": "which has another name or path now: its next start there finds it",
    "missing": "which is not there: --prune removes it if the folder was deleted",
}
Found = Mapping[str, Sequence[Inspected]]


def services(data: Path, *, as_json: bool) -> int:
    """Lists the instances of all services; gives 1 if a service has none that answers."""
    return databases.run(lambda: _services(data, as_json=as_json))


def doctor(data: Path, *, as_json: bool) -> int:
    """Prints which registry is used, what it lists, and why it does not list a service."""
    found = places()
    if not as_json:
        for place in found:
            show(f"{place.path} holds {place.content} of {place.data}, {PLACE_STATES[place.state]}")
    return databases.run(lambda: _doctor(data, found, as_json=as_json))


def prune(*, as_json: bool) -> int:
    """Deletes the databases whose data folder is gone; gives 1, after a sentence, to an ordinary user."""
    if os.geteuid() != 0:
        fail("only root has databases outside of data folders: run this as root")
        return MISSING
    try:
        removed = prune_places()
    except SupervisorError as error:
        fail(str(error))
        return MISSING
    if as_json:
        show(json.dumps({"removed": [str(place.path) for place in removed]}, indent=2))
    for place in () if as_json else removed:
        show(f"removed {place.path}, {place.content} of {place.data}")
    if not removed and not as_json:
        show(f"There is nothing below {PLACES} whose data folder is gone.")
    return 0


async def _services(data: Path, *, as_json: bool) -> int:
    async with operating(data) as operator:
        before, began = await operator.remote.inspect(topology.SERVICES), time.monotonic()
        await asyncio.sleep(SAMPLE_SECONDS)
        after = await operator.remote.inspect(topology.SERVICES)
        seconds = time.monotonic() - began
    rows = [row for name, found in after.items() for row in _rows(name, found, before, seconds)]
    if as_json:
        show(json.dumps({"services": rows}, indent=2))
    else:
        for line in table([HEADERS, *(_cells(row) for row in rows)]):
            show(line)
        show("")
        for line in table([CALL_HEADERS, *(cells for row in rows for cells in _call_cells(row))]):
            show(line)
    return MISSING if any(not _answers(found) for found in after.values()) else 0


async def _doctor(data: Path, found_places: Sequence[FoundPlace], *, as_json: bool) -> int:
    async with operating(data) as operator:
        found = await operator.remote.inspect(topology.SERVICES)
        registry, missing = operator.registry, operator.missing
        problem = operator.remote.registry_problem()
    seen = {name: [_sentence(one) for one in instances] for name, instances in found.items()}
    if as_json:
        listed = [
            {"path": str(each.path), "data": each.data, "state": each.state, "has_database": each.has_database}
            for each in found_places
        ]
        document = {"registry": registry, "problem": problem, "services": seen, "outside": listed}
        show(json.dumps(document, indent=2))
    else:
        show(f"Services are found through {registry}.")
        if problem:
            show(f"What is shown may be old or missing: {problem}")
        for name, instances in found.items():
            show(f"{name:<10} {'; '.join(seen[name]) or 'not seen: ' + _why(name, missing)}")
            for one in instances:
                if one.stats and one.stats.open_breakers:
                    show(f"{'':<10} {one.where} does not call {', '.join(one.stats.open_breakers)}: no answer there")
    return MISSING if any(not _answers(instances) for instances in found.values()) else 0


def _answers(found: Sequence[Inspected]) -> bool:
    return any(one.stats for one in found)


def _why(name: str, missing: str) -> str:
    return f"no process has registered it; start one with `mercato serve {name}`, or, if one runs, {missing}"


def _sentence(one: Inspected) -> str:
    if one.stats is None:
        return f"{one.where} is listed and does not answer ({one.problem})"
    return f"{one.where} answers (pid {one.stats.pid}, release {one.stats.version})"


def _rows(name: str, found: Sequence[Inspected], before: Found, seconds: float) -> Iterator[dict[str, Any]]:
    if not found:
        yield {"service": name, "health": "not seen"}
    earlier = {one.where: one.stats for one in before.get(name, ())}
    for one in found:
        if one.stats is None:
            yield {"service": name, "instance": one.where, "health": one.problem}
            continue
        yield {
            "service": name,
            "instance": one.where,
            "pid": one.stats.pid,
            "version": one.stats.version,
            "up_seconds": round(one.stats.up_seconds, 1),
            "calls_per_second": round(max(0, _requests(one.stats) - _requests(earlier.get(one.where))) / seconds, 1),
            "p99_ms": round(max((o.p99_ms for o in one.stats.operations.values()), default=0.0), 1),
            "errors": sum(operation.errors for operation in one.stats.operations.values()),
            "breakers_open": list(one.stats.open_breakers),
            "calls": [msgspec.to_builtins(callee) for callee in one.stats.callees],
            "health": "up",
        }


def _requests(stats: InstanceStats | None) -> int:
    return sum(operation.requests for operation in stats.operations.values()) if stats else 0


def _call_cells(row: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The calls of a process, a line for the reads and one for the writes of each service."""
    for callee in row.get("calls", ()):
        budget = callee["retry_budget"]
        yield (
            str(row["service"]),
            str(row["instance"]),
            callee["service"],
            callee["operations"],
            callee["breaker"],
            str(callee["in_flight"]),
            "-" if budget is None else f"{budget:.0f}",
        )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    health = str(row["health"])
    if row.get("breakers_open"):
        health = f"{health}; does not reach {', '.join(row['breakers_open'])}"
    keys = ("service", "instance", "pid", "version")
    if "pid" not in row:
        return (str(row["service"]), str(row.get("instance", "-")), *["-"] * 6, health)
    shown = [str(row[key]) for key in keys]
    numbers = (f"{row['up_seconds']:.0f} s", str(row["calls_per_second"]), f"{row['p99_ms']} ms", str(row["errors"]))
    return (*shown, *numbers, health)
