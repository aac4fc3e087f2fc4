"""A trace as lines for a terminal: a tree of spans, and for each of them a bar where it was. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from mercato.contracts.processes import TraceSpan

DURATION_COLUMNS: Final = 8
LEAST_NAME_COLUMNS: Final = 24
LEAST_BAR_COLUMNS: Final = 10
NAME_SHARE: Final = 0.6
"""Of the columns that names and bars have together, those of names at most."""
CUT: Final = "…"
BAR: Final = "█"
THIN: Final = "▏"
"""A span that is shorter than a column."""
SUFFIXES: Final = ("transaction", "read")
"""Spans of databases are called `orders transaction`: their service stands beside them."""


class Node(msgspec.Struct):
    """A span with those below it, by their start. A call and the batch that answers it are one node."""

    span: TraceSpan
    service: str
    children: list[Node]
    failure: str


class Line(msgspec.Struct, frozen=True):
    """A line of a waterfall; `is_failed` is for its colour."""

    text: str
    is_failed: bool = False


def roots(spans: Sequence[TraceSpan]) -> list[Node]:
    """The trees of a trace. There are several where a process has not given its spans."""
    nodes = {span.span_id: Node(span, span.service, [], span.failure) for span in spans}
    found: list[Node] = []
    for node in sorted(nodes.values(), key=lambda node: node.span.start_ns):
        parent = nodes.get(node.span.parent_id)
        (found if parent is None else parent.children).append(node)
    return [_joined(node) for node in found]


def _joined(node: Node) -> Node:
    """Joins a call with the batch that answers it, and so below."""
    if node.span.kind == "client" and len(node.children) == 1:
        [batch] = node.children
        if batch.span.kind == "server" and batch.span.name == node.span.name:
            node = Node(node.span, batch.service, batch.children, node.failure or batch.failure)
    node.children = [_joined(child) for child in node.children]
    return node


def heading(trace_id: str, spans: Sequence[TraceSpan]) -> str:
    """One line about a trace: its id, its order, its first span, when it was, how long it took."""
    orders = sorted({span.order_id for span in spans if span.order_id})
    first = min(spans, key=lambda span: span.start_ns)
    at = datetime.datetime.fromtimestamp(first.start_ns / 1e9, tz=datetime.UTC)
    services = len({span.service for span in spans})
    took = duration(max(span.end_ns for span in spans) - first.start_ns)
    about = f" of order {', '.join(map(str, orders))}" if orders else ""
    counted = f"{len(spans)} span{'s' if len(spans) != 1 else ''} of {services} service{'s' if services != 1 else ''}"
    return f"{trace_id}{about}: {first.name} at {at:%Y-%m-%d %H:%M:%S} UTC, {took}, {counted}"


def lines(spans: Sequence[TraceSpan], columns: int) -> Iterator[Line]:
    """The waterfall of a trace, in so many columns at most."""
    trees = roots(spans)
    begin, end = min(span.start_ns for span in spans), max(span.end_ns for span in spans)
    rows = [row for tree in trees for row in _rows(tree, "", "")]
    service_columns = max(len(node.service) for node, _ in rows)
    free = columns - service_columns - DURATION_COLUMNS - 3
    longest = max(len(name) for _, name in rows)
    name_columns = max(LEAST_NAME_COLUMNS, min(longest, round(free * NAME_SHARE), free - LEAST_BAR_COLUMNS))
    bar_columns = max(LEAST_BAR_COLUMNS, free - name_columns)
    for node, name in rows:
        bar = _bar(node.span, begin, end, bar_columns)
        shown = name if len(name) <= name_columns else name[: name_columns - 1] + CUT
        took = duration(node.span.end_ns - node.span.start_ns)
        line = (
            f"{node.service:<{service_columns}} {shown:<{name_columns}} {bar:<{bar_columns}} {took:>{DURATION_COLUMNS}}"
        )
        yield Line(line, bool(node.failure))


def _rows(node: Node, before: str, below: str) -> Iterator[tuple[Node, str]]:
    """Nodes with their names, indented as a tree."""
    name = _name(node.span)
    yield node, f"{before}{name}{f' ({node.failure})' if node.failure else ''}"
    for n, child in enumerate(node.children, 1):
        is_last = n == len(node.children)
        yield from _rows(child, below + ("└ " if is_last else "├ "), below + ("  " if is_last else "│ "))


def _name(span: TraceSpan) -> str:
    service, _, rest = span.name.partition(" ")
    return rest if service == span.service and rest in SUFFIXES else span.name


def _bar(span: TraceSpan, begin: int, end: int, columns: int) -> str:
    scale = columns / max(1, end - begin)
    first = min(columns - 1, int((span.start_ns - begin) * scale))
    length = round((span.end_ns - span.start_ns) * scale)
    return " " * first + (BAR * min(length, columns - first) if length else THIN)


def duration(nanoseconds: int) -> str:
    """As people read it: three digits and a unit."""
    for unit, factor in (("s", 1e9), ("ms", 1e6)):
        if nanoseconds >= factor:
            value = nanoseconds / factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{nanoseconds / 1e3:.0f} us"


def by_trace(spans: Sequence[TraceSpan]) -> Mapping[str, list[TraceSpan]]:
    """Spans by trace, the traces by their first span, each span once."""
    found: dict[str, dict[str, TraceSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        found.setdefault(span.trace_id, {})[span.span_id] = span
    return {trace_id: list(each.values()) for trace_id, each in found.items()}
