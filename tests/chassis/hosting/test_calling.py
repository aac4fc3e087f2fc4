"""What a process says about the services that it calls: breakers, retry budgets, calls in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Context,
    Contract,
    Empty,
    Operation,
    Retry,
    Unavailable,
    batched,
    current,
)
from mercato.chassis.hosting.host import Host
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.client import acting
from mercato.chassis.rpc.limits import CallLimits
from mercato.chassis.rpc.retrying import BUDGET_ADVANCE
from mercato.chassis.rpc.stats import CalleeStats
from mercato.testing.waiting import until_true

CALL_SECONDS = 3_600.0


class Things(Contract, name="things"):
    read = batched(Empty, Empty, allow=frozenset({"anonymous"}), retry=Retry.SAFE)
    write = batched(Empty, Empty, allow=frozenset({"anonymous"}))


class Elsewhere:
    """Other processes: they answer once `release` is set, and not at all while `is_down`."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.is_down = False
        self.sent = 0

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        self.sent += 1
        await self.release.wait()
        if self.is_down:
            raise Unavailable(service=operation.service)
        return [Empty() for _ in requests]


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest_asyncio.fixture
async def hosted(elsewhere: Elsewhere) -> AsyncGenerator[Callable[[CallLimits], Host]]:
    """Makes the host of a process that serves nothing and calls `elsewhere`."""
    made: list[Host] = []

    def make(limits: CallLimits) -> Host:
        made.append(Host({}, {}, secrets={}, transport=lambda _: elsewhere, limits=limits))
        return made[-1]

    token = current.set(acting(ANONYMOUS_ACTOR, clock=Host({}, {}, secrets={}).clock, seconds=CALL_SECONDS))
    yield make
    current.reset(token)
    elsewhere.release.set()
    for host in made:
        await host.close()


def sample(host: Host, name: str, **labels: str) -> float | None:
    return host.telemetry.registry.get_sample_value(name, {"service": "things", **labels})


async def test_calls_in_flight_and_what_may_be_repeated_are_shown(
    hosted: Callable[[CallLimits], Host], elsewhere: Elsewhere
):
    host = hosted(CallLimits())
    things = host.client(Things)
    assert host.callees() == []

    reading = asyncio.gather(*(things.read(Empty()) for _ in range(3)))
    await until_true(lambda: elsewhere.sent == 1)

    assert host.callees() == [CalleeStats("things", "reads", "closed", 3, BUDGET_ADVANCE)]
    assert sample(host, "mercato_calls_in_flight", operations="reads") == 3
    assert sample(host, "mercato_rpc_retry_budget") == BUDGET_ADVANCE
    elsewhere.release.set()
    await reading
    assert host.callees() == [CalleeStats("things", "reads", "closed", 0, BUDGET_ADVANCE)]
    assert sample(host, "mercato_calls_in_flight", operations="reads") == 0


async def test_a_breaker_that_opens_is_shown_for_its_operations_alone(
    hosted: Callable[[CallLimits], Host], elsewhere: Elsewhere
):
    host = hosted(CallLimits(minimum_calls=1, retry_share=0.0))
    things = host.client(Things)
    elsewhere.release.set()
    await things.write(Empty())
    assert host.open_breakers() == []

    elsewhere.is_down = True
    with pytest.raises(Unavailable):
        await things.read(Empty())

    assert host.open_breakers() == ["things"]
    assert [(c.operations, c.breaker, c.retry_budget) for c in host.callees()] == [
        ("reads", "open", 0.0),
        ("writes", "closed", 0.0),
    ]
    assert sample(host, "mercato_breaker_open", operations="reads") == 1
    assert sample(host, "mercato_breaker_changes_total", operations="reads", state="open") == 1
    assert sample(host, "mercato_rpc_retries_refused_total") == 1
    elsewhere.is_down = False
    await things.write(Empty())
