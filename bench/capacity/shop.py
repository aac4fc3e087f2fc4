"""A shop in the simulation: how orders go through it, a batch at a time. Times are microseconds.

As in the product: a gateway collects requests into batches for `orders.place` while two are in flight
(`mercato/chassis/rpc/batching.py`); orders looks up users and products, writes the orders, answers, and gives them to
two lanes of checkout (`mercato/chassis/sagas/runner.py`). Sizes, lanes and pauses are those of the code.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import msgspec
import simpy

from mercato import topology
from mercato.chassis.messaging.consumers import Pace
from mercato.chassis.sagas.runner import BATCH_SIZE, GATHER_SECONDS, LANES
from mercato.contracts.orders import Orders

from .costs import CALLED, CHECKOUT, DATABASE, PLACING, Costs, Step
from .machine import Cores, Database, Flow, Loop, Wal

T = TypeVar("T")

GATEWAY: Final = "gateway"
NATS: Final = "nats"
LOAD: Final = "load generator"
"""Its CPU is none of the shop's."""
SERVICES: Final = (GATEWAY, *topology.SERVICES)


class Order:
    """An order, by the connection of its client."""

    __slots__ = ("connection", "due_at")

    def __init__(self, connection: int, due_at: float) -> None:
        self.connection = connection
        self.due_at = due_at


class Process:
    """A process with some of the services."""

    def __init__(self, env: simpy.Environment, cores: Cores, name: str, services: Sequence[str]) -> None:
        self.loop = Loop(env, cores, name)
        self.services = frozenset(services)


Placement = Sequence[tuple[str, Sequence[str]]]
"""A name and the services of each process. Processes with one name count together."""


def together(workers: int = 1) -> Placement:
    """Processes that have all services (`mercato up --workers`)."""
    return [("shop", SERVICES)] * workers


def split(processes: Mapping[str, int] | None = None) -> Placement:
    """Processes that have one service each."""
    return [(name, (name,)) for name in SERVICES for _ in range((processes or {}).get(name, 1))]


class Machine(msgspec.Struct, frozen=True):
    """What the shop runs on. `cores` None: as many as there are processes."""

    cores: int | None
    flush_us: float
    commit_delay_us: float = 0.0


class Shop:
    """All processes and databases. `answered` gets the orders of a batch as they are answered."""

    def __init__(self, costs: Costs, placement: Placement, machine: Machine, seed: int) -> None:
        self.env = simpy.Environment()
        self.costs = costs
        self.cores = Cores(self.env, machine.cores, seed)
        self.answered: Callable[[Sequence[Order]], None] = lambda orders: None
        self.placed = self.done = 0
        self.done_at = 0.0
        self.batches: defaultdict[str, int] = defaultdict(int)
        self.items: defaultdict[str, int] = defaultdict(int)
        """Of batches, by step."""
        self.calls = 0
        """Between processes; a request and an answer each."""
        self._random = random.Random(seed)
        self.wal = Wal(self.env, machine.flush_us, machine.commit_delay_us)
        self.databases = {name: Database(self.env, name, self.wal) for name in topology.SERVICES}
        self._processes = [Process(self.env, self.cores, name, services) for name, services in placement]
        self._orders = {p: OrdersProcess(self, p) for p in self._hosts("orders")}
        self.gateways = [Gateway(self, process) for process in self._hosts(GATEWAY)]
        for consumer, sources in topology.READS.items():
            for source in sources:
                self.env.process(self._consume(consumer, source))

    def _hosts(self, service: str) -> list[Process]:
        return [process for process in self._processes if service in process.services]

    def host(self, service: str, caller: Process) -> Process:
        """The process that a call goes to: the caller's own where it has the service."""
        return caller if service in caller.services else self._random.choice(self._hosts(service))

    def orders(self, process: Process) -> OrdersProcess:
        return self._orders[process]

    def hop(self, source: Process, target: Process, size: int) -> Flow:
        """A message for a batch from one process to another; none within one."""
        if source is target:
            return
        self.calls += 1
        sixth = self.costs.hop_us / 6
        yield source.loop.run(sixth)
        yield from self.cores.run(NATS, sixth + size * self.costs.nats_us / 2)
        if self.costs.network_us:
            yield self.env.timeout(2 * self.costs.network_us)
        yield target.loop.run(sixth)

    def transaction(self, process: Process, step: Step, size: int) -> Flow:
        """A step for a batch, in the process of its service."""
        costs, database = self.costs, self.databases[step.database]
        self.batches[step.name] += 1
        self.items[step.name] += size
        yield process.loop.run(costs.message_shop_us + size * step.shop_us)
        yield from self._travel()
        rows = database.rows.request() if step.has_same_rows else None
        if rows:
            yield rows
        yield from self.cores.run(database.cpu_name, costs.message_database_us + size * step.database_us)
        if step.messages > 1:
            yield from self._travel()
            yield process.loop.run(costs.message_shop_us)
            yield from self._travel()
            outbox = database.outbox.request() if step.has_events else None
            if outbox:
                yield outbox
            yield from self.cores.run(database.cpu_name, costs.message_database_us)
            yield database.wal.commit()
            if outbox:
                database.outbox.release(outbox)
        if rows:
            database.rows.release(rows)
        yield from self._travel()

    def _travel(self) -> Flow:
        if self.costs.network_us:
            yield self.env.timeout(self.costs.network_us)

    def call(self, caller: Process, name: str, size: int) -> Flow:
        """A step in the service that has it."""
        step = self.costs.steps[name]
        target = self.host(step.database, caller)
        yield from self.hop(caller, target, size)
        yield from self.transaction(target, step, size)
        if name == "intent":  # payments goes on with the provider, outside of its transaction, and records the result
            yield from self.call(target, "charge", size)
            yield from self.transaction(target, self.costs.steps["record"], size)
        yield from self.hop(target, caller, size)

    def _consume(self, consumer: str, source: str) -> Flow:
        """A consumer reads what a source has written since it read last. The feed's CPU is shared by its sources."""
        [process, *_] = self._hosts(consumer)
        writes = sum(step.has_events and step.database == source for step in self.costs.steps.values())
        share = writes / sum(step.has_events for step in self.costs.steps.values()) if consumer == "events" else 0.0
        database, seen = self.databases[consumer], 0
        while writes:
            yield self.env.timeout(Pace().gather_s * 1e6)
            new, seen = self.placed - seen, self.placed
            if new:
                yield process.loop.run(new * share * self.costs.feed_shop_us)
                yield from self.cores.run(database.cpu_name, new * share * self.costs.feed_database_us)
                yield database.wal.commit()


class Gateway:
    """Takes requests, and collects them into batches for orders while as many as may be are in flight."""

    def __init__(self, shop: Shop, process: Process) -> None:
        self._shop = shop
        self._process = process
        self._arrived: list[Order] = []
        self._queue: deque[Order] = deque()
        self._in_flight = 0

    def arrive(self, orders: Sequence[Order]) -> None:
        """Requests that have reached the socket: the event loop reads all that are there when it comes to them."""
        is_first = not self._arrived
        self._arrived.extend(orders)
        if is_first:
            self._shop.env.process(self._read())

    def _read(self) -> Flow:
        taken: list[Order] = []

        def cost() -> float:
            taken.extend(self._arrived)
            self._arrived.clear()
            return len(taken) * self._shop.costs.gateway_us / 2

        yield self._process.loop.run_later(cost)
        self._queue.extend(taken)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and self._in_flight < Orders.place.lanes:
            self._in_flight += 1
            self._shop.env.process(self._place(list(_taken(self._queue, Orders.place.size))))

    def _place(self, batch: Sequence[Order]) -> Flow:
        shop, size = self._shop, len(batch)
        target = shop.host("orders", self._process)
        yield from shop.hop(self._process, target, size)
        yield from shop.orders(target).place(size)
        yield from shop.hop(target, self._process, size)
        self._in_flight -= 1
        self._dispatch()
        # uvloop sends what is written in a turn of the loop at the end of that turn: all answers of a batch at once.
        yield self._process.loop.run(size * shop.costs.gateway_us / 2)
        shop.answered(batch)


class OrdersProcess:
    """The service orders in one process: placing, and the lanes of checkout."""

    def __init__(self, shop: Shop, process: Process) -> None:
        self._shop = shop
        self._process = process
        self._waiting: deque[int] = deque()
        """A mark for each order whose checkout has not begun."""
        self._next_start = 0.0
        self._idle: list[simpy.Event] = []
        for _ in range(LANES):
            shop.env.process(self._lane())

    def place(self, size: int) -> Flow:
        shop, process = self._shop, self._process
        lookups = [shop.env.process(shop.call(process, name, size)) for name in PLACING if name in CALLED]
        yield shop.env.all_of(lookups)
        yield from shop.transaction(process, shop.costs.steps["place"], size)
        shop.placed += size
        self._waiting.extend(range(size))
        for lane in self._idle:
            lane.succeed()
        self._idle.clear()

    def _lane(self) -> Flow:
        shop = self._shop
        while True:
            if not self._waiting:
                idle = shop.env.event()
                self._idle.append(idle)
                yield idle
            elif len(self._waiting) < BATCH_SIZE and self._next_start > shop.env.now:
                yield shop.env.timeout(self._next_start - shop.env.now)
            else:
                self._next_start = shop.env.now + GATHER_SECONDS * 1e6
                size = len(list(_taken(self._waiting, BATCH_SIZE)))
                for name in CHECKOUT[shop.costs.kind]:
                    if name in CALLED and DATABASE[name] != "sandbox":  # the provider is called by payments
                        yield from shop.call(self._process, name, size)
                yield from shop.transaction(self._process, shop.costs.steps["save"], size)
                shop.done += size
                shop.done_at = shop.env.now


def _taken(queue: deque[T], at_most: int) -> Iterator[T]:
    for _ in range(min(at_most, len(queue))):
        yield queue.popleft()
