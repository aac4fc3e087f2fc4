"""Writes the figures of two runs into `docs/performance.md`: those of `before.json` and of `latest.json`, side by side.

    .venv/bin/python -m bench.throughput.document

`bench/results/before.json` is a `latest.json` that was put aside before a change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from bench.throughput.figures import Ratios, Result, TableRows
from bench.throughput.report import GOALS, TITLES

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "bench" / "results"
DOCUMENT: Final = ROOT / "docs" / "performance.md"
BEGIN: Final = "<!-- figures: written by bench.throughput.document -->"
END: Final = "<!-- end of figures -->"
KINDS: Final = ("reference", "placed", "paid")
"""Orders of the reference, and the two kinds of Mercato's."""
SMALLEST_US: Final = 1.0
"""Of CPU: a database or a process that takes less of an order is no line of the table."""


class CannotWrite(Exception):
    """A sentence: which file is not as it must be."""


def main() -> int:
    try:
        before, after = _read("before.json"), _read("latest.json")
        figures = lines(before, after if after != before else unmeasured(before))
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), "\n".join(figures)))
    except CannotWrite as error:
        print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
        return 1
    return 0


def _read(name: str) -> Result:
    file = RESULTS / name
    try:
        return msgspec.json.decode(file.read_bytes(), type=Result)
    except FileNotFoundError:
        raise CannotWrite(f"there is no {file.relative_to(ROOT)}: run make bench, or copy an earlier result") from None


def unmeasured(like: Result) -> Result:
    """A result without figures: the run after a change, as long as there is none."""
    raw = msgspec.structs.replace(like.raw, readings=(), p50_us_one_connection={}, commit_latency=())
    return msgspec.structs.replace(like, ratios=Ratios(None, None, None, None, None), cpu_us={}, rows={}, raw=raw)


def replaced(text: str, figures: str) -> str:
    """The text with these figures between its two marks. Raises `CannotWrite` where it has no such place."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise CannotWrite(f"{DOCUMENT.name} has no place for figures: {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{figures}\n{END}{tail}"


def lines(before: Result, after: Result) -> Iterator[str]:
    """The figures of both runs as Markdown."""
    yield "### Against the reference"
    yield ""
    yield "| Mercato / Go reference, 128 connections | goal | before | after |"
    yield "| --- | --- | --- | --- |"
    for name, title in TITLES.items():
        yield (
            f"| {title} | {GOALS[name]} | {_number(getattr(before.ratios, name), 2)} "
            f"| {_number(getattr(after.ratios, name), 2)} |"
        )
    yield ""
    yield from _budget(before, after)
    yield ""
    yield from _processes(before, after)
    yield ""
    yield from _tables(after if after.rows else before)
    yield ""
    yield from _slow_commits(before, after)
    yield ""
    yield f"Before: {_machine(before)} After: {_machine(after) if after.rows else 'not measured yet.'}"


def _budget(before: Result, after: Result) -> Iterator[str]:
    yield "### The budget of an order"
    yield ""
    yield "| an order | Go reference | placed: before | after | paid: before | after |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for title, of, digits in _BUDGET:
        ours = (of(before, "placed"), of(after, "placed"), of(before, "paid"), of(after, "paid"))
        cells = (of(after if after.rows else before, "reference"), *ours)
        yield f"| {title} | {' | '.join(_number(value, digits) for value in cells)} |"


def _cpu(field: str) -> Callable[[Result, str], float | None]:
    return lambda result, kind: getattr(result.cpu_us[kind], field) if kind in result.cpu_us else None


def _rows(field: str, unit: float = 1.0) -> Callable[[Result, str], float | None]:
    return lambda result, kind: getattr(result.rows[kind], field) / unit if kind in result.rows else None


def _p50(result: Result, kind: str) -> float | None:
    us = result.raw.p50_us_one_connection.get(kind)
    return None if us is None else us / 1e3


_BUDGET: Final[tuple[tuple[str, Callable[[Result, str], float | None], int], ...]] = (
    ("CPU, us", _cpu("total"), 0),
    ("of that the shop, us", _cpu("shop_total"), 0),
    ("of that PostgreSQL, us", _cpu("postgres_total"), 0),
    ("rows inserted", _rows("inserted"), 1),
    ("rows updated", _rows("updated"), 1),
    ("of that HOT", _rows("hot_updated"), 1),
    ("rows deleted", _rows("deleted"), 1),
    ("index entries, at most", _rows("index_entries"), 0),
    ("commits", _rows("commits"), 2),
    ("WAL, kB", _rows("wal_bytes", 1e3), 1),
    ("disk, kB", _rows("disk_bytes", 1e3), 1),
    ("p50 of its answer, one connection, ms", _p50, 2),
)


def _processes(before: Result, after: Result) -> Iterator[str]:
    """CPU of a paid order by process and database."""
    yield "### CPU of a paid order, by process and database"
    yield ""
    yield "| us of CPU | before | after |"
    yield "| --- | --- | --- |"
    fields: tuple[tuple[str, Literal["shop", "postgres"]], ...] = (("process", "shop"), ("database", "postgres"))
    for title, field in fields:
        parts = [_parts(result, field) for result in (before, after)]
        names = [n for n in {**parts[0], **parts[1]} if max(p.get(n, 0.0) for p in parts) >= SMALLEST_US]
        for name in sorted(names, key=lambda name: -parts[0].get(name, 0.0)):
            yield f"| {title} `{name}` | {' | '.join(_number(part.get(name), 0) for part in parts)} |"


def _parts(result: Result, field: Literal["shop", "postgres"]) -> Mapping[str, float]:
    cpu = result.cpu_us.get("paid")
    return getattr(cpu, field) if cpu else {}


def _tables(measured: Result) -> Iterator[str]:
    """What a paid order writes where, by the last run that has measured it."""
    yield f"### What a paid order writes, at commit {measured.commit}"
    yield ""
    yield "| table | inserted | updated | HOT | deleted | index entries |"
    yield "| --- | --- | --- | --- | --- | --- |"
    tables: Mapping[str, TableRows] = measured.rows["paid"].tables if "paid" in measured.rows else {}
    for name, count in sorted(tables.items(), key=lambda item: (-item[1].index_entries, item[0])):
        cells = (count.inserted, count.updated, count.hot_updated, count.deleted, count.index_entries)
        yield f"| `{name}` | {' | '.join(_number(value, 2) for value in cells)} |"


def _slow_commits(before: Result, after: Result) -> Iterator[str]:
    yield "### Orders a second while each commit takes 5 ms longer"
    yield ""
    yield "| load | workers | connections | before | after |"
    yield "| --- | --- | --- | --- | --- |"
    rates = [{(s.case, s.workers, s.connections): s.rate for s in r.raw.commit_latency} for r in (before, after)]
    for key in sorted({**rates[0], **rates[1]}, key=str):
        case, workers, connections = key
        yield f"| {case} | {workers} | {connections} | {' | '.join(_number(of.get(key), 0) for of in rates)} |"


def _machine(result: Result) -> str:
    m, audit = result.machine, result.raw.audit
    return (
        f"commit {result.commit}, {m.measured_on}, {m.cores} cores of {m.cpu}, load average {m.load_average:.1f} "
        f"before the run, {m.fsync_us:.0f} us to sync 8 KiB; {audit.orders} orders, {audit.invariants} invariants, "
        f"{len(audit.violated)} violated."
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
