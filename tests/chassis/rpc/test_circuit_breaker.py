"""The circuit breaker: its states by example (random walks: `tests/models`); what fails a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from chassis.rpc.breakers import MINIMUM, OPEN, PROBE, WINDOW, ManualClock, breaker_with
from mercato.chassis.contract import (
    ANONYMOUS,
    Context,
    Contract,
    DeadlineExceeded,
    Empty,
    Internal,
    Overloaded,
    ServiceError,
    Unavailable,
    batched,
)
from mercato.chassis.rpc.circuit_breaker import BUCKETS, JITTER_SHARE, Breaker, BreakingTransport, Permit, State


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def breaker(clock: ManualClock) -> Breaker:
    return breaker_with(clock)


def trip(breaker: Breaker) -> None:
    for _ in range(MINIMUM):
        breaker.admit().failed()
    assert breaker.state is State.OPEN


def refused_for(breaker: Breaker) -> int | None:
    with pytest.raises(Unavailable) as refused:
        breaker.admit()
    assert refused.value.service == "stock"
    return refused.value.retry_after_s


# ------------------------------------------------------------------------------------------------------------ closed


def test_it_opens_when_enough_calls_were_made_and_half_of_them_failed(breaker: Breaker):
    breaker.admit().succeeded()
    breaker.admit().succeeded()
    breaker.admit().failed()
    assert breaker.state is State.CLOSED

    breaker.admit().failed()

    assert breaker.state is State.OPEN


def test_few_failures_are_not_enough(breaker: Breaker):
    for _ in range(MINIMUM - 1):
        breaker.admit().failed()

    assert breaker.state is State.CLOSED


def test_a_small_share_of_failures_is_not_enough(breaker: Breaker):
    for _ in range(100):
        breaker.admit().succeeded()
        breaker.admit().succeeded()
        breaker.admit().failed()

    assert breaker.state is State.CLOSED


def test_failures_that_have_left_the_window_do_not_count(breaker: Breaker, clock: ManualClock):
    for _ in range(MINIMUM * 2):
        breaker.admit().failed()
        clock.seconds += WINDOW / (MINIMUM - 1)

    assert breaker.state is State.CLOSED


def test_failures_within_the_window_count(breaker: Breaker, clock: ManualClock):
    for _ in range(MINIMUM):
        breaker.admit().failed()
        clock.seconds += WINDOW * (BUCKETS - 1) / BUCKETS / MINIMUM

    assert breaker.state is State.OPEN


def test_a_long_silence_empties_the_window(breaker: Breaker, clock: ManualClock):
    for _ in range(MINIMUM - 1):
        breaker.admit().failed()
    clock.seconds += WINDOW * 1_000_000

    breaker.admit().failed()

    assert breaker.state is State.CLOSED


def test_a_permit_counts_once_and_a_cancelled_one_not_at_all(breaker: Breaker):
    permit = breaker.admit()
    for _ in range(MINIMUM):
        permit.failed()
        given_up = breaker.admit()
        given_up.cancelled()
        given_up.failed()

    assert breaker.state is State.CLOSED


# -------------------------------------------------------------------------------------------------------------- open


def test_it_refuses_at_once_and_says_for_how_long(breaker: Breaker, clock: ManualClock):
    trip(breaker)

    assert refused_for(breaker) == 5
    clock.seconds += 0.5
    assert refused_for(breaker) == 5
    clock.seconds += 4.4
    assert refused_for(breaker) == 1


def test_one_probe_is_let_through_after_the_open_time(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    clock.seconds += OPEN

    breaker.admit()

    assert breaker.state is State.HALF_OPEN
    assert [refused_for(breaker) for _ in range(20)] == [1] * 20


def test_the_success_of_the_probe_closes_it_with_an_empty_window(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    clock.seconds += OPEN
    breaker.admit().succeeded()

    assert breaker.state is State.CLOSED
    for _ in range(MINIMUM - 1):
        breaker.admit().failed()
    assert breaker.state is State.CLOSED


def test_each_failed_probe_doubles_the_open_time_up_to_the_longest(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    waits: list[int | None] = []
    for _ in range(5):
        waits.append(wait := refused_for(breaker))
        assert wait is not None
        clock.seconds += wait
        breaker.admit().failed()

    assert waits == [5, 10, 20, 30, 30]


def test_a_success_resets_the_open_time(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    clock.seconds += OPEN
    breaker.admit().failed()
    clock.seconds += OPEN * 2
    breaker.admit().succeeded()
    trip(breaker)

    assert refused_for(breaker) == 5


def test_chance_shortens_an_open_time_and_never_lengthens_it(clock: ManualClock):
    breaker = breaker_with(clock, jitter=lambda: 1.0)
    trip(breaker)

    clock.seconds += OPEN * (1 - JITTER_SHARE)

    breaker.admit()


# --------------------------------------------------------------------------------------------------------- half-open


def test_a_cancelled_probe_gives_way_to_the_next_caller(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    clock.seconds += OPEN
    breaker.admit().cancelled()

    probe = breaker.admit()
    assert refused_for(breaker) == 1
    probe.succeeded()

    assert breaker.state is State.CLOSED


def test_a_probe_that_never_reports_gives_way_when_its_lease_is_over(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    clock.seconds += OPEN
    lost = breaker.admit()
    clock.seconds += PROBE - 0.1
    assert refused_for(breaker) == 1
    clock.seconds += 0.1
    probe = breaker.admit()

    lost.failed()
    assert breaker.state is State.HALF_OPEN
    lost.cancelled()
    assert refused_for(breaker) == 1
    probe.succeeded()
    assert breaker.state is State.CLOSED


@pytest.mark.parametrize("report", [Permit.succeeded, Permit.failed, Permit.cancelled])
def test_reports_from_before_it_opened_change_nothing(
    breaker: Breaker, clock: ManualClock, report: Callable[[Permit], None]
):
    early, half_open, closed = breaker.admit(), breaker.admit(), [breaker.admit() for _ in range(MINIMUM)]
    trip(breaker)

    report(early)
    assert breaker.state is State.OPEN
    clock.seconds += OPEN
    probe = breaker.admit()
    report(half_open)
    assert breaker.state is State.HALF_OPEN
    assert refused_for(breaker) == 1
    probe.succeeded()
    for permit in closed:
        report(permit)
    assert breaker.state is State.CLOSED


def test_every_change_of_state_is_told_once(clock: ManualClock):
    told: list[State] = []
    breaker = breaker_with(clock, on_change=told.append)
    trip(breaker)
    clock.seconds += OPEN
    breaker.admit()
    clock.seconds += PROBE
    breaker.admit().failed()
    clock.seconds += OPEN * 2
    breaker.admit().succeeded()

    assert told == [State.OPEN, State.HALF_OPEN, State.OPEN, State.HALF_OPEN, State.CLOSED]


# --------------------------------------------------------------------------------------------------------- transport


class Stock(Contract, name="stock"):
    look = batched(Empty, Empty, allow=frozenset({"anonymous"}))


class ScriptedTransport:
    """Answers each batch as the script says; an exception is raised."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.sent = 0

    async def send(self, operation: Any, requests: Sequence[Any], contexts: Sequence[Context]) -> Sequence[Any]:
        self.sent += 1
        answer = self.script.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


async def send(transport: BreakingTransport, *, deadline: float = 2_000.0) -> Sequence[Any] | BaseException:
    contexts = [Context(ANONYMOUS, deadline, "", ""), Context(ANONYMOUS, 3_000.0, "", "")]
    try:
        return await transport.send(Stock.look, [Empty(), Empty()], contexts)
    except (Exception, asyncio.CancelledError) as error:
        return error


GONE = Unavailable(service="stock")
LATE = DeadlineExceeded(operation="stock.look")

FAILED = [GONE, LATE, [GONE, GONE]]
NOT_FAILED = [
    [Empty(), Empty()],
    [GONE, Empty()],
    [Unavailable(service="another"), Unavailable(service="another")],
    [Internal(operation="stock.look")] * 2,
    Overloaded(operation="stock.look"),
    RuntimeError("a bug"),
    asyncio.CancelledError(),
]


def label(answer: Any) -> str:
    return " and ".join(map(label, answer)) if isinstance(answer, list) else type(answer).__name__


@pytest.mark.parametrize("answer", FAILED, ids=label)
async def test_a_batch_that_nobody_answers_has_failed(breaker: Breaker, answer: Any):
    inner = ScriptedTransport()
    inner.script = [answer] * MINIMUM
    transport = BreakingTransport(inner, {"stock": breaker}.__getitem__)

    for _ in range(MINIMUM):
        assert await send(transport) is answer
    refused = await send(transport)

    assert isinstance(refused, Unavailable)
    assert refused.retry_after_s == 5
    assert inner.sent == MINIMUM


@pytest.mark.parametrize("answer", NOT_FAILED, ids=label)
async def test_a_batch_that_is_answered_has_not_failed(breaker: Breaker, answer: Any):
    inner = ScriptedTransport()
    inner.script = [answer] * MINIMUM * 2
    transport = BreakingTransport(inner, {"stock": breaker}.__getitem__)

    for _ in range(MINIMUM * 2):
        assert await send(transport) is answer

    assert breaker.state is State.CLOSED


async def test_a_batch_that_is_cancelled_because_somebody_waited_in_vain_has_failed(
    breaker: Breaker, clock: ManualClock
):
    inner = ScriptedTransport()
    inner.script = [asyncio.CancelledError()] * MINIMUM
    transport = BreakingTransport(inner, {"stock": breaker}.__getitem__)

    for _ in range(MINIMUM):
        await send(transport, deadline=clock.seconds)

    assert breaker.state is State.OPEN


async def test_a_batch_is_one_permit(breaker: Breaker, clock: ManualClock):
    inner = ScriptedTransport()
    transport = BreakingTransport(inner, {"stock": breaker}.__getitem__)
    trip(breaker)
    clock.seconds += OPEN
    inner.script = [[Empty(), Empty()]]

    assert await send(transport) == [Empty(), Empty()]
    assert breaker.state is State.CLOSED


async def test_a_probe_that_is_cancelled_lets_the_next_batch_probe(breaker: Breaker, clock: ManualClock):
    inner = ScriptedTransport()
    transport = BreakingTransport(inner, {"stock": breaker}.__getitem__)
    trip(breaker)
    clock.seconds += OPEN
    inner.script = [asyncio.CancelledError(), [Empty(), Empty()]]

    assert isinstance(await send(transport), asyncio.CancelledError)
    assert breaker.state is State.HALF_OPEN
    assert not isinstance(await send(transport), ServiceError)
    assert breaker.state is State.CLOSED
