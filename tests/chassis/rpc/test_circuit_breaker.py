"""The circuit breaker: its states by example and by random walks, and what counts as a failure of a batch."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

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

WINDOW, MINIMUM, OPEN, LONGEST, PROBE = 10.0, 4, 5.0, 30.0, 15.0


class ManualClock:
    def __init__(self) -> None:
        self.seconds = 1_003.7

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime.datetime:
        raise AssertionError("a breaker has nothing to do with the wall clock")


def breaker_with(
    clock: ManualClock, *, jitter: Callable[[], float] = lambda: 0.0, on_change: Callable[[State], None] | None = None
) -> Breaker:
    return Breaker(
        "stock",
        clock=clock,
        jitter=jitter,
        window_seconds=WINDOW,
        minimum_calls=MINIMUM,
        open_seconds=OPEN,
        longest_open_seconds=LONGEST,
        probe_seconds=PROBE,
        on_change=on_change,
    )


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


# ------------------------------------------------------------------------------------------------------ random walks


class BreakerWalk(RuleBasedStateMachine):
    """Callers come, go and report in any order, at any time, also long after anybody cares."""

    permits: Bundle[Permit] = Bundle("permits")

    @initialize(jitter=st.floats(0.0, 1.0))
    def start(self, jitter: float) -> None:
        self.clock = ManualClock()
        self.told: list[State] = []
        self.breaker = breaker_with(self.clock, jitter=lambda: jitter, on_change=self.told.append)
        self.probe: Permit | None = None
        self.probe_since = 0.0
        self.refused_since: float | None = None
        self.probe_succeeded = False

    @rule(target=permits)
    def call(self) -> Any:
        before = self.breaker.state
        try:
            permit = self.breaker.admit()
        except Unavailable as refused:
            return self._refused(before, refused)
        self.refused_since = None
        if before is State.CLOSED:
            return permit
        assert self.breaker.state is State.HALF_OPEN
        # Never more than one probe: the former has reported, was given up, or its lease is over.
        assert self.probe is None or self.clock.seconds >= self.probe_since + PROBE
        self.probe, self.probe_since = permit, self.clock.seconds
        return permit

    def _refused(self, before: State, refused: Unavailable) -> Any:
        assert before is not State.CLOSED
        assert refused.retry_after_s is not None
        assert 1 <= refused.retry_after_s <= LONGEST
        # Somebody who keeps trying becomes the probe in bounded time.
        self.refused_since = self.clock.seconds if self.refused_since is None else self.refused_since
        assert self.clock.seconds - self.refused_since <= max(LONGEST, PROBE)
        return multiple()

    @rule(permit=consumes(permits))
    def succeed(self, permit: Permit) -> None:
        self._report(permit, permit.succeeded, succeeded=True)

    @rule(permit=consumes(permits))
    def fail(self, permit: Permit) -> None:
        self._report(permit, permit.failed)

    @rule(permit=consumes(permits))
    def give_up(self, permit: Permit) -> None:
        self._report(permit, permit.cancelled)

    @rule(permit=permits)
    def fail_and_report_again_later(self, permit: Permit) -> None:
        self._report(permit, permit.failed)

    def _report(self, permit: Permit, report: Callable[[], None], *, succeeded: bool = False) -> None:
        before, told, is_probe = self.breaker.state, len(self.told), permit is self.probe
        report()
        changed = self.told[told:]
        if before is State.CLOSED:
            assert changed in ([], [State.OPEN])
            assert not (succeeded and changed)
        elif not is_probe:
            assert changed == [], "a late report changed something"
        elif changed:
            # It closes only after a success, and opens only after a failure.
            assert changed == [State.CLOSED if succeeded else State.OPEN]
        if is_probe:
            assert not succeeded or self.breaker.state is State.CLOSED
            self.probe = None
        if changed:
            self.refused_since = None

    @rule(seconds=st.sampled_from([0.1, 1.0, OPEN, WINDOW, PROBE, LONGEST]) | st.floats(0.0, 100.0))
    def wait(self, seconds: float) -> None:
        self.clock.seconds += seconds
        # Who was refused before and did not try meanwhile has not been kept waiting by the breaker.
        self.refused_since = None

    @precondition(lambda self: self.breaker.state is not State.CLOSED)
    @rule(target=permits)
    def insist(self) -> Any:
        """Tries every second: is let through before the longest time that anything can keep it out is over."""
        for _ in range(int(max(LONGEST, PROBE)) + 1):
            permit = self.call()
            if isinstance(permit, Permit):
                return permit
            self.clock.seconds += 1.0
        raise AssertionError("nobody was let through")

    @invariant()
    def it_remembers_no_calls(self) -> None:
        window = self.breaker._window
        assert (len(window._calls), len(window._failures)) == (BUCKETS, BUCKETS)
        assert all(0 <= f <= c for f, c in zip(window._failures, window._calls, strict=True))


BreakerWalk.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
test_random_walks = BreakerWalk.TestCase


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
