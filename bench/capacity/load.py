"""Loads on a simulated shop, and what came of them. Times are microseconds unless their names say otherwise.

A closed loop sends the next request of a connection when the last one is answered; an open one sends at a rate whatever
the answers do. As in the benchmark, an order counts when its work is done: its stock is held, or it is paid.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from .costs import Costs
from .machine import Flow, Loop
from .shop import LOAD, Machine, Order, Placement, Shop

DRAIN_SECONDS: Final = 30.0
"""Work that is not done so long after a load is an overload."""


class Overloaded(Exception):
    """The shop does not finish the work of a load in time."""


class Outcome(msgspec.Struct, frozen=True):
    """What came of a load."""

    answers_per_second: float
    drain_seconds: float
    """From the end of the load until all of its work was done."""
    latencies_us: Sequence[float]
    """Of answers, ascending."""
    cpu_us: Mapping[str, float]
    """For each order, by process and database; without the load generator."""
    batch_sizes: Mapping[str, float]
    """Orders in a batch, by step."""
    calls: float
    """Between processes, for each order."""
    commits: float
    """For each order."""

    def latency_us(self, share: float) -> float:
        """0.5: the median."""
        return self.latencies_us[min(len(self.latencies_us) - 1, int(len(self.latencies_us) * share))]

    def rate(self, seconds: float) -> float:
        """Orders a second until their work is done, of a load that takes so long."""
        return self.answers_per_second * seconds / (seconds + self.drain_seconds)

    @property
    def total_us(self) -> float:
        return math.fsum(self.cpu_us.values())


class Load:
    """One load on one shop. `load_us`: CPU of the load generator for a request; 0: clients are on other machines."""

    def __init__(
        self, costs: Costs, placement: Placement, machine: Machine, *, load_us: float = 0.0, seed: int = 1
    ) -> None:
        self._shop = Shop(costs, placement, machine, seed)
        self._shop.answered = self._answered
        self._env = self._shop.env
        self._client = Loop(self._env, self._shop.cores, LOAD)
        self._load_us = load_us
        self._random = random.Random(seed)
        self._latencies: list[float] = []
        self._sent = 0
        self._end = 0.0
        self._is_closed = False

    def closed(self, connections: int, seconds: float) -> Outcome:
        """`connections` are spread evenly over the gateways."""
        self._is_closed = True
        self._end = seconds * 1e6
        for connection in range(connections):
            self._env.process(self._send([connection], self._env.now))
        return self._finished(seconds)

    def fixed(self, per_second: float, seconds: float) -> Outcome:
        """Requests are due at fixed moments, as those of the benchmark at half of the capacity."""
        return self._open(lambda: 1e6 / per_second, seconds)

    def random(self, per_second: float, seconds: float) -> Outcome:
        """Requests come independently of each other."""
        return self._open(lambda: self._random.expovariate(per_second) * 1e6, seconds)

    def _open(self, pause_us: Callable[[], float], seconds: float) -> Outcome:
        self._end = seconds * 1e6
        self._env.process(self._arrivals(pause_us))
        return self._finished(seconds)

    def _arrivals(self, pause_us: Callable[[], float]) -> Flow:
        while self._env.now < self._end:
            self._env.process(self._send([self._sent], self._env.now))
            yield self._env.timeout(pause_us())

    def _send(self, connections: Sequence[int], due_at: float) -> Flow:
        gateways = self._shop.gateways
        self._sent += len(connections)
        if self._load_us:
            yield self._client.run(len(connections) * self._load_us / 2)
        by_gateway: dict[int, list[Order]] = {}
        for connection in connections:
            number = connection % len(gateways)
            by_gateway.setdefault(number, []).append(Order(connection, due_at))
        for number, orders in by_gateway.items():
            gateways[number].arrive(orders)

    def _answered(self, orders: Sequence[Order]) -> None:
        self._env.process(self._receive(orders))

    def _receive(self, orders: Sequence[Order]) -> Flow:
        if self._load_us:
            yield self._client.run(len(orders) * self._load_us / 2)
        now = self._env.now
        self._latencies.extend(now - order.due_at for order in orders)
        if self._is_closed and now < self._end:
            yield from self._send([order.connection for order in orders], now)

    def _finished(self, seconds: float) -> Outcome:
        """Runs to the end of the load, and on until its work is done. Raises `Overloaded`."""
        shop = self._shop
        self._env.run(until=self._end)
        while shop.done < self._sent:
            self._env.step()
            if self._env.now > self._end + DRAIN_SECONDS * 1e6:
                raise Overloaded(
                    f"of {self._sent} orders in {seconds:g} s {shop.done} are done {DRAIN_SECONDS:g} s later"
                )
        spent = {name: us / self._sent for name, us in shop.cores.spent_us.items() if name != LOAD}
        return Outcome(
            answers_per_second=self._sent / seconds,
            drain_seconds=max(0.0, shop.done_at - self._end) / 1e6,
            latencies_us=sorted(self._latencies),
            cpu_us=spent,
            batch_sizes={name: shop.items[name] / number for name, number in shop.batches.items()},
            calls=shop.calls / 2 / self._sent,
            commits=shop.wal.commits / self._sent,
        )
