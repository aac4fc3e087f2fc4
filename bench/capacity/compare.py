"""Calibrates the simulation on a part of what was measured, predicts the rest, and compares.

Calibrated: CPU of an order by process and database with the sizes of batches while it was counted (`costs.py`), and one
figure, what a message to PostgreSQL costs besides the orders in it: so much that a simulated order over one connection
takes as long as a measured one. That latency and that CPU have to come out again; everything else is predicted with the
same costs, and nothing has a factor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec

from bench.throughput.figures import Result
from bench.throughput.plan import CONNECTIONS, MOST_CONNECTIONS

from . import costs, inputs
from .inputs import CASES, KINDS, Kind
from .load import Load, Outcome
from .shop import Machine, Placement, split, together

BOUND: Final = 0.30
"""How far a figure may be from what was measured, as a share of that; rounds of one load differ by as much."""
HALF_BOUND: Final = 0.60
"""The same for latency at half of the capacity, which the model gives too low (docs/capacity.md)."""
SECONDS: Final = 1.0
"""Of a simulated load; the benchmark's are three times as long, and their drain counts so much less."""
ONE_CONNECTION_SECONDS: Final = 2.0
"""The same over one connection, which sends few orders."""
CALIBRATION_SECONDS: Final = 1.0
TRIES: Final = 8
"""Of the calibration, which ends when the latency is right to a thousandth; it takes three or four."""


class Figure(msgspec.Struct, frozen=True):
    """A figure that was measured, and the same of the simulation."""

    kind: Kind
    name: str
    unit: str
    measured: float
    simulated: float
    bound: float
    is_calibrated: bool = False
    """The simulation was calibrated with it: it has to come out again, and predicts nothing."""

    @property
    def deviation(self) -> float:
        return self.simulated / self.measured - 1

    @property
    def holds(self) -> bool:
        return abs(self.deviation) <= self.bound


class Comparison(msgspec.Struct, frozen=True):
    """`message_us`: what a message to PostgreSQL costs PostgreSQL, as calibrated; the shop pays its share on top."""

    message_us: float
    figures: tuple[Figure, ...]

    def violations(self) -> list[str]:
        """A sentence for each figure beyond its bound."""
        return [
            f"{one.kind}, {one.name}: {one.simulated:.4g} {one.unit} simulated, {one.measured:.4g} measured, "
            f"{one.deviation:+.0%} where the bound is {one.bound:.0%}"
            for one in self.figures
            if not one.holds
        ]


def compare(result: Result) -> Comparison:
    message_us = calibrated(result)
    return Comparison(message_us, tuple(_figures(result, message_us)))


def calibrated(result: Result) -> float:
    """The cost of a message with which the median latency of placing over one connection is the measured one."""
    wanted = inputs.median(result, "place", 1, "p50_us")
    assert wanted, "checked when the result was read"
    # Latency rises nearly in proportion: each try goes on along the line through zero and the last one.
    message_us = round(wanted / 10, 1)
    for _ in range(TRIES):
        load = _load(result, costs.together(result, "placed", message_us), together(), 1)
        p50 = load.closed(1, CALIBRATION_SECONDS).latency_us(0.5)
        if abs(p50 / wanted - 1) < 0.001:
            break
        message_us = round(message_us * wanted / p50, 1)
    return message_us


def _simulated(
    result: Result, cost: costs.Costs, placement: Placement, connections: int, *, commit_delay_us: float = 0.0
) -> Outcome:
    """A closed loop on the machine of the benchmark."""
    seconds = ONE_CONNECTION_SECONDS if connections == 1 else SECONDS
    return _load(result, cost, placement, connections, commit_delay_us).closed(connections, seconds)


def _load(result: Result, cost: costs.Costs, placement: Placement, connections: int, delay_us: float = 0.0) -> Load:
    machine = Machine(result.machine.cores, result.machine.fsync_us, delay_us)
    return Load(cost, placement, machine, load_us=inputs.load_us(result, CASES[cost.kind], connections))


def _figures(result: Result, message_us: float) -> Iterator[Figure]:
    for kind in KINDS:
        one = costs.together(result, kind, message_us)
        measured = [n for n in CONNECTIONS if inputs.median(result, CASES[kind], n, "rate")]
        found = {n: _simulated(result, one, together(), n) for n in measured}
        yield from _closed_loops(result, kind, found)
        yield from _batches(result, kind, found[MOST_CONNECTIONS])
        yield from _half_of_capacity(result, one)
        yield from _slow_commits(result, one)
        yield _split(result, message_us, found[MOST_CONNECTIONS], kind)


def _closed_loops(result: Result, kind: Kind, found: dict[int, Outcome]) -> Iterator[Figure]:
    case = CASES[kind]
    for connections, outcome in found.items():
        over = _connections(connections)
        if rate := inputs.median(result, case, connections, "rate"):
            yield Figure(kind, f"rate, {over}", "/s", rate, outcome.rate(inputs.load_seconds(result)), BOUND)
        if p50 := inputs.median(result, case, connections, "p50_us"):
            is_calibrated = (kind, connections) == ("placed", 1)
            simulated = outcome.latency_us(0.5) / 1e3
            yield Figure(kind, f"p50, {over}", "ms", p50 / 1e3, simulated, BOUND, is_calibrated)


def _batches(result: Result, kind: Kind, outcome: Outcome) -> Iterator[Figure]:
    """Whether batches grow as they did: the costs assume the measured sizes, and the simulation finds its own."""
    placing, over = inputs.BatchSizes.of(result, kind).placing, _connections(MOST_CONNECTIONS)
    yield Figure(kind, f"orders in a batch of placing, {over}", "", placing, outcome.batch_sizes["place"], BOUND)
    yield Figure(kind, f"CPU of an order, {over}", "us", result.cpu_us[kind].total, outcome.total_us, BOUND, True)


def _half_of_capacity(result: Result, cost: costs.Costs) -> Iterator[Figure]:
    for fixed in result.raw.fixed_rate:
        if (fixed.subject, fixed.case) == ("mercato", CASES[cost.kind]):
            load = _load(result, cost, together(), MOST_CONNECTIONS)
            p50 = load.fixed(fixed.requests_per_second, SECONDS).latency_us(0.5)
            name = "p50, half of the capacity"
            yield Figure(cost.kind, name, "ms", fixed.latency_us.p50 / 1e3, p50 / 1e3, HALF_BOUND)


def _slow_commits(result: Result, cost: costs.Costs) -> Iterator[Figure]:
    """A lone commit took `lone_commit_us` with its message; the rest of that is the delay and the flush."""
    message_us, flush_us = cost.message_shop_us + cost.message_database_us, result.machine.fsync_us
    for slow in result.raw.commit_latency:
        if slow.case != CASES[cost.kind] or not result.raw.lone_commit_us:
            continue
        workers, connections = slow.workers or 1, slow.connections
        delay = max(0.0, result.raw.lone_commit_us - message_us - flush_us)
        found = _simulated(result, cost, together(workers), connections, commit_delay_us=delay)
        by = f"{workers} worker{'s' if workers > 1 else ''}"
        name = f"rate, commits {slow.milliseconds:g} ms slower, {by}, {_connections(connections)}"
        yield Figure(cost.kind, name, "/s", slow.rate, found.rate(inputs.load_seconds(result)), BOUND)


def _connections(number: int) -> str:
    return f"{number} connection{'s' if number > 1 else ''}"


def _split(result: Result, message_us: float, one: Outcome, kind: Kind) -> Figure:
    found = _simulated(result, costs.split(result, kind, message_us), split(), MOST_CONNECTIONS)
    ratio = found.rate(inputs.load_seconds(result)) / one.rate(inputs.load_seconds(result))
    return Figure(kind, "rate split over NATS, by that of one process", "", inputs.SPLIT_RATIOS[kind], ratio, BOUND)


def largest(comparison: Comparison) -> float:
    """The largest deviation of a prediction, of those with the common bound."""
    return max(abs(one.deviation) for one in comparison.figures if one.bound == BOUND and not one.is_calibrated)


def mean(comparison: Comparison) -> float:
    """The mean of the deviations of all predictions, without their signs."""
    found = [abs(one.deviation) for one in comparison.figures if not one.is_calibrated]
    return math.fsum(found) / len(found)
