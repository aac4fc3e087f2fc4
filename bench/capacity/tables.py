"""The tables of a report: for a terminal, and for a page in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from . import compare
from .assumptions import DATABASE_CORES, Question
from .compare import Comparison, Figure
from .inputs import KINDS, Kind
from .plan import Plan, Simulated
from .report import Report

SMALLEST: Final = 0.01
"""What is less is not shown as a number."""


class Table(msgspec.Struct, frozen=True):
    """`about`: a sentence below the title."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str

    def text(self) -> Iterator[str]:
        """The first column stands to the left, the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        yield from (self.title.upper(), self.about)
        for row in (self.header, *self.rows):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            yield "  ".join((row[0].ljust(widths[0]), *cells)).rstrip()
        yield ""

    def markdown(self) -> Iterator[str]:
        yield from (f"### {self.title}", self.about, "")
        for row in (self.header, ("---",) * len(self.header), *self.rows):
            yield f"| {' | '.join(row)} |"
        yield ""


def number(value: float) -> str:
    """Three digits that count, and none behind the second decimal; thousands apart."""
    if 0 < value < SMALLEST:
        return f"< {SMALLEST}"
    digits = 2 - math.floor(math.log10(value)) if value else 0
    return f"{round(value, digits):,.{min(2, max(0, digits))}f}".replace(",", " ")


def size(terabytes: float) -> str:
    return f"{number(terabytes)} TB" if terabytes >= 1 else f"{number(terabytes * 1e3)} GB"


def whole(value: int) -> str:
    """Of things that are counted."""
    return f"{value:,}".replace(",", " ")


def tables(found: Report) -> Iterator[Table]:
    yield _compared(found.comparison)
    if found.plans:
        yield _limits(found)
        yield _machines(found.plans)
        yield _services(found.plans)
        yield _changed(found)


# ----------------------------------------------------------------------------------------------- measured and simulated


def _compared(comparison: Comparison) -> Table:
    about = (
        f"What is predicted deviates by {compare.mean(comparison):.0%} on average, at most by "
        f"{compare.largest(comparison):.0%}; the bound is {compare.BOUND:.0%}, of latency at half of the capacity "
        f"{compare.HALF_BOUND:.0%}."
    )
    by_name: dict[str, dict[Kind, Figure]] = {}
    for figure in comparison.figures:
        by_name.setdefault(figure.name, {})[figure.kind] = figure
    rows = [
        (name, *(cell for kind in KINDS for cell in _cells(figures.get(kind)))) for name, figures in by_name.items()
    ]
    header = ("orders", *(cell for kind in KINDS for cell in (kind, "simulated", "deviation")))
    return Table("Measured and simulated", header, tuple(rows), about)


def _cells(figure: Figure | None) -> tuple[str, str, str]:
    if figure is None:
        return "-", "-", "-"
    deviation = "calibrated" if figure.is_calibrated else f"{figure.deviation:+.0%}"
    return _of(figure, figure.measured), _of(figure, figure.simulated), deviation


def _of(figure: Figure, value: float) -> str:
    return f"{number(value)}{figure.unit}" if figure.unit == "/s" else f"{number(value)} {figure.unit}".strip()


# ------------------------------------------------------------------------------------------------------------- machines


def _limits(found: Report) -> Table:
    use = found.plans[0].question.use
    rows = [
        (limit.name, limit.scope, number(limit.per_second), number(limit.per_second * use)) for limit in found.limits
    ]
    header = ("what cannot be multiplied", "limits one", "paid orders/s", f"at a use of {use:.0%}")
    return Table(
        "What saturates first", header, tuple(rows), "Each line is extrapolated: none of these was ever reached."
    )


def _gbit(one: Plan, *kinds: str) -> str:
    return "; ".join(number(one.network_gbit_per_second[kind]) for kind in kinds) + " Gbit/s"


def _p50(one: Plan) -> str:
    """Of placing: with all processes; with those alone that the orders need."""
    found = [number(shard.p50_ms) if shard else "overloaded" for shard in (one.shard, one.tight_shard)]
    return "; ".join(found) + " ms"


def _batches(shard: Simulated | None) -> str:
    return f"{number(shard.placed_together)}; {number(shard.checked_out_together)}" if shard else "-"


_MACHINES: Final[Mapping[str, Callable[[Plan], str]]] = {
    "order shards; inventory shards": lambda one: f"{whole(one.order_shards)}; {whole(one.inventory_shards)}",
    "cores busy with orders": lambda one: number(one.order_cores),
    "the same with all services in each process": lambda one: number(one.together_cores),
    "cores busy with reads of the catalogue, at most": lambda one: number(one.read_cores),
    "machines for gateway and services": lambda one: whole(one.service_machines),
    "machines for NATS": lambda one: whole(one.nats_servers),
    "PostgreSQL: primaries; with standbys": lambda one: f"{whole(one.primaries)}; {whole(one.database_servers)}",
    "PostgreSQL: replicas for reads": lambda one: whole(one.read_replicas),
    "sessions of a PostgreSQL server": lambda one: whole(one.sessions) + (", PgBouncer" if one.needs_pooler else ""),
    "WAL a second": lambda one: f"{number(math.fsum(each.wal_mb_per_second for each in one.databases))} MB",
    "a day: WAL; disk": lambda one: f"{size(one.wal_tb_per_day)}; {size(one.disk_tb_per_day)}",
    "the feed, kept for a week": lambda one: size(one.feed_tb),
    "NATS messages a second": lambda one: number(one.nats_messages_per_second),
    "network: clients; services; PostgreSQL; standbys": lambda one: _gbit(
        one, "clients", "between services", "to PostgreSQL", "to standbys"
    ),
    "p50 of placing, simulated; no process to spare": _p50,
    "orders in a batch: placing; checkout": lambda one: _batches(one.shard),
}


def _assumed(question: Question) -> str:
    lines, zones = question.lines, question.zones
    return (
        f"Paid orders with {lines} line{'s' if lines > 1 else ''}; use {question.use:.0%}; "
        f"{zones} zone{'s, of which one may be lost' if zones > 1 else ''}; machines with {question.cores} cores, "
        f"for PostgreSQL {DATABASE_CORES}; a commit {question.commit_ms:g} ms; {question.reads:g} reads an order."
    )


def _machines(plans: Sequence[Plan]) -> Table:
    rows = [(name, *(of(one) for one in plans)) for name, of in _MACHINES.items()]
    return Table("Machines", ("paid orders a second", *_rates(plans)), tuple(rows), _assumed(plans[0].question))


def _rates(plans: Sequence[Plan]) -> Iterator[str]:
    return (number(one.question.orders_per_second) for one in plans)


def _services(plans: Sequence[Plan]) -> Table:
    """A service has the same place in each plan."""
    rows: list[tuple[str, ...]] = []
    for place, service in enumerate(plans[0].services):
        of = [f"{whole(one.services[place].processes)} ({number(one.services[place].cores_busy)})" for one in plans]
        needed = [next((number(db.primaries) for db in one.databases if db.name == service.name), "-") for one in plans]
        rows.append((service.name, *of, *needed))
    header = (
        "service",
        *(f"processes at {rate}" for rate in _rates(plans)),
        *(f"primaries at {r}" for r in _rates(plans)),
    )
    about = "Processes in all zones (cores that are busy); primaries that the databases need: a fraction shares one."
    return Table("Processes and databases by service", header, tuple(rows), about)


def _changed(found: Report) -> Table:
    middle = found.plans[len(found.plans) // 2]
    named = [("as planned", middle), *((each.name, each.plan) for each in found.changed)]
    rows = [
        (
            name,
            f"{whole(one.order_shards)}; {whole(one.inventory_shards)}",
            whole(one.service_machines),
            whole(one.database_servers),
            whole(one.read_replicas),
            _p50(one),
        )
        for name, one in named
    ]
    header = ("what if", "shards", "service machines", "PostgreSQL", "replicas", "p50; no process to spare")
    about = f"At {number(middle.question.orders_per_second)} orders a second, one assumption changed at a time."
    return Table("What if", header, tuple(rows), about)
