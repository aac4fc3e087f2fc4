"""The plan: shards, processes, machines, servers, storage, network and messages for so many paid orders a second.

All of it is extrapolated: measured CPU, WAL and disk of an order, times orders, divided by the use that is aimed at.
Latency and messages are those of a simulation of one shard with its processes, each on a core of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from bench.throughput.figures import Result
from mercato.chassis.hosting.settings import Settings
from mercato.chassis.messaging.events import KEPT_DAYS

from . import assumptions, inputs, limits
from .assumptions import DATABASE_CORES, PEAK_TO_MEAN, SESSIONS, SIGN_INS, WAL_MB_PER_SECOND, Question
from .costs import CALLED, Costs
from .limits import Limit
from .load import Load, Outcome, Overloaded
from .shop import Machine, split

POOL: Final[int] = Settings.model_fields["pool_size"].default
"""Connections of a process to its database."""
CALLS: Final = 1 + len(CALLED)
"""That a paid order is in: `orders.place`, and those that follow from it."""
POOLED: Final = ("gateway", "products")
"""Services whose processes work for all shards: the gateway has no database, the catalogue is the same for all."""
NATS_SERVERS: Final = 3
"""At least: a stream with three copies."""
DAY_SECONDS: Final = 86_400
SIMULATED_ORDERS: Final = 3_000
SIMULATED_SECONDS: Final = (0.5, 3.0)
"""Of one shard: so long that there are so many orders, between these."""


class Service(msgspec.Struct, frozen=True):
    """The processes of a service."""

    name: str
    cores_busy: float
    """At the peak, with reads of the catalogue and sign-ins."""
    shards: int
    needed: int
    """Processes that the orders of an order shard need, without reads and sign-ins."""
    processes: int
    """In all shards and zones: each shard has those that its share needs, also when any one zone is lost."""


class DatabaseLoad(msgspec.Struct, frozen=True):
    """The databases of a service. Without reads of the catalogue, which go to replicas."""

    name: str
    databases: int
    """One for each shard."""
    cores_busy: float
    wal_mb_per_second: float
    primaries: float
    """Servers that they need; a fraction shares one with other databases."""


class Simulated(msgspec.Struct, frozen=True):
    """One order shard at its share of the peak. Latency is that of the answer to `POST /orders`."""

    p50_ms: float
    p99_ms: float
    placed_together: float
    """Orders in a batch of placing."""
    checked_out_together: float
    """Orders in a batch of checkout."""
    commits_per_second: float
    calls: float
    """Between processes, for each order."""
    busiest: str
    busiest_use: float
    """Of its core."""


class Plan(msgspec.Struct, frozen=True):
    """For one rate. Figures a second are those of the peak."""

    question: Question
    order_shards: int
    inventory_shards: int
    services: tuple[Service, ...]
    order_cores: float
    """Busy with orders, at the peak: services, NATS and PostgreSQL."""
    together_cores: float
    """The same if each process had all services: no call would leave it."""
    read_cores: float
    """Busy with reads of the catalogue, at most: services and PostgreSQL."""
    service_machines: int
    nats_servers: int
    nats_messages_per_second: float
    databases: tuple[DatabaseLoad, ...]
    primaries: int
    database_servers: int
    """Primaries with their standbys."""
    read_replicas: int
    """Of the catalogue, on servers of their own; 0: the primary answers the reads too."""
    sessions: int
    """Of the processes, for each primary; of those of products, for each replica, where these are more."""
    needs_pooler: bool
    network_gbit_per_second: Mapping[str, float]
    disk_tb_per_day: float
    wal_tb_per_day: float
    feed_tb: float
    """That is kept."""
    shard: Simulated | None
    """With all of its processes. None: it does not finish its work."""
    tight_shard: Simulated | None
    """With no process more than its orders need."""


def plan(result: Result, question: Question, message_us: float) -> Plan:
    cost = limits.of_paid_orders(result, question, message_us)
    found = limits.limits(result, question, cost)
    order_shards = _shards(found, "order shard", question)
    inventory_shards = _shards(found, "inventory shard", question)
    services = _services(result, question, order_shards, inventory_shards)
    busy = math.fsum(service.cores_busy for service in services)
    databases = _databases(result, question, services)
    servers = math.fsum(one.primaries for one in databases)
    primaries, replicas = math.ceil(servers), _read_replicas(result, question, servers)
    sessions = _sessions(services, primaries, replicas)
    needed = {service.name: service.needed for service in services}
    running = {name: with_spare(number, question.zones) for name, number in needed.items()}
    shard = _simulated(question, cost, running, order_shards)
    return Plan(
        question=question,
        order_shards=order_shards,
        inventory_shards=inventory_shards,
        services=services,
        order_cores=_order_us(result, question) * question.orders_per_second / 1e6,
        together_cores=_together_us(result, question) * question.orders_per_second / 1e6,
        read_cores=question.orders_per_second * question.reads * sum(inputs.read_us(result)) * question.slower / 1e6,
        service_machines=with_spare(math.ceil(busy / (question.use * question.cores)), question.zones),
        nats_servers=_nats_servers(result, question),
        nats_messages_per_second=_messages(result, question, shard),
        databases=databases,
        primaries=primaries,
        database_servers=primaries * max(2, question.zones),
        read_replicas=replicas,
        sessions=sessions,
        needs_pooler=sessions > SESSIONS,
        network_gbit_per_second=_network(result, question),
        disk_tb_per_day=_per_day(question, result.rows["paid"].disk_bytes),
        wal_tb_per_day=_per_day(question, math.fsum(limits.wal_bytes(result, question).values())),
        feed_tb=_per_day(question, result.rows["paid"].disk_bytes_by_database["events"]) * KEPT_DAYS,
        shard=shard,
        tight_shard=_simulated(question, cost, needed, order_shards),
    )


def with_spare(needed: int, zones: int) -> int:
    """So many that enough are left when a zone is lost; with one zone, when one of them is."""
    return needed + 1 if zones == 1 else zones * math.ceil(needed / (zones - 1))


def _shards(found: Sequence[Limit], scope: limits.Scope, question: Question) -> int:
    return math.ceil(question.orders_per_second / (question.use * limits.carried(found, scope)))


# ------------------------------------------------------------------------------------------------ processes, databases


def _services(result: Result, question: Question, order_shards: int, inventory_shards: int) -> tuple[Service, ...]:
    rate = question.orders_per_second
    orders = {name: us * rate / 1e6 for name, us in limits.services_us(result, question).items() if name != "nats"}
    busy, (read_us, _) = dict(orders), inputs.read_us(result)
    busy["products"] += rate * question.reads * read_us * question.slower / 1e6
    busy["users"] += rate * SIGN_INS * inputs.hash_us(result) * question.slower / 1e6
    found: list[Service] = []
    for name, cores in busy.items():
        shards = 1 if name in POOLED else inventory_shards if name == "inventory" else order_shards
        found.append(
            Service(
                name=name,
                cores_busy=cores,
                shards=shards,
                needed=math.ceil(orders[name] / order_shards / question.use),
                processes=with_spare(math.ceil(cores / shards / question.use), question.zones) * shards,
            )
        )
    return tuple(found)


def _databases(result: Result, question: Question, services: Sequence[Service]) -> tuple[DatabaseLoad, ...]:
    cpu, wal = limits.databases_us(result, question), limits.wal_bytes(result, question)
    rate = question.orders_per_second
    found: list[DatabaseLoad] = []
    for service in services:
        if (name := service.name) in cpu:
            cores, mb = cpu[name] * rate / 1e6, wal[name] * rate / 1e6
            primaries = max(cores / DATABASE_CORES, mb / WAL_MB_PER_SECOND) / question.use
            found.append(DatabaseLoad(name, service.shards, cores, mb, primaries))
    return tuple(found)


def _together_us(result: Result, question: Question) -> float:
    """Measured, but for further lines, which cost in proportion what they cost in services that are apart."""
    one_line = _order_us(result, msgspec.structs.replace(question, lines=1))
    return result.cpu_us["paid"].total * question.slower * _order_us(result, question) / one_line


def _order_us(result: Result, question: Question) -> float:
    of = (*limits.services_us(result, question).values(), *limits.databases_us(result, question).values())
    return math.fsum(of)


def _read_replicas(result: Result, question: Question, primaries: float) -> int:
    """None where the reads fit on the one primary; `primaries`: what of servers is needed without them."""
    busy = question.orders_per_second * question.reads * inputs.read_us(result)[1] * question.slower / 1e6
    needed = busy / (question.use * DATABASE_CORES)
    return 0 if primaries + needed <= 1 else with_spare(math.ceil(needed), question.zones)


def _sessions(services: Sequence[Service], primaries: int, replicas: int) -> int:
    """The most that a server has, if the databases are spread evenly over the primaries."""
    of = {service.name: service.processes * POOL for service in services if service.name != "gateway"}
    reading = of.pop("products")
    if not replicas:
        return math.ceil((sum(of.values()) + reading) / primaries)
    return max(math.ceil(sum(of.values()) / primaries), math.ceil(reading / replicas))


# ------------------------------------------------------------------------------------------- network, messages, storage


def _nats_servers(result: Result, question: Question) -> int:
    busy = limits.services_us(result, question)["nats"] * question.orders_per_second / 1e6
    return max(NATS_SERVERS, with_spare(math.ceil(busy / (question.use * question.cores)), question.zones))


def _messages(result: Result, question: Question, shard: Simulated | None) -> float:
    """Two for each call between processes, and one for each event in the stream."""
    calls = shard.calls if shard else float(CALLS)
    return question.orders_per_second * (2 * calls + inputs.events_of_a_paid_order(result))


def _network(result: Result, question: Question) -> dict[str, float]:
    """Both ways, by kind of connection."""
    wal_kb = math.fsum(limits.wal_bytes(result, question).values()) / 1e3
    kb = {
        "clients": assumptions.HTTP_ORDER_KB + question.reads * assumptions.HTTP_READ_KB,
        "between services": CALLS * assumptions.MESSAGE_KB,
        "to PostgreSQL": assumptions.STATEMENT_KB,
        "to standbys": wal_kb * (max(2, question.zones) - 1),
    }
    return {name: question.orders_per_second * each * 8 / 1e6 for name, each in kb.items()}


def _per_day(question: Question, of_an_order: float) -> float:
    """Terabytes, from bytes of an order."""
    return question.orders_per_second / PEAK_TO_MEAN * DAY_SECONDS * of_an_order / 1e12


# ------------------------------------------------------------------------------------------------------------ one shard


def _simulated(question: Question, cost: Costs, processes: Mapping[str, int], shards: int) -> Simulated | None:
    """One order shard with an inventory shard for itself."""
    rate, (low, high) = question.orders_per_second / shards, SIMULATED_SECONDS
    load = Load(cost, split(processes), Machine(None, question.commit_ms * 1e3))
    try:
        outcome = load.random(rate, min(high, max(low, SIMULATED_ORDERS / rate)))
    except Overloaded:
        return None
    uses = {name: outcome.cpu_us[name] * rate / 1e6 / number for name, number in processes.items()}
    return _of(outcome, rate, uses)


def _of(outcome: Outcome, rate: float, uses: Mapping[str, float]) -> Simulated:
    busiest = max(uses, key=lambda name: uses[name])
    return Simulated(
        p50_ms=outcome.latency_us(0.5) / 1e3,
        p99_ms=outcome.latency_us(0.99) / 1e3,
        placed_together=outcome.batch_sizes["place"],
        checked_out_together=outcome.batch_sizes["save"],
        commits_per_second=outcome.commits * rate,
        calls=outcome.calls,
        busiest=busiest,
        busiest_use=uses[busiest],
    )
