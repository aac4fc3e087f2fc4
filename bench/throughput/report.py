"""What a run says: progress while it lasts, and a table of its figures in the end."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Final

import msgspec

from bench.throughput.figures import Cpu, Raw, Result, Rows
from bench.throughput.plan import CONNECTIONS

GOALS: Final = {
    "placed": "at least 2.5",
    "paid": "at least 1.5",
    "one_product": "at least 0.95",
    "p50_one_connection": "at most 1.2",
    "browse": "",
}
TITLES: Final = {
    "placed": "placed with stock held / bare inserts",
    "paid": "carried to paid / bare inserts",
    "one_product": "all for one product / spread",
    "p50_one_connection": "p50 of placing, one connection",
    "browse": "list, search, get",
}


class Progress:
    """Lines for people on standard error; nothing for programs."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent

    def line(self, text: str) -> None:
        if not self._silent:
            print(text, file=sys.stderr, flush=True)


def document(result: Result) -> str:
    """The result as the JSON document that is committed."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1).decode() + "\n"


def table(result: Result) -> Iterator[str]:
    """The result for people."""
    if result.raw.readings:
        yield from _ratios(result)
    yield from _rates(result.raw)
    yield from _fixed_rate(result.raw)
    yield from _beside_sign_ins(result.raw)
    yield from _commit_latency(result.raw)
    yield from _observed(result.raw)
    for name, cpu in result.cpu_us.items():
        yield from _cpu(name, cpu)
    for name, rows in result.rows.items():
        yield from _rows(name, rows)
    audit, machine = result.raw.audit, result.machine
    violated = f"VIOLATED: {', '.join(audit.violated)}" if audit.violated else "all hold"
    yield ""
    yield f"audit    {audit.invariants} invariants over {audit.orders} orders ({audit.rows} rows): {violated}"
    yield (
        f"machine  {machine.cores} cores, {machine.cpu}, load average {machine.load_average:.1f} before the run, "
        f"{machine.fsync_us:.0f} us to sync 8 KiB; commit {result.commit}"
    )


def _ratios(result: Result) -> Iterator[str]:
    yield f"{'Mercato / Go reference':<40}{'ratio':>8}   {'goal':<15}" + "".join(
        f"{f'{c} conn. (low-high)':>22}" for c in CONNECTIONS
    )
    for name, title in TITLES.items():
        value: float | None = getattr(result.ratios, name)
        spreads = result.raw.ratios_by_connections.get(name, {})
        cells = ""
        for connections in CONNECTIONS:
            spread = spreads.get(str(connections))
            cells += f"{f'{spread[1]:.2f} ({spread[0]:.2f}-{spread[2]:.2f})' if spread else '':>22}"
        yield f"{title:<40}{'-' if value is None else f'{value:.2f}':>8}   {GOALS[name]:<15}{cells}".rstrip()


def _rates(raw: Raw) -> Iterator[str]:
    if not raw.readings:
        return
    yield ""
    yield f"{'load (medians of the rounds)':<40}{'conn.':>8}{'rate/s':>10}{'answers/s':>11}{'p50 ms':>9}{'p99 ms':>9}"
    steps = sorted({(r.case, r.subject, r.connections) for r in raw.readings})
    for case, subject, connections in steps:
        those = [r for r in raw.readings if (r.case, r.subject, r.connections) == (case, subject, connections)]
        rate, answers, p50, p99 = (
            sorted(getattr(r, field) for r in those)[len(those) // 2]
            for field in ("rate", "answers_per_second", "p50_us", "p99_us")
        )
        yield (
            f"{f'{subject} {case}':<40}{connections:>8}{rate:>10.0f}{answers:>11.0f}{p50 / 1e3:>9.2f}{p99 / 1e3:>9.2f}"
        )


def _fixed_rate(raw: Raw) -> Iterator[str]:
    if raw.fixed_rate:
        yield ""
        yield f"{'at half of capacity':<40}{'rate/s':>8}{'p50 ms':>10}{'p90 ms':>11}{'p99 ms':>9}{'p99.9':>9}"
    for fixed in raw.fixed_rate:
        us = fixed.latency_us
        yield (
            f"{f'{fixed.subject} {fixed.case}':<40}{fixed.requests_per_second:>8.0f}{us.p50 / 1e3:>10.2f}"
            f"{us.p90 / 1e3:>11.2f}{us.p99 / 1e3:>9.2f}{us.p999 / 1e3:>9.2f}"
        )


def _beside_sign_ins(raw: Raw) -> Iterator[str]:
    if raw.flooded:
        yield ""
        title = "browsing beside a flood of sign-ins (medians)"
        yield f"{title:<48}{'conn.':>6}{'alone ms':>10}{'beside ms':>11}{'ratio':>8}"
    for connections in sorted({each.connections for each in raw.flooded}):
        those = [each for each in raw.flooded if each.connections == connections]
        alone, beside, ratio = (
            statistics.median(getattr(each, field) for each in those) for field in ("alone_us", "beside_us", "ratio")
        )
        yield f"{'p50; at most 3.0':<48}{connections:>6}{alone / 1e3:>10.2f}{beside / 1e3:>11.2f}{ratio:>8.2f}"


def _commit_latency(raw: Raw) -> Iterator[str]:
    if raw.commit_latency:
        yield ""
        lone = f"a lone commit takes {(raw.lone_commit_us or 0) / 1e3:.1f} ms"
        yield f"{f'slow commits: {lone}':<52}{'workers':>8}{'conn.':>8}{'rate/s':>9}"
    for one in raw.commit_latency:
        yield (
            f"{f'{one.subject} {one.case}, {one.milliseconds:g} ms more':<52}{one.workers or '-':>8}"
            f"{one.connections:>8}{one.rate:>9.0f}"
        )


def _observed(raw: Raw) -> Iterator[str]:
    if raw.observed:
        yield ""
        title = "with traces, metrics and logs / without (medians)"
        yield f"{title:<52}{'conn.':>8}{'on/s':>9}{'off/s':>9}{'ratio':>8}{'(low-high)':>14}"
    for case, connections in sorted({(each.case, each.connections) for each in raw.observed}):
        those = [each for each in raw.observed if (each.case, each.connections) == (case, connections)]
        on, off = (statistics.median(getattr(each, field) for each in those) for field in ("on", "off"))
        ratios = sorted(each.ratio for each in those)
        spread = f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
        yield (
            f"{f'mercato {case}; at least 0.9':<52}{connections:>8}{on:>9.0f}{off:>9.0f}"
            f"{statistics.median(ratios):>8.2f}{spread:>14}"
        )


def _cpu(name: str, cpu: Cpu) -> Iterator[str]:
    yield ""
    yield (
        f"CPU us an order, {name}: {cpu.total:.0f} = {cpu.shop_total:.0f} of the shop + {cpu.postgres_total:.0f} of "
        "PostgreSQL"
    )
    for parts in (cpu.shop, cpu.postgres):
        shown = [f"{part} {us:.0f}" for part, us in parts.items() if us >= 1]
        yield f"    {'  '.join(shown)}"


def _rows(name: str, rows: Rows) -> Iterator[str]:
    yield ""
    yield (
        f"an order, {name}: {rows.inserted:.1f} rows inserted, {rows.updated:.1f} updated "
        f"({rows.hot_updated:.1f} HOT), {rows.deleted:.1f} deleted, {rows.commits:.2f} commits"
    )
    yield (
        f"    at most {rows.index_entries:.0f} index entries, {rows.wal_bytes / 1e3:.1f} kB of WAL, "
        f"{rows.disk_bytes / 1e3:.1f} kB on disk"
    )
    yield f"    {'table':<34}{'inserted':>9}{'updated':>9}{'HOT':>7}{'deleted':>9}{'index entries':>15}"
    for table, count in sorted(rows.tables.items(), key=lambda item: -item[1].index_entries):
        yield (
            f"    {table:<34}{count.inserted:>9.2f}{count.updated:>9.2f}{count.hot_updated:>7.2f}"
            f"{count.deleted:>9.2f}{count.index_entries:>15.2f}"
        )
