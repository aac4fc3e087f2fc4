"""What the figures are: the shape of `bench/results/latest.json`, and the arithmetic from measurements to it.

Nothing here measures. A figure that could not be measured is null.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from bench.throughput.plan import MOST_CONNECTIONS, Case, Subject

DIGITS: Final = 3

# -------------------------------------------------------------------------------------------------------- measurements


class Latency(msgspec.Struct, frozen=True):
    """Of all answers of a load, in microseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Loaded(msgspec.Struct, frozen=True):
    """What the load generator says of a load."""

    requests: int
    good: int
    """Answers that were as they must be."""
    distinct_ids: int
    failures: tuple[str, ...]
    began_at: float
    """Unix seconds."""
    seconds: float
    """From the beginning to the last answer."""
    latency_us: Latency
    kinds_us: Mapping[str, Latency]
    load_cpu_us: float
    """CPU of the load generator itself, for each request."""
    refused: int = 0
    """Where refusals are expected: answers with 429 or 503 and Retry-After, in none of the latencies above."""
    refused_us: Latency | None = None
    kinds_good: Mapping[str, int] = {}


class Reading(msgspec.Struct, frozen=True):
    """One load of one round."""

    round: int
    subject: Subject
    case: Case
    connections: int
    answers: int
    answers_per_second: float
    rate: float
    """What the ratios are made of: orders a second until all of them are held or paid; answers a second otherwise."""
    p50_us: float
    p99_us: float
    kinds_p50_us: Mapping[str, float]
    load_cpu_us: float


class TableCount(msgspec.Struct, frozen=True):
    """Counters of a table since its database was made, or the difference of two of them."""

    inserted: int
    updated: int
    hot_updated: int
    deleted: int
    indexes: int

    def since(self, before: TableCount | None) -> TableCount:
        if before is None:
            return self
        return TableCount(
            inserted=self.inserted - before.inserted,
            updated=self.updated - before.updated,
            hot_updated=self.hot_updated - before.hot_updated,
            deleted=self.deleted - before.deleted,
            indexes=self.indexes,
        )


class Counted(msgspec.Struct, frozen=True):
    """What a server has written so far. Tables are named `database.table`."""

    wal_bytes: int
    disk_bytes: Mapping[str, int]
    commits: Mapping[str, int]
    tables: Mapping[str, TableCount]


class Cost(msgspec.Struct, frozen=True):
    """CPU time of one load by process and database, nanoseconds."""

    orders: int
    shop: Mapping[str, int]
    postgres: Mapping[str, int]


# ------------------------------------------------------------------------------------------------------------- results


class Ratios(msgspec.Struct, frozen=True):
    """Mercato divided by the reference, both measured in turns; the median of the rounds."""

    placed: float | None
    """Orders with their stock held, a second; the reference: its bare inserts. At the most connections."""
    paid: float | None
    """Orders carried to `paid`, a second; the reference: its bare inserts. At the most connections."""
    one_product: float | None
    """Paid orders that are all for one product, by paid orders spread over the catalogue: both of Mercato."""
    p50_one_connection: float | None
    """Median latency of `POST /orders` without payment, over one connection. Less is better, unlike the others."""
    browse: float | None
    """Lists, searches and single products a second. At the most connections."""


class Cpu(msgspec.Struct, frozen=True):
    """Microseconds of CPU for each order."""

    total: float
    shop_total: float
    postgres_total: float
    shop: Mapping[str, float]
    """By process."""
    postgres: Mapping[str, float]
    """By database; `(name)`: a process of the server that works for all of them."""


class TableRows(msgspec.Struct, frozen=True):
    """Rows of a table for each order."""

    inserted: float
    updated: float
    hot_updated: float
    deleted: float
    index_entries: float


class Rows(msgspec.Struct, frozen=True):
    """What an order writes."""

    orders: int
    """Of how many it is the mean."""
    inserted: float
    updated: float
    hot_updated: float
    deleted: float
    index_entries: float
    """At most: every row inserted, and every update that is not HOT, counts an entry in each index of its table."""
    commits: float
    wal_bytes: float
    disk_bytes: float
    disk_bytes_by_database: Mapping[str, float]
    tables: Mapping[str, TableRows]
    """Those with at least one row in a hundred orders."""


class Machine(msgspec.Struct, frozen=True):
    """Where it was measured. No path, and no name of a host or a person."""

    measured_on: str
    cpu: str
    cores: int
    memory_gb: float
    system: str
    python: str
    postgres: str
    go: str | None
    fsync_us: float
    """Median of writing and syncing 8 KiB in the folder of the databases."""
    load_average: float
    """Of a minute, before the run: how busy the machine was with other things."""


class FixedRate(msgspec.Struct, frozen=True):
    """A load at half of what the shop had carried in the rounds."""

    subject: Subject
    case: Case
    requests_per_second: float
    latency_us: Latency


class CommitLatency(msgspec.Struct, frozen=True):
    """Orders a second while each commit takes `milliseconds` longer."""

    subject: Subject
    case: Case
    workers: int | None
    connections: int
    milliseconds: float
    rate: float


class Flooded(msgspec.Struct, frozen=True):
    """Browsing alone, and then or before beside a flood of sign-ins: median latency, microseconds."""

    round: int
    connections: int
    alone_us: float
    beside_us: float
    sign_ins: int
    """While it was browsed: those that were answered with 200 or 401, which cost a hash each."""
    limited: int
    """The others: 429, or 504 where no thread was free in time."""

    @property
    def ratio(self) -> float:
        return self.beside_us / self.alone_us


class Observed(msgspec.Struct, frozen=True):
    """Orders a second of a shop with traces, metrics and logs, and of the same shop without them; in turns."""

    round: int
    case: Case
    connections: int
    on: float
    off: float

    @property
    def ratio(self) -> float:
        return self.on / self.off


class Audit(msgspec.Struct, frozen=True):
    """The audit after all loads."""

    invariants: int
    violated: tuple[str, ...]
    rows: int
    orders: int


class Raw(msgspec.Struct, frozen=True):
    """What the other figures are made of."""

    readings: tuple[Reading, ...]
    ratios_by_connections: Mapping[str, Mapping[str, tuple[float, float, float]]]
    """By case and connections: the lowest, the median and the highest of the rounds."""
    p50_us_one_connection: Mapping[str, float]
    fixed_rate: tuple[FixedRate, ...]
    commit_latency: tuple[CommitLatency, ...]
    lone_commit_us: float | None
    """How long a commit took while commits were made slower; null where that was not measured."""
    costs: Mapping[str, tuple[Cost, ...]]
    audit: Audit
    flooded: tuple[Flooded, ...] = ()
    observed: tuple[Observed, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """`bench/results/latest.json`. `cpu_us` and `rows` have `placed`, `paid` and, where there is one, `reference`."""

    quick: bool
    commit: str
    ratios: Ratios
    cpu_us: Mapping[str, Cpu]
    rows: Mapping[str, Rows]
    raw: Raw
    machine: Machine


# ---------------------------------------------------------------------------------------------------------- arithmetic


def ratios(readings: Sequence[Reading]) -> Ratios:
    """The ratios of a run; null where one of the two was not measured."""
    most = MOST_CONNECTIONS
    return Ratios(
        placed=_median(paired(readings, "place", "place", most)),
        paid=_median(paired(readings, "pay", "place", most)),
        one_product=_median(paired(readings, "one_product", "pay", most, of="mercato")),
        p50_one_connection=_median(paired(readings, "place", "place", 1, by="p50_us")),
        browse=_median(paired(readings, "browse", "browse", most)),
    )


def paired(
    readings: Sequence[Reading],
    case: Case,
    other: Case,
    connections: int,
    *,
    by: str = "rate",
    of: Subject = "reference",
) -> tuple[float, ...]:
    """Mercato's `case` divided by the `other` case of `of`, round by round: what changes between rounds cancels out."""
    above = _by_round(readings, "mercato", case, connections, by)
    below = _by_round(readings, of, other, connections, by)
    return tuple(above[n] / below[n] for n in sorted(above.keys() & below.keys()) if below[n])


def ratios_by_connections(readings: Sequence[Reading]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """The lowest, the median and the highest of the rounds, by case and number of connections."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    cases: tuple[tuple[str, Case, Case, Subject], ...] = (
        ("placed", "place", "place", "reference"),
        ("paid", "pay", "place", "reference"),
        ("one_product", "one_product", "pay", "mercato"),
        ("browse", "browse", "browse", "reference"),
    )
    for name, case, other, of in cases:
        for connections in sorted({reading.connections for reading in readings}):
            if values := paired(readings, case, other, connections, of=of):
                spread = (min(values), statistics.median(values), max(values))
                found.setdefault(name, {})[str(connections)] = _rounded(spread)
    return found


def p50_us_one_connection(readings: Sequence[Reading]) -> dict[str, float]:
    """Median latency over one connection: of both shops' placing, and of Mercato's paid orders."""
    found = {
        "reference": median_rate(readings, "reference", "place", 1, by="p50_us"),
        "placed": median_rate(readings, "mercato", "place", 1, by="p50_us"),
        "paid": median_rate(readings, "mercato", "pay", 1, by="p50_us"),
    }
    return {name: us for name, us in found.items() if us}


def median_rate(readings: Sequence[Reading], subject: Subject, case: Case, connections: int, by: str = "rate") -> float:
    """Over the rounds; 0 where there is none."""
    return statistics.median(_by_round(readings, subject, case, connections, by).values() or [0.0])


def cpu(costs: Sequence[Cost]) -> Cpu:
    """Microseconds an order, by process and by database: those of the median load, so that they add up."""
    assert costs, "there was a load"
    each = sorted((_cpu(cost) for cost in costs), key=lambda cpu: cpu.total)
    return each[(len(each) - 1) // 2]


def _cpu(cost: Cost) -> Cpu:
    shop = {name: _per_order(ns / 1e3, cost.orders) for name, ns in cost.shop.items()}
    postgres = {name: _per_order(ns / 1e3, cost.orders) for name, ns in cost.postgres.items()}
    shop_total = _per_order(sum(cost.shop.values()) / 1e3, cost.orders)
    postgres_total = _per_order(sum(cost.postgres.values()) / 1e3, cost.orders)
    return Cpu(
        total=round(shop_total + postgres_total, DIGITS),
        shop_total=shop_total,
        postgres_total=postgres_total,
        shop=_largest_first(shop),
        postgres=_largest_first(postgres),
    )


def rows(before: Counted, after: Counted, orders: int) -> Rows:
    """What each of `orders` orders has written between two counts."""
    tables = {name: count.since(before.tables.get(name)) for name, count in after.tables.items()}
    disk = {name: size - before.disk_bytes.get(name, 0) for name, size in after.disk_bytes.items()}
    commits = sum(after.commits.values()) - sum(before.commits.values())

    def mean(value: str) -> float:
        return _per_order(sum(getattr(count, value) for count in tables.values()), orders)

    return Rows(
        orders=orders,
        inserted=mean("inserted"),
        updated=mean("updated"),
        hot_updated=mean("hot_updated"),
        deleted=mean("deleted"),
        index_entries=_per_order(sum(map(index_entries, tables.values())), orders),
        commits=_per_order(commits, orders),
        wal_bytes=_per_order(after.wal_bytes - before.wal_bytes, orders),
        disk_bytes=_per_order(sum(disk.values()), orders),
        disk_bytes_by_database=_largest_first({name: _per_order(size, orders) for name, size in disk.items()}),
        tables={
            name: TableRows(
                inserted=_per_order(count.inserted, orders),
                updated=_per_order(count.updated, orders),
                hot_updated=_per_order(count.hot_updated, orders),
                deleted=_per_order(count.deleted, orders),
                index_entries=_per_order(index_entries(count), orders),
            )
            for name, count in sorted(tables.items())
            if (count.inserted + count.updated + count.deleted) * 100 >= orders
        },
    )


def index_entries(count: TableCount) -> int:
    """How many index entries these changes of a table have made at most. A HOT update makes none."""
    return (count.inserted + count.updated - count.hot_updated) * count.indexes


def spent(before: Mapping[int, int], after: Mapping[int, int], names: Mapping[int, str]) -> dict[str, int]:
    """The CPU time between two readings by process id, summed by name. What was not there before began at zero."""
    found: dict[str, int] = {}
    for pid, ns in after.items():
        name = names.get(pid, "(other)")
        found[name] = found.get(name, 0) + max(0, ns - before.get(pid, 0))
    return {name: ns for name, ns in found.items() if ns}


def _by_round(readings: Sequence[Reading], subject: Subject, case: Case, connections: int, by: str) -> dict[int, float]:
    return {
        reading.round: getattr(reading, by)
        for reading in readings
        if (reading.subject, reading.case, reading.connections) == (subject, case, connections)
    }


def _rounded(spread: tuple[float, float, float]) -> tuple[float, float, float]:
    low, median, high = spread
    return round(low, DIGITS), round(median, DIGITS), round(high, DIGITS)


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), DIGITS) if values else None


def _per_order(value: float, orders: int) -> float:
    return round(value / orders, DIGITS)


def _largest_first(values: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(values.items(), key=lambda item: (-item[1], item[0])))
