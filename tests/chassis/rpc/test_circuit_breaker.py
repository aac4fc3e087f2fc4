"""The circuit breaker: its states by example (random walks: `tests/models`); what fails a batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from chassis.rpc.breakers import MINIMUM, OPEN, PROBE, WINDOW, ManualClock, breaker_with
from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Context,
    Contract,
    DeadlineExceeded,
    Empty,
    Internal,
    Overloaded,
    Retry,
    ServiceError,
    Unavailable,
    batched,
    current,
    single,
)
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.circuit_breaker import (
    BUCKETS,
    JITTER_SHARE,
    Breaker,
    BreakingTransport,
    OperationClass,
    Permit,
    State,
)
from mercato.chassis.rpc.client import Connector, acting
from mercato.chassis.rpc.limits import CallLimits
from mercato.testing.waiting import until_true


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


def test_one_batch_alone_does_not_open_it_however_many_calls_it_has(breaker: Breaker):
    breaker.admit(1_000).failed()
    assert breaker.state is State.CLOSED

    breaker.admit().failed()

    assert breaker.state is State.OPEN


# -------------------------------------------------------------------------------------------------------------- slow


def test_it_opens_when_too_many_calls_are_slow_before_any_of_them_has_ended(breaker: Breaker):
    permits = [breaker.admit() for _ in range(MINIMUM + 1)]
    permits[0].succeeded()
    permits[1].succeeded()

    permits[2].slow()
    permits[3].slow()
    assert breaker.state is State.CLOSED  # half of them
    permits[4].slow()

    assert breaker.state is State.OPEN


def test_calls_that_wait_behind_a_slow_one_count_as_slow(breaker: Breaker):
    breaker.admit().slow(waiting=2)
    assert breaker.state is State.CLOSED

    breaker.admit().slow(waiting=2)

    assert breaker.state is State.OPEN


def test_a_slow_call_counts_once_and_its_failure_as_well(breaker: Breaker):
    for _ in range(MINIMUM // 2):
        breaker.admit().succeeded()
    slow = [breaker.admit() for _ in range(MINIMUM // 2)]
    for permit in slow:
        permit.slow()
        permit.slow()
    assert breaker.state is State.CLOSED  # half were slow, which is less than the share of slow calls

    for permit in slow:
        permit.failed()

    assert breaker.state is State.OPEN  # half failed


def test_slow_calls_that_succeed_in_the_end_count_as_slow_ones(breaker: Breaker):
    for _ in range(MINIMUM - 1):
        permit = breaker.admit()
        permit.slow()
        permit.succeeded()
    assert breaker.state is State.CLOSED

    breaker.admit().slow()

    assert breaker.state is State.OPEN


def test_a_slow_probe_opens_it_again_and_its_late_success_changes_nothing(breaker: Breaker, clock: ManualClock):
    trip(breaker)
    clock.seconds += OPEN
    probe = breaker.admit()

    probe.slow()
    assert refused_for(breaker) == OPEN * 2
    probe.succeeded()

    assert breaker.state is State.OPEN


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


def test_every_change_of_state_is_notified_once(clock: ManualClock):
    changes: list[State] = []
    breaker = breaker_with(clock, on_change=changes.append)
    trip(breaker)
    clock.seconds += OPEN
    breaker.admit()
    clock.seconds += PROBE
    breaker.admit().failed()
    clock.seconds += OPEN * 2
    breaker.admit().succeeded()

    assert changes == [State.OPEN, State.HALF_OPEN, State.OPEN, State.HALF_OPEN, State.CLOSED]


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
    contexts = [Context(ANONYMOUS_ACTOR, deadline, "", ""), Context(ANONYMOUS_ACTOR, 3_000.0, "", "")]
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
async def test_a_batch_without_an_answer_has_failed(breaker: Breaker, answer: Any):
    inner = ScriptedTransport()
    batches = MINIMUM // 2  # of two calls each
    inner.script = [answer] * batches
    transport = BreakingTransport(inner, lambda *_: breaker)

    for _ in range(batches):
        assert await send(transport) is answer
    refused = await send(transport)

    assert isinstance(refused, Unavailable)
    assert refused.retry_after_s == 5
    assert inner.sent == batches


@pytest.mark.parametrize("answer", NOT_FAILED, ids=label)
async def test_a_batch_that_is_answered_has_not_failed(breaker: Breaker, answer: Any):
    inner = ScriptedTransport()
    inner.script = [answer] * MINIMUM * 2
    transport = BreakingTransport(inner, lambda *_: breaker)

    for _ in range(MINIMUM * 2):
        assert await send(transport) is answer

    assert breaker.state is State.CLOSED


async def test_a_batch_that_is_cancelled_at_its_deadline_has_failed(breaker: Breaker, clock: ManualClock):
    inner = ScriptedTransport()
    inner.script = [asyncio.CancelledError()] * MINIMUM
    transport = BreakingTransport(inner, lambda *_: breaker)

    for _ in range(MINIMUM):
        await send(transport, deadline=clock.seconds)

    assert breaker.state is State.OPEN


async def test_a_batch_is_one_permit(breaker: Breaker, clock: ManualClock):
    inner = ScriptedTransport()
    transport = BreakingTransport(inner, lambda *_: breaker)
    trip(breaker)
    clock.seconds += OPEN
    inner.script = [[Empty(), Empty()]]

    assert await send(transport) == [Empty(), Empty()]
    assert breaker.state is State.CLOSED


async def test_a_probe_that_is_cancelled_lets_the_next_batch_probe(breaker: Breaker, clock: ManualClock):
    inner = ScriptedTransport()
    transport = BreakingTransport(inner, lambda *_: breaker)
    trip(breaker)
    clock.seconds += OPEN
    inner.script = [asyncio.CancelledError(), [Empty(), Empty()]]

    assert isinstance(await send(transport), asyncio.CancelledError)
    assert breaker.state is State.HALF_OPEN
    assert not isinstance(await send(transport), ServiceError)
    assert breaker.state is State.CLOSED


class Shelf(Contract, name="shelf"):
    look = batched(Empty, Empty, allow=frozenset({"anonymous"}), size=MINIMUM, retry=Retry.SAFE)
    count = batched(Empty, Empty, allow=frozenset({"anonymous"}), size=MINIMUM, retry=Retry.SAFE)
    put = batched(Empty, Empty, allow=frozenset({"anonymous"}), size=MINIMUM)
    wait = single(Empty, Empty, allow=frozenset({"anonymous"}), lanes=MINIMUM, retry=Retry.SAFE, waits=True)


class StandsStill:
    """Answers the operations that `answered` names, and no other one until `release` is set."""

    def __init__(self, *answered: str) -> None:
        self.answered = set(answered)
        self.release = asyncio.Event()
        self.sent: list[str] = []

    async def send(self, operation: Any, requests: Sequence[Any], contexts: Sequence[Context]) -> Sequence[Any]:
        self.sent.append(operation.name)
        if operation.name not in self.answered:
            await self.release.wait()
        return [Empty() for _ in requests]


class Calling:
    """A client of `Shelf` whose breakers find calls slow after `slow_seconds`."""

    def __init__(self, inner: StandsStill, slow_seconds: float) -> None:
        self.inner = inner
        self.breakers: dict[OperationClass, Breaker] = {}
        self.transport = BreakingTransport(inner, self._breaker, slow_seconds=slow_seconds)
        self.connector = Connector(SystemClock(), Telemetry())
        self.shelf = self.connector.client(Shelf, self.transport)

    def _breaker(self, service: str, operations: OperationClass) -> Breaker:
        limits = CallLimits(minimum_calls=MINIMUM, open_seconds=3_600.0, longest_open_seconds=3_600.0)
        made = Breaker(service, clock=SystemClock(), jitter=lambda: 0.0, limits=limits)
        self.breakers[operations] = made
        return made

    def state(self, operations: OperationClass) -> State:
        return self.breakers[operations].state if operations in self.breakers else State.CLOSED

    def call(self, operation: str) -> asyncio.Task[Any]:
        async def called() -> Any:
            try:
                return await getattr(self.shelf, operation)(Empty())
            except ServiceError as error:
                return error

        token = current.set(acting(ANONYMOUS_ACTOR, clock=SystemClock(), seconds=3_600.0))
        try:
            return asyncio.create_task(called())
        finally:
            current.reset(token)

    async def end(self) -> None:
        self.inner.release.set()
        await self.connector.close()


async def test_an_unresponsive_service_gets_no_more_calls_and_queued_calls_are_unavailable():
    """With two lanes only two batches reach the service: without an answer these hold the lanes, not the callers."""
    calling = Calling(StandsStill(), slow_seconds=0.05)
    first = [calling.call("look") for _ in range(2)]
    await until_true(lambda: len(calling.inner.sent) == 1)
    second = [calling.call("look")]
    await until_true(lambda: len(calling.inner.sent) == 2)
    queued = [calling.call("look") for _ in range(MINIMUM * 5)]

    answers = await asyncio.gather(*queued)

    assert {type(answer) for answer in answers} == {Unavailable}
    assert not any(task.done() for task in (*first, *second))
    assert calling.state(OperationClass.READS) is State.OPEN
    assert calling.breakers[OperationClass.READS].in_flight == 3
    assert isinstance(await calling.call("look"), Unavailable)  # and at once, though no lane is free
    assert calling.inner.sent == ["look", "look"]
    await calling.end()
    assert calling.breakers[OperationClass.READS].in_flight == 0
    assert {type(answer) for answer in await asyncio.gather(*first, *second)} == {Empty}


async def test_slow_reads_stop_reads_and_no_writes():
    calling = Calling(StandsStill("put"), slow_seconds=0.05)
    looking = [calling.call("look") for _ in range(MINIMUM * 5)]
    await until_true(lambda: calling.state(OperationClass.READS) is State.OPEN)

    assert isinstance(await calling.call("put"), Empty)
    assert isinstance(await calling.call("count"), Unavailable)

    await calling.end()
    await asyncio.gather(*looking)


async def test_an_operation_that_waits_by_itself_is_not_slow():
    calling = Calling(StandsStill(), slow_seconds=0.01)
    waiting = [calling.call("wait") for _ in range(MINIMUM)]
    await until_true(lambda: len(calling.inner.sent) == MINIMUM)
    others = [calling.call("put") for _ in range(MINIMUM * 5)]
    # When these were found slow, so would the others have been, which began before.
    await until_true(lambda: calling.state(OperationClass.WRITES) is State.OPEN)

    assert calling.state(OperationClass.READS) is State.CLOSED

    await calling.end()
    assert {type(answer) for answer in await asyncio.gather(*waiting)} == {Empty}
    await asyncio.gather(*others)


async def test_a_process_that_stood_still_itself_finds_no_call_slow():
    calling = Calling(StandsStill(), slow_seconds=0.05)
    looking = [calling.call("look") for _ in range(MINIMUM * 5)]
    await until_true(lambda: len(calling.inner.sent) == 2)

    time.sleep(0.2)  # noqa: ASYNC251  # the loop stands still
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert calling.state(OperationClass.READS) is State.CLOSED
    calling.inner.release.set()
    assert {type(answer) for answer in await asyncio.gather(*looking)} == {Empty}
    await calling.end()
