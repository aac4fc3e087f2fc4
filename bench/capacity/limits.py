"""What saturates first: the most orders a second of each part that cannot be multiplied. Extrapolated, not measured.

Cores and processes can be added. What cannot: the core of the one process that writes the feed, the locks of a
database, the log and the cores of one PostgreSQL server. CPU of the parts is that of `make bench-split` and of
`latest.json`; how long a lock is held follows from it, from the time of a commit and from the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from bench.throughput.figures import Result
from mercato.contracts.inventory import Inventory

from . import costs, inputs
from .assumptions import DATABASE_CORES, FLUSHES, FULL_PAGES, NETWORK_MS, WAL_MB_PER_SECOND, Question
from .costs import Costs

BATCH: Final = Inventory.reserve.size
"""Orders in a full batch."""

Scope = Literal["order shard", "inventory shard", "server"]
"""What there must be more of where the limit is reached. An order shard has a database of orders, payments, users and
events each, for some of the users; an inventory shard has some of the products."""


class Limit(msgspec.Struct, frozen=True):
    """`per_second`: paid orders with the whole of it in use."""

    name: str
    scope: Scope
    per_second: float


def lines_factor(result: Result, question: Question, database: str) -> float:
    """How many times what an order of one line costs in a service and its database."""
    share = {**costs.line_shares(result), "products": 1.0, "gateway": costs.line_shares(result)["orders"]}
    return 1 + (question.lines - 1) * share.get(database, 0.0)


def services_us(result: Result, question: Question) -> dict[str, float]:
    """CPU of a paid order by process, each service a process of its own; `nats` among them."""
    own = {**inputs.SPLIT_SERVICES_US, "nats": inputs.SPLIT_NATS_US}
    times = costs.split_scale(result) * question.slower
    return {name: us * times * lines_factor(result, question, name) for name, us in own.items()}


def databases_us(result: Result, question: Question) -> dict[str, float]:
    """CPU of a paid order by database, while each service is a process of its own."""
    us = costs.split_databases_us(result)
    return {name: one * question.slower * lines_factor(result, question, name) for name, one in us.items()}


def wal_bytes(result: Result, question: Question) -> dict[str, float]:
    """WAL of a paid order by database. The whole was measured, and is shared out by rows and index entries."""
    writes = inputs.writes_by_database(result, "paid")
    of_all = math.fsum(writes.values())
    whole = result.rows["paid"].wal_bytes * FULL_PAGES
    return {name: whole * own / of_all * lines_factor(result, question, name) for name, own in writes.items()}


def of_paid_orders(result: Result, question: Question, message_us: float) -> Costs:
    """The costs of the simulation on the machines of the plan."""
    cost = costs.with_lines(costs.split(result, "paid", message_us), result, question.lines)
    return msgspec.structs.replace(costs.slower(cost, question.slower), network_us=NETWORK_MS * 1e3)


def limits(result: Result, question: Question, cost: Costs) -> list[Limit]:
    """In ascending order."""
    server_us = math.fsum(databases_us(result, question).values())
    wal = math.fsum(wal_bytes(result, question).values())
    found = (
        Limit(
            "one process writes the feed and publishes it", "order shard", 1e6 / services_us(result, question)["events"]
        ),
        Limit(
            "each charge is booked on the same rows of payments.accounts",
            "order shard",
            _locked(cost, question, "record"),
        ),
        Limit(
            "one commit of orders at a time: the outbox lock", "order shard", _locked(cost, question, "place", "save")
        ),
        Limit(
            "stock of one product, or batches that all meet",
            "inventory shard",
            _locked(cost, question, "reserve", "commit"),
        ),
        Limit(f"WAL of a server: {WAL_MB_PER_SECOND:g} MB/s", "server", WAL_MB_PER_SECOND * 1e6 / wal),
        Limit(f"CPU of a server: {DATABASE_CORES} cores", "server", DATABASE_CORES * 1e6 / server_us),
    )
    return sorted(found, key=lambda limit: limit.per_second)


def carried(found: Sequence[Limit], scope: Scope) -> float:
    """Orders a second of one of these, at full use."""
    return min(limit.per_second for limit in found if limit.scope == scope)


def _locked(cost: Costs, question: Question, *steps: str) -> float:
    """Orders a second of full batches, of which each holds a lock for so long in each of these steps."""
    return BATCH * 1e6 / math.fsum(held_us(cost, question, step) for step in steps)


def held_us(cost: Costs, question: Question, name: str) -> float:
    """How long a full batch holds its lock. Rows are locked from the first statement on, and so also while COMMIT is
    on its way; the outbox only while it is executed."""
    step = cost.steps[name]
    commit = cost.message_database_us + FLUSHES * question.commit_ms * 1e3
    if not step.has_same_rows:
        return commit
    statement = cost.message_database_us + BATCH * step.database_us
    return statement + cost.message_shop_us + 2 * cost.network_us + commit
