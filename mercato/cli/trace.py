"""`mercato trace 1001`: what was done for an order, by which service, from when to when, over all processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from mercato.cli import databases, waterfall
from mercato.cli.asking import AskedProcess, asking, each
from mercato.cli.progress import is_coloured, note, show, table
from mercato.cli.starting import CannotStart
from mercato.contracts.processes import FindTraces, TraceSpan

MISSING: Final = 1
TRACE_ID: Final = re.compile(r"[0-9a-f]{32}\Z")
ORDER: Final = re.compile(r"[1-9][0-9]{0,17}\Z", re.ASCII)
FALLBACK_COLUMNS: Final = 100
LEAST_COLUMNS: Final = 60
RED: Final = "\033[31m"
PLAIN: Final = "\033[0m"
HEADERS: Final = ("TRACE", "REQUEST", "TOOK", "SPANS", "FAILED")

Traces = Mapping[str, Sequence[TraceSpan]]


def trace(wanted: str | None, data: Path, at: Sequence[str], *, limit: int, as_json: bool) -> int:
    """Prints the traces of an order or of a trace id, or lists the latest; gives 1 if there is none."""
    return databases.run(lambda: _trace(wanted, data, at, limit=limit, as_json=as_json))


async def _trace(wanted: str | None, data: Path, at: Sequence[str], *, limit: int, as_json: bool) -> int:
    request = _request(wanted)
    async with asking(data, at) as asked:
        answers, missing = await each(asked, lambda process: process.traces(request))
        # A process knows what its own part of a trace is about; the others are asked by the id.
        ids = list(dict.fromkeys(trace_id for answer in answers.values() for trace_id in answer.traces))
        found = await _whole(asked, ids)
    shown = dict(list(found.items())[-limit:])
    for name, reason in missing.items():
        note(f"mercato: {name} does not answer, so that its spans are missing: {reason}")
    if as_json:
        document = [{"trace_id": trace_id, "spans": msgspec.to_builtins(spans)} for trace_id, spans in shown.items()]
        show(json.dumps({"traces": document, "missing": dict(missing)}, indent=2))
    elif wanted is None:
        _list(shown)
    else:
        _print(shown, len(found) - len(shown))
    if shown:
        return 0
    if not as_json:
        note(f"mercato: {_nothing(wanted)}")
    return MISSING


def _request(wanted: str | None) -> FindTraces:
    if wanted is None:
        return FindTraces()
    if TRACE_ID.match(wanted):
        return FindTraces(trace_id=wanted)
    if ORDER.match(wanted):
        return FindTraces(order_id=int(wanted))
    raise CannotStart(f"{wanted!r} is neither the id of an order, as in 1001, nor that of a trace, of 32 digits")


async def _whole(asked: Sequence[AskedProcess], ids: Collection[str]) -> Traces:
    """The spans of traces from all processes, the oldest trace first."""
    spans: list[TraceSpan] = []
    for trace_id in ids:
        answers, _ = await each(asked, lambda process, wanted=trace_id: process.traces(FindTraces(trace_id=wanted)))
        spans += (span for answer in answers.values() for span in answer.spans)
    return waterfall.by_trace(spans)


def _nothing(wanted: str | None) -> str:
    why = "traces are kept for an hour, of the first requests a second and of MERCATO_TRACE_SHARE of the others"
    return f"no process has a trace{f' of {wanted}' if wanted else ''}: {why}"


def _list(found: Traces) -> None:
    if not found:
        return
    rows: list[tuple[str, ...]] = [HEADERS]
    for trace_id, spans in found.items():
        first = spans[0]
        took = waterfall.duration(max(span.end_ns for span in spans) - first.start_ns)
        failures = sorted({span.failure for span in spans if span.failure})
        rows.append((trace_id, first.name, took, str(len(spans)), ", ".join(failures) or "-"))
    for line in table(rows):
        show(line)


def _print(found: Traces, left_out: int) -> None:
    columns = max(LEAST_COLUMNS, shutil.get_terminal_size((FALLBACK_COLUMNS, 0)).columns)
    has_colours = is_coloured()
    for n, (trace_id, spans) in enumerate(found.items()):
        if n:
            show("")
        show(waterfall.heading(trace_id, spans))
        for line in waterfall.lines(spans, columns):
            show(f"{RED}{line.text}{PLAIN}" if line.is_failed and has_colours else line.text)
    if left_out > 0:
        show("")
        traces = "trace is" if left_out == 1 else "traces are"
        show(f"{left_out} older {traces} left out: --limit shows more.")
