"""What was measured, as the simulation takes it: `bench/results/latest.json`, and the figures of `make bench-split`.

The second are in no file: they are those of the table "Each service as a process of its own" in `docs/performance.md`,
of another run on two cores. A test compares them with that page. Times are microseconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from bench.throughput.figures import Cpu, Result, TableRows
from bench.throughput.plan import FULL, MOST_CONNECTIONS, QUICK, Case

ROOT: Final = Path(__file__).parents[2]
LATEST: Final = ROOT / "bench" / "results" / "latest.json"

Kind = Literal["placed", "paid"]
"""Of an order: `latest.json` calls the costs so, and the loads `place` and `pay`."""

KINDS: Final[tuple[Kind, ...]] = ("placed", "paid")
CASES: Final[Mapping[Kind, Case]] = {"placed": "place", "paid": "pay"}
DATABASES: Final = ("users", "products", "orders", "inventory", "payments", "sandbox", "events")

SPLIT_SERVICES_US: Final[Mapping[str, float]] = {
    "gateway": 118.0,
    "orders": 154.0,
    "events": 125.0,
    "payments": 68.0,
    "inventory": 58.0,
    "products": 43.0,
    "sandbox": 37.0,
    "users": 57.0,
}
"""CPU of a paid order by process, each service a process of its own over NATS. `events` also publishes the feed to
JetStream. Source: docs/performance.md."""
SPLIT_NATS_US: Final = 173.0
"""CPU of the NATS server for a paid order. Source: docs/performance.md."""
SPLIT_DATABASES_US: Final[Mapping[str, float]] = {"orders": 101.0, "payments": 56.0, "inventory": 50.0, "events": 26.0}
SPLIT_OTHER_DATABASES_US: Final = 44.0
"""Of users, products and sandbox together. Source: docs/performance.md."""
SPLIT_TOTALS_US: Final[Mapping[Kind, tuple[float, float]]] = {"placed": (357.0, 731.0), "paid": (543.0, 1119.0)}
"""CPU of an order in one process, and split over NATS, of the same run. Source: docs/performance.md."""
SPLIT_RATIOS: Final[Mapping[Kind, float]] = {"placed": 0.80, "paid": 0.75}
"""Orders a second split over NATS, by those of one process; 128 connections. Source: docs/performance.md."""
HOP_US: Final = 770.0
"""A call over NATS to another process and back, with a row read. Source: docs/performance.md (0.77 ms)."""


class CannotRead(Exception):
    """A sentence: which figures are missing, and where."""


def read(file: Path = LATEST) -> Result:
    """A result of `make bench`. Raises `CannotRead` where it has not the figures that the model begins with."""
    try:
        result = msgspec.json.decode(file.read_bytes(), type=Result)
    except OSError as error:
        raise CannotRead(f"{file} cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise CannotRead(f"{file} is no result of make bench: {error}") from None
    loads = {(r.case, r.connections) for r in result.raw.readings if r.subject == "mercato"}
    missing = [
        *(
            f"the cost of an order that is {kind}"
            for kind in KINDS
            if {kind} - result.cpu_us.keys() & result.rows.keys()
        ),
        *(
            f"{case} over {n} connections"
            for case in CASES.values()
            for n in (1, MOST_CONNECTIONS)
            if (case, n) not in loads
        ),
    ]
    if missing:
        raise CannotRead(f"{file} lacks {missing[0]}: run make bench without --only")
    return result


def median(result: Result, case: Case, connections: int, by: str) -> float | None:
    """Of a field of Mercato's readings, over the rounds; None where there is none."""
    found = [
        float(getattr(reading, by))
        for reading in result.raw.readings
        if (reading.subject, reading.case, reading.connections) == ("mercato", case, connections)
    ]
    return statistics.median(found) if found else None


def load_seconds(result: Result) -> float:
    """How long each of its loads took."""
    return QUICK.load_seconds if result.quick else FULL.load_seconds


def load_us(result: Result, case: Case, connections: int) -> float:
    """CPU of the load generator for a request, as measured with so many connections, or with the most."""
    found = median(result, case, connections, "load_cpu_us")
    return found or median(result, case, MOST_CONNECTIONS, "load_cpu_us") or 0.0


def databases_us(cpu: Cpu) -> dict[str, float]:
    """CPU of PostgreSQL for an order by database. Processes that work for all are shared out in proportion."""
    own = {name: cpu.postgres.get(name, 0.0) for name in DATABASES}
    all_of_them = cpu.postgres_total / math.fsum(own.values())
    return {name: us * all_of_them for name, us in own.items()}


def writes(row: TableRows) -> float:
    """Rows and index entries that an order writes in a table: what work on tables is shared out by."""
    return row.inserted + row.updated + row.deleted + row.index_entries


def writes_by_database(result: Result, kind: Kind) -> dict[str, float]:
    tables = result.rows[kind].tables
    return {
        name: math.fsum(writes(row) for table, row in tables.items() if table.startswith(f"{name}."))
        for name in DATABASES
    }


class BatchSizes(msgspec.Struct, frozen=True):
    """Orders in a batch while CPU was counted, over 128 connections."""

    placing: float
    checkout: float

    @classmethod
    def of(cls, result: Result, kind: Kind) -> BatchSizes:
        """Each transaction with events writes one row of an outbox, and the feed has one row for each of them.

        A placed order has two such transactions: place and reserve. A paid one has five: place and, in its checkout,
        reserve, record, commit and save; of these place and save write the outbox of orders.
        """
        tables = result.rows[kind].tables
        orders, feed = tables["orders.outbox"].inserted, tables["events.feed"].inserted
        if kind == "placed":
            return cls(placing=1 / orders, checkout=1 / (feed - orders))
        checkout = 3 / (feed - orders)
        return cls(placing=1 / (orders - 1 / checkout), checkout=checkout)


def events_of_a_paid_order(result: Result) -> int:
    """From the rows of `feed_types`, which has one for each type in a row of the feed."""
    batches, tables = BatchSizes.of(result, "paid"), result.rows["paid"].tables
    return 1 + round((tables["events.feed_types"].inserted - 1 / batches.placing) * batches.checkout)


def read_us(result: Result) -> tuple[float, float]:
    """CPU of a read of the catalogue at most: of the shop's one process, and of PostgreSQL.

    CPU was not counted while browsing. At the most connections one process answers so many reads a second, so none
    takes it longer than that; what is left of the cores, less the load generator, is the most that PostgreSQL had.
    """
    rate = median(result, "browse", MOST_CONNECTIONS, "rate")
    if not rate:
        raise CannotRead("the result has no reads of the catalogue: run make bench without --only")
    shop = 1e6 / rate
    return shop, max(0.0, result.machine.cores * shop - shop - load_us(result, "browse", MOST_CONNECTIONS))


def hash_us(result: Result) -> float:
    """CPU of a sign-in at most: on two cores one thread hashes, and so many it has hashed while one client browsed."""
    hashed = [each.sign_ins for each in result.raw.flooded if each.connections == 1]
    if not hashed:
        raise CannotRead("the result has no sign-ins: run make bench without --only")
    return load_seconds(result) * 1e6 / max(hashed)
