"""What the steps of an order cost in the simulation, from what was measured. Times are microseconds.

A step is a transaction for a batch. It costs a fixed part, for each message to PostgreSQL, and a part for each order.
The fixed part is the one figure that is calibrated (`calibrate.py`): a message takes `message_us` of PostgreSQL, and of
the shop as much more as its CPU is more than PostgreSQL's for the same order. The part for each order is what the
measured CPU leaves, with batches of the sizes that were measured with it.

Of the shop's one process only the whole was measured. The gateway has the share that it has where each service is a
process of its own; the rest is shared out in proportion to the CPU of the databases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from bench.throughput.figures import Result

from . import inputs
from .inputs import BatchSizes, Kind

DIGITS: Final = 3
"""Costs are rounded, so that the last bit of a sum changes nothing."""

DATABASE: Final[Mapping[str, str]] = {
    "users": "users",
    "products": "products",
    "place": "orders",
    "reserve": "inventory",
    "intent": "payments",
    "charge": "sandbox",
    "record": "payments",
    "commit": "inventory",
    "save": "orders",
}
"""The steps of an order, with the service and database of each (`mercato/services/orders/placing.py`, `checkout.py`;
`mercato/services/payments/charging.py`)."""
PLACING: Final = ("users", "products", "place")
CHECKOUT: Final[Mapping[Kind, tuple[str, ...]]] = {
    "placed": ("reserve", "save"),
    "paid": ("reserve", "intent", "charge", "record", "commit", "save"),
}
READS: Final = ("users", "products")
"""One message, and nothing to flush. A transaction that writes has two: a statement, and COMMIT with the events."""
CALLED: Final = ("users", "products", "reserve", "intent", "charge", "commit")
"""Steps that begin with a call of another service; `record` follows in the service that `intent` has called."""
SAME_ROWS: Final = ("reserve", "record", "commit")
"""Transactions that wait for each other from their first statement on: of two batches for 1 000 products some are for
the same, and each charge is booked on the same rows of `payments.accounts`."""


class Step(msgspec.Struct, frozen=True):
    """A transaction for a batch. `shop_us` and `database_us`: for each order of it."""

    name: str
    database: str
    shop_us: float
    database_us: float
    messages: int
    has_events: bool
    has_same_rows: bool


class Costs(msgspec.Struct, frozen=True):
    """Of orders of one kind, in one placement."""

    kind: Kind
    steps: Mapping[str, Step]
    gateway_us: float
    """For each order; half of it for the request, half for the answer."""
    message_shop_us: float
    message_database_us: float
    feed_shop_us: float
    feed_database_us: float
    """Of the feed, for each order: its consumer takes all that came meanwhile at once."""
    hop_us: float = 0.0
    """For each call to another process and back, besides what the orders in it cost; 0: there is one process."""
    nats_us: float = 0.0
    """Of the NATS server, for each order in such a call and back."""
    network_us: float = 0.0
    """From one machine to another, one way; 0: there is one machine."""


def together(result: Result, kind: Kind, message_us: float) -> Costs:
    """Everything in one process."""
    cpu = result.cpu_us[kind]
    databases = inputs.databases_us(cpu)
    split = inputs.SPLIT_SERVICES_US
    gateway = split["gateway"] / math.fsum(split.values()) * result.cpu_us["paid"].shop_total
    ratio = (cpu.shop_total - gateway) / cpu.postgres_total
    services = {name: us * ratio for name, us in databases.items()}
    return _costs(result, kind, message_us, ratio, gateway, services, databases)


def split(result: Result, kind: Kind, message_us: float) -> Costs:
    """Each service a process of its own, over NATS.

    The CPU by process and database is that of `make bench-split`, scaled to this run by the CPU of a paid order in one
    process. It was counted for paid orders; a placed one has the steps that it shares with them.
    """
    scale = split_scale(result)
    services = {name: us * scale for name, us in inputs.SPLIT_SERVICES_US.items()}
    databases = split_databases_us(result)
    one = together(result, "paid", message_us)
    ratio = one.message_shop_us / one.message_database_us
    hop = inputs.HOP_US - one.message_shop_us - one.message_database_us
    found = _costs(result, "paid", message_us, ratio, services["gateway"], services, databases, hop_us=hop)
    calls = _calls("paid", BatchSizes.of(result, "paid"))
    nats = max(0.0, (inputs.SPLIT_NATS_US * scale - calls.fixed * hop / 3) / calls.orders)
    found = msgspec.structs.replace(found, nats_us=round(nats, DIGITS))
    return found if kind == "paid" else _as_placed(found, one, together(result, "placed", message_us))


def split_scale(result: Result) -> float:
    """From the run of `make bench-split` to this one: a paid order in one process was measured in both."""
    return result.cpu_us["paid"].total / inputs.SPLIT_TOTALS_US["paid"][0]


def split_databases_us(result: Result) -> dict[str, float]:
    """CPU of a paid order by database; what was measured of three of them together is shared out as in one process."""
    paid = inputs.databases_us(result.cpu_us["paid"])
    others = {name: paid[name] for name in inputs.DATABASES if name not in inputs.SPLIT_DATABASES_US}
    share = inputs.SPLIT_OTHER_DATABASES_US / math.fsum(others.values())
    counted = {**inputs.SPLIT_DATABASES_US, **{name: us * share for name, us in others.items()}}
    return {name: us * split_scale(result) for name, us in counted.items()}


class _Calls(msgspec.Struct, frozen=True):
    """Between processes, for an order."""

    orders: int
    """Calls that an order is in."""
    fixed: float
    """Calls by orders in each: what of a call's fixed part an order bears."""


def _calls(kind: Kind, batches: BatchSizes) -> _Calls:
    """The call of orders by the gateway, and those of `CALLED`."""
    placing = 1 + sum(name in CALLED for name in PLACING)
    checkout = sum(name in CALLED for name in CHECKOUT[kind])
    return _Calls(placing + checkout, placing / batches.placing + checkout / batches.checkout)


def _as_placed(paid: Costs, one_paid: Costs, one_placed: Costs) -> Costs:
    """The costs of placed orders: what differs from paid ones differs in proportion as it does in one process."""

    def scaled(us: float, placed: float, whole: float) -> float:
        return round(us * placed / whole, DIGITS) if whole else us

    save, one, other = paid.steps["save"], one_paid.steps["save"], one_placed.steps["save"]
    waiting = msgspec.structs.replace(
        save,
        shop_us=scaled(save.shop_us, other.shop_us, one.shop_us),
        database_us=scaled(save.database_us, other.database_us, one.database_us),
        has_events=False,
    )
    kept = {name: step for name, step in paid.steps.items() if name in (*PLACING, *CHECKOUT["placed"])}
    return msgspec.structs.replace(
        paid,
        kind="placed",
        steps={**kept, "save": waiting},
        feed_shop_us=scaled(paid.feed_shop_us, one_placed.feed_shop_us, one_paid.feed_shop_us),
        feed_database_us=scaled(paid.feed_database_us, one_placed.feed_database_us, one_paid.feed_database_us),
    )


def _costs(
    result: Result,
    kind: Kind,
    message_us: float,
    ratio: float,
    gateway_us: float,
    services: Mapping[str, float],
    databases: Mapping[str, float],
    hop_us: float = 0.0,
) -> Costs:
    batches = BatchSizes.of(result, kind)
    shares = _shares(result, kind)
    steps: dict[str, Step] = {}
    for name in (*PLACING, *CHECKOUT[kind]):
        size = batches.placing if name in PLACING else batches.checkout
        messages = 1 if name in READS else 2
        database = DATABASE[name]
        fixed_hop = _hops_of(name) * hop_us / 3
        shop = services[database] * shares[name] - (messages * message_us * ratio + fixed_hop) / size
        own = databases[database] * shares[name] - messages * message_us / size
        steps[name] = Step(
            name=name,
            database=database,
            shop_us=round(max(0.0, shop), DIGITS),
            database_us=round(max(0.0, own), DIGITS),
            messages=messages,
            has_events=name in ("place", "reserve", "record", "commit") or (name == "save" and kind == "paid"),
            has_same_rows=name in SAME_ROWS,
        )
    return Costs(
        kind=kind,
        steps=steps,
        gateway_us=round(max(0.0, gateway_us - hop_us / 3 / batches.placing), DIGITS),
        message_shop_us=round(message_us * ratio, DIGITS),
        message_database_us=message_us,
        feed_shop_us=round(services["events"], DIGITS),
        feed_database_us=round(databases["events"], DIGITS),
        hop_us=round(hop_us, DIGITS),
    )


def _hops_of(name: str) -> int:
    """In how many calls the service of a step takes part for it, as caller or called: each has a third of a hop."""
    if name == "place":
        return 1 + sum(step in CALLED for step in PLACING)
    if name == "save":
        return 3  # reserve, charge and commit are called by orders
    return {"intent": 2, "record": 0}.get(name, 1)


def _shares(result: Result, kind: Kind) -> dict[str, float]:
    """What each step has of the CPU of its database. Two transactions of one database have halves, but for orders.

    Placing costs the same in both kinds. Of placed orders the other transaction of orders only updates the saga, and
    has the share which that has of all rows and index entries.
    """
    placed = result.rows["placed"].tables
    saga = placed["orders.sagas"]
    updates = saga.updated + saga.index_entries * saga.updated / (saga.updated + saga.inserted)
    place = 1 - updates / inputs.writes_by_database(result, "placed")["orders"]
    if kind == "paid":
        one = inputs.databases_us(result.cpu_us["placed"])["orders"]
        place = place * one / inputs.databases_us(result.cpu_us["paid"])["orders"]
        halves = dict.fromkeys(("reserve", "commit", "intent", "record"), 0.5)
        return {"users": 1.0, "products": 1.0, "place": place, "save": 1 - place, "charge": 1.0, **halves}
    return {"users": 1.0, "products": 1.0, "place": place, "save": 1 - place, "reserve": 1.0}


def with_lines(costs: Costs, result: Result, lines: int) -> Costs:
    """The costs of orders with so many lines; the benchmark's have one.

    Not measured: each further line costs what the tables with a row for each line (`LINE_TABLES`) have of the rows and
    index entries of their database; prices are read for each line; the gateway has the share that orders has.
    """
    shares = {**line_shares(result), "products": 1.0}

    def more(us: float, database: str) -> float:
        return round(us * (1 + (lines - 1) * shares.get(database, 0.0)), DIGITS)

    steps = {
        name: msgspec.structs.replace(
            step, shop_us=more(step.shop_us, step.database), database_us=more(step.database_us, step.database)
        )
        for name, step in costs.steps.items()
    }
    return msgspec.structs.replace(costs, steps=steps, gateway_us=more(costs.gateway_us, "orders"))


LINE_TABLES: Final = ("orders.order_products", "inventory.levels")


def line_shares(result: Result) -> dict[str, float]:
    """Of all writes of a database, those that an order makes once more for each further line."""
    of_all = inputs.writes_by_database(result, "paid")
    tables = result.rows["paid"].tables
    return {
        name.partition(".")[0]: inputs.writes(tables[name]) / of_all[name.partition(".")[0]] for name in LINE_TABLES
    }


def slower(costs: Costs, times: float) -> Costs:
    """The same on cores that take `times` as long."""
    steps = {
        name: msgspec.structs.replace(step, shop_us=step.shop_us * times, database_us=step.database_us * times)
        for name, step in costs.steps.items()
    }
    fields = (
        "gateway_us",
        "message_shop_us",
        "message_database_us",
        "feed_shop_us",
        "feed_database_us",
        "hop_us",
        "nats_us",
    )
    return msgspec.structs.replace(costs, steps=steps, **{name: getattr(costs, name) * times for name in fields})
