"""The batcher under every interleaving of calls, landings, failures, cancellations and time that a schedule makes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings, strategies as st

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Context,
    DeadlineExceeded,
    Internal,
    Kind,
    OutcomeUnknown,
    Overloaded,
    ServiceError,
    Unavailable,
)
from mercato.chassis.rpc.batching import GATHER_TURNS, Batcher, PendingRequest

OPERATION = "things.do"


class Refused(ServiceError, code="test_batching.refused", kind=Kind.REFUSED):
    sentence = "Not {number}."
    number: int


class Broken(Exception):
    pass


class FakeClock:
    """Time stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_003.7

    def __call__(self) -> float:
        return self.now


class Recorder:
    """An observer. `breaks` names what raises."""

    def __init__(self, breaks: Sequence[str] = ()) -> None:
        self.breaks = breaks
        self.sizes: list[int] = []
        self.waits: list[float] = []
        self.refusals: list[int] = []
        self.failures: list[BaseException] = []

    def sent(self, size: int, longest_wait_s: float) -> None:
        if "sent" in self.breaks:
            raise Broken("sent")
        self.sizes.append(size)
        self.waits.append(longest_wait_s)

    def refused(self, count: int) -> None:
        self.refusals.append(count)

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)
        if "failed" in self.breaks:
            raise Broken("failed")


class Sent:
    """A batch that reached the service. It hangs until the test completes it."""

    def __init__(self, requests: Sequence[int], contexts: Sequence[Context]) -> None:
        self.requests = list(requests)
        self.contexts = list(contexts)
        self.result: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self.cancelled = False


class Service:
    """A `send` whose batches are completed, failed, miscounted or left hanging by the test."""

    def __init__(self) -> None:
        self.batches: list[Sent] = []

    async def send(self, requests: Sequence[int], contexts: Sequence[Context]) -> Sequence[Any]:
        batch = Sent(requests, contexts)
        self.batches.append(batch)
        try:
            return await batch.result
        except asyncio.CancelledError:
            batch.cancelled = True
            raise

    @property
    def hanging(self) -> list[Sent]:
        return [batch for batch in self.batches if not batch.result.done()]


def answer(request: int) -> Any:
    """Every third request is refused by itself; the answer says whose it is."""
    return Refused(number=request) if request % 3 == 0 else f"answer {request}"


class Bench:
    """A batcher, its service, its clock and its observer."""

    def __init__(self, *, size: int = 4, lanes: int = 2, queue_limit: int = 8, breaks: Sequence[str] = ()) -> None:
        self.clock = FakeClock()
        self.service = Service()
        self.observer = Recorder(breaks)
        self.batcher = Batcher(
            OPERATION,
            self.service.send,
            size=size,
            lanes=lanes,
            observer=self.observer,
            monotonic=self.clock,
            queue_limit=queue_limit,
        )

    def context(self, seconds: float = 1_000.0) -> Context:
        return Context(ANONYMOUS_ACTOR, self.clock.now + seconds, "", "")

    def call(self, request: int, seconds: float = 1_000.0) -> asyncio.Future[Any]:
        return self.batcher.submit(request, self.context(seconds))

    def many(self, requests: Sequence[int], seconds: float = 1_000.0) -> asyncio.Future[Sequence[Any]]:
        return self.batcher.submit_many(requests, self.context(seconds))

    def ring(self) -> None:
        """What the timer does when the fake time has come; the real one would wait for real seconds."""
        if self.batcher._timer_at <= self.clock.now:
            assert self.batcher._timer is not None
            self.batcher._timer.cancel()
            self.batcher._on_timer()

    async def finish(self) -> None:
        for batch in self.service.hanging:
            batch.result.cancel()
        await self.batcher.close()


async def turns(count: int = 6) -> None:
    """Lets the loop run until everything that follows at once has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


def complete(batch: Sent) -> None:
    batch.result.set_result([answer(request) for request in batch.requests])


# ------------------------------------------------------------------------------------------------------- one thing each


async def test_a_lone_call_is_sent_at_the_next_turn_as_a_batch_of_one():
    bench = Bench()
    future = bench.call(1)
    assert bench.service.batches == []

    await turns(2)  # one turn until it leaves, one until its task runs
    assert [batch.requests for batch in bench.service.batches] == [[1]]
    complete(bench.service.batches[0])
    assert await future == "answer 1"
    assert bench.observer.waits == [0.0]


async def test_calls_of_one_turn_are_sent_as_one_batch_in_their_order():
    bench = Bench(size=8)
    futures = [bench.call(1), bench.call(2), bench.many([4, 5]), bench.call(7)]
    await turns()

    assert [batch.requests for batch in bench.service.batches] == [[1, 2, 4, 5, 7]]
    complete(bench.service.batches[0])
    assert await asyncio.gather(*futures) == ["answer 1", "answer 2", ["answer 4", "answer 5"], "answer 7"]


async def test_calls_of_one_turn_are_one_batch_also_when_another_batch_completes_in_between():
    bench = Bench()
    bench.call(1)
    await turns()
    order: list[str] = []

    async def early() -> None:
        order.append("early")
        bench.call(2)

    async def late() -> None:
        order.append("late")
        bench.call(4)

    tasks = [asyncio.create_task(early())]
    complete(bench.service.batches[0])  # wakes the lane between the two
    tasks.append(asyncio.create_task(late()))
    await turns()

    assert order == ["early", "late"]
    assert [batch.requests for batch in bench.service.batches] == [[1], [2, 4]]
    await bench.finish()


async def test_several_calls_gather_until_a_turn_brings_no_further_call():
    bench = Bench(size=8)
    bench.many([1, 2])
    for request in (4, 5):
        await turns(1)
        assert bench.service.batches == []
        bench.call(request)
    await turns()

    assert [batch.requests for batch in bench.service.batches] == [[1, 2, 4, 5]]
    await bench.finish()


async def test_a_call_beside_a_batch_in_flight_gathers_too():
    bench = Bench(size=8)
    bench.call(1)
    await turns()
    bench.call(2)
    await turns(1)
    bench.call(4)
    await turns()

    assert [batch.requests for batch in bench.service.batches] == [[1], [2, 4]]
    await bench.finish()


async def test_calls_that_do_not_cease_gather_for_a_bounded_number_of_turns():
    bench = Bench(size=100, queue_limit=100)
    bench.many([0, 1])
    made = 2
    while not bench.service.batches:
        await turns(1)
        bench.call(made)
        made += 1
        assert made < 100

    assert GATHER_TURNS <= len(bench.service.batches[0].requests) <= GATHER_TURNS + 2
    await bench.finish()


async def test_a_full_batch_does_not_gather():
    bench = Bench(size=4)
    bench.many([1, 2, 4, 5])

    await turns(2)  # as a single call
    assert [batch.requests for batch in bench.service.batches] == [[1, 2, 4, 5]]
    await bench.finish()


async def test_what_callers_call_next_is_in_a_batch_with_what_waited_for_their_lane():
    bench = Bench(size=8, lanes=1)

    async def caller(first: int, second: int) -> None:
        await bench.call(first)
        await bench.call(second)

    callers = [asyncio.create_task(caller(n, n + 10)) for n in (1, 2, 4)]
    await turns()
    bench.call(7)
    complete(bench.service.batches[0])
    await turns()

    assert [batch.requests for batch in bench.service.batches] == [[1, 2, 4], [7, 11, 12, 14]]
    for task in callers:
        task.cancel()
    await bench.finish()


async def test_queued_calls_are_sent_in_batches_of_at_most_size_when_a_lane_is_free():
    bench = Bench(size=4, lanes=1, queue_limit=100)
    bench.call(1)
    await turns()
    rest = bench.many(list(range(10, 19)))
    await turns()
    assert len(bench.service.batches) == 1

    for _ in range(4):
        for batch in bench.service.hanging:
            complete(batch)
        await turns()
    assert [batch.requests for batch in bench.service.batches] == [[1], [10, 11, 12, 13], [14, 15, 16, 17], [18]]
    assert len(await rest) == 9


async def test_outcomes_of_a_group_keep_their_places_and_errors_do_not_raise():
    bench = Bench(size=2, lanes=2)
    group = bench.many([1, 3, 4, 6])
    await turns()
    second, first = reversed(bench.service.batches), bench.service.batches[0]
    for batch in (*second, first):
        if not batch.result.done():
            complete(batch)
    outcomes = await group

    assert [str(outcome) for outcome in outcomes] == ["answer 1", "Not 3.", "answer 4", "Not 6."]


async def test_a_group_of_nothing_is_answered_without_a_batch():
    bench = Bench()
    assert await bench.many([]) == []
    await turns()
    assert bench.service.batches == []


async def test_a_full_queue_refuses_at_once_and_keeps_what_it_has():
    bench = Bench(size=2, lanes=1, queue_limit=3)
    kept = bench.many([1, 2, 4])
    with pytest.raises(Overloaded):
        bench.call(5)
    with pytest.raises(Overloaded):
        bench.many([5, 7])
    assert bench.observer.refusals == [1, 2]

    for _ in range(3):
        await turns()
        for batch in bench.service.hanging:
            complete(batch)
    assert await kept == ["answer 1", "answer 2", "answer 4"]


async def test_an_error_of_the_batch_reaches_every_caller_as_an_object_of_its_own():
    bench = Bench()
    futures = [bench.call(1), bench.call(2)]
    await turns()
    bench.service.batches[0].result.set_exception(Unavailable(service="things"))
    errors = await asyncio.gather(*futures, return_exceptions=True)

    assert all(isinstance(error, Unavailable) for error in errors)
    assert errors[0] is not errors[1]
    assert bench.observer.failures == []


@pytest.mark.parametrize("answers", [[], ["one", "too", "many"], None])
async def test_a_wrong_number_of_answers_is_internal_for_all_and_reported(answers: Any):
    bench = Bench()
    futures = [bench.call(1), bench.call(2)]
    await turns()
    bench.service.batches[0].result.set_result(answers)
    outcomes = await asyncio.gather(*futures, return_exceptions=True)

    assert all(isinstance(outcome, Internal) for outcome in outcomes)
    assert len(bench.observer.failures) == 1
    assert bench.batcher.in_flight == 0


async def test_a_deadline_is_kept_although_the_service_hangs_and_its_lane_is_free_again():
    bench = Bench(lanes=1)
    hanging, waiting = bench.call(1, seconds=5), bench.call(2, seconds=5)
    await turns()
    queued = bench.call(4, seconds=7)

    bench.clock.now += 5
    bench.ring()
    for future in (hanging, waiting):
        with pytest.raises(DeadlineExceeded):
            await future
    await turns()
    assert bench.service.batches[0].cancelled
    assert bench.service.batches[1].requests == [4]
    complete(bench.service.batches[1])
    assert await queued == "answer 4"


async def test_a_late_answer_after_the_deadline_changes_nothing():
    bench = Bench()
    late, group = bench.call(1, seconds=5), bench.many([2, 4], seconds=50)
    await turns()
    bench.clock.now += 5
    bench.ring()
    with pytest.raises(DeadlineExceeded):
        await late
    assert not bench.service.batches[0].cancelled  # the group still waits for it
    complete(bench.service.batches[0])

    assert await group == ["answer 2", "answer 4"]


async def test_what_is_cancelled_or_expired_in_the_queue_is_never_sent():
    bench = Bench(lanes=1)
    bench.call(1)
    await turns()
    gone, expired, group, good = bench.call(2), bench.call(4, seconds=1), bench.many([5, 7]), bench.call(8)
    gone.cancel()
    group.cancel()
    bench.clock.now += 1
    complete(bench.service.batches[0])
    await turns()

    assert [batch.requests for batch in bench.service.batches] == [[1], [8]]
    with pytest.raises(DeadlineExceeded):
        await expired
    complete(bench.service.batches[1])
    await good


async def test_a_batch_that_is_cancelled_before_its_first_step_frees_its_lane():
    """Such a task runs nothing at all. It happens when the alarm rings in the turn in which the batch is sent."""
    bench = Bench(lanes=1)
    first = bench.call(1, seconds=5)
    bench.batcher._flush()
    bench.clock.now += 5
    bench.ring()
    await turns()
    with pytest.raises(DeadlineExceeded):
        await first
    assert bench.service.batches == []
    assert bench.batcher.in_flight == 0

    second = bench.call(2)
    await turns()
    complete(bench.service.batches[0])
    assert await second == "answer 2"


async def test_an_abandoned_batch_is_cancelled_once_so_that_it_can_roll_back():
    rolled_back: list[int] = []
    clock = FakeClock()

    async def send(requests: Sequence[int], _contexts: Sequence[Context]) -> Sequence[Any]:
        try:
            await asyncio.sleep(3_600)
        finally:
            await turns(10)
            rolled_back.extend(requests)
        return []

    batcher = Batcher(OPERATION, send, size=1, lanes=2, observer=Recorder(), monotonic=clock, queue_limit=8)
    first = batcher.submit(1, Context(ANONYMOUS_ACTOR, clock.now + 1, "", ""))
    second = batcher.submit(2, Context(ANONYMOUS_ACTOR, clock.now + 2, "", ""))
    await turns()
    for _ in range(2):
        clock.now += 1
        batcher._on_timer()
        await turns(2)  # the first is still rolling back when the second rings
    await asyncio.gather(first, second, return_exceptions=True)
    await batcher.close()

    assert sorted(rolled_back) == [1, 2]


async def test_a_batch_whose_task_is_cancelled_from_outside_has_an_unknown_outcome():
    bench = Bench()
    future = bench.call(1)
    await turns()
    batch = next(iter(bench.batcher._in_flight))
    assert batch.task is not None
    batch.task.cancel()
    with pytest.raises(OutcomeUnknown):
        await future
    assert bench.batcher.in_flight == 0


@pytest.mark.parametrize("broken", ["sent", "failed"])
async def test_an_observer_that_raises_leaves_no_caller_waiting(broken: str, monkeypatch: pytest.MonkeyPatch):
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, problem: reported.append(problem))
    bench = Bench(breaks=[broken])
    futures = [bench.call(1), bench.call(2)]
    await turns()
    for batch in bench.service.hanging:
        batch.result.set_exception(Broken("transport"))
    outcomes = await asyncio.gather(*futures, return_exceptions=True)

    assert all(isinstance(outcome, Internal) for outcome in outcomes)
    assert bench.batcher.in_flight == 0


async def test_errors_for_callers_that_are_gone_are_not_reported():
    """An error for a caller that does not wait any more must not be reported as "never retrieved"."""
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, problem: reported.append(problem))
    bench = Bench(size=8)

    async def caller(request: int) -> None:
        await bench.call(request)

    early, same_turn = asyncio.create_task(caller(3)), asyncio.create_task(caller(6))
    impatient = asyncio.create_task(asyncio.wait_for(caller(9), 3_600))
    await turns()
    early.cancel()
    await turns()
    complete(bench.service.batches[0])
    await asyncio.sleep(0)  # the answers are set, no caller has taken them yet
    same_turn.cancel()
    impatient.cancel()
    await asyncio.gather(early, same_turn, impatient, return_exceptions=True)
    del early, same_turn, impatient
    gc.collect()

    assert reported == []


async def test_close_completes_batches_in_flight_and_refuses_queued_calls():
    bench = Bench(size=1, lanes=1)
    flying = bench.call(1)
    await turns()
    waiting, group = bench.call(2), bench.many([4, 5])
    closing = asyncio.create_task(bench.batcher.close())
    await turns()
    assert not closing.done()
    with pytest.raises(Unavailable):
        await waiting
    assert all(isinstance(outcome, Unavailable) for outcome in await group)
    complete(bench.service.batches[0])
    await closing

    assert await flying == "answer 1"
    assert (bench.batcher.queued, bench.batcher.in_flight, bench.batcher._timer) == (0, 0, None)


async def test_a_call_made_while_closing_is_settled_too():
    bench = Bench(size=1, lanes=1)
    first = bench.call(1)
    await turns()
    outcomes: list[Any] = []

    async def again() -> None:
        await first
        outcomes.extend(await asyncio.gather(bench.call(2), return_exceptions=True))

    task = asyncio.create_task(again())
    closing = asyncio.create_task(bench.batcher.close())
    await turns()
    complete(bench.service.batches[0])
    await turns()
    for batch in bench.service.hanging:
        complete(batch)
    await closing
    await turns()
    for batch in bench.service.hanging:
        complete(batch)
    await task

    assert len(outcomes) == 1


async def test_two_loops_in_two_threads_do_not_disturb_each_other():
    """A context object can be entered once at a time: a shared one made a flush fail, and its batcher deaf for ever."""

    async def busy() -> list[Any]:
        bench = Bench(size=1, lanes=1)
        answers: list[Any] = []
        for _ in range(2_000):
            future = bench.call(1)
            while not bench.service.hanging:
                await asyncio.sleep(0)
            complete(bench.service.hanging[0])
            bench.service.batches.clear()
            answers.append(await asyncio.wait_for(future, 10))
        return answers

    results = await asyncio.gather(*(asyncio.to_thread(asyncio.run, busy()) for _ in range(2)))
    assert results == [["answer 1"] * 2_000] * 2


# ---------------------------------------------------------------------------------------------------- the real timer


def on_both_loops(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


def test_the_timer_rings_by_itself():
    async def body() -> None:
        loop = asyncio.get_running_loop()
        service = Service()
        batcher = Batcher(OPERATION, service.send, size=4, lanes=1, observer=Recorder(), monotonic=loop.time)
        hanging = batcher.submit(1, Context(ANONYMOUS_ACTOR, loop.time() + 0.01, "", ""))
        queued = batcher.submit_many([2], Context(ANONYMOUS_ACTOR, loop.time() + 0.02, "", ""))
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(hanging, 10)
        outcomes = await asyncio.wait_for(queued, 10)
        assert isinstance(outcomes[0], DeadlineExceeded)
        await batcher.close()

    on_both_loops(body)


def test_a_clock_that_stands_or_a_timer_that_rings_early_makes_no_busy_loop():
    async def body() -> None:
        bench = Bench()
        rings = 0
        ring = bench.batcher._on_timer

        def counted() -> None:
            nonlocal rings
            rings += 1
            ring()

        bench.batcher._on_timer = counted
        future = bench.call(1, seconds=0.000_01)  # the timer rings, but for the clock no time has passed
        deadline = asyncio.get_running_loop().time() + 0.05
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0)
        assert 0 < rings <= 60
        bench.clock.now += 1
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(future, 10)
        await bench.finish()

    on_both_loops(body)


def test_the_alarm_is_armed_again_for_the_earliest_deadline_that_is_left():
    async def body() -> None:
        bench = Bench()
        bench.call(1, seconds=50)
        bench.call(2, seconds=10)
        bench.call(4, seconds=30)
        start = bench.clock.now
        assert bench.batcher._timer_at == start + 10
        bench.clock.now = start + 10
        bench.ring()
        assert bench.batcher._timer_at == start + 30
        bench.clock.now = start + 60
        bench.ring()
        assert bench.batcher._timer is None
        bench.call(5, seconds=5)
        assert bench.batcher._timer_at == start + 65
        await bench.finish()

    asyncio.run(body())


# ------------------------------------------------------------------------------------------------------- all of it

Step = tuple[str, int]

STEPS = st.one_of(
    st.tuples(st.just("call"), st.integers(1, 12)),  # seconds until its deadline
    st.tuples(st.just("many"), st.integers(0, 5)),  # how many
    st.tuples(st.just("complete"), st.integers(0, 9)),
    st.tuples(st.just("fail"), st.integers(0, 9)),
    st.tuples(st.just("break"), st.integers(0, 9)),
    st.tuples(st.just("miscount"), st.integers(0, 9)),
    st.tuples(st.just("kill"), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.integers(1, 8)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
    st.tuples(st.just("flush and ring"), st.integers(0, 12)),
)


class Caller:
    """A caller, and how often its call was settled."""

    def __init__(self, future: asyncio.Future[Any], requests: list[int], deadline: float, *, alone: bool) -> None:
        self.future = future
        self.requests = requests
        self.deadline = deadline
        self.alone = alone
        self.left_at: float | None = None
        self.settled = 0
        future.add_done_callback(self._settle)

    def _settle(self, _: object) -> None:
        self.settled += 1


class Schedule:
    """Runs generated steps against a batcher, and checks after each what must always be so."""

    def __init__(self, size: int, lanes: int, queue_limit: int) -> None:
        self.bench = Bench(size=size, lanes=lanes, queue_limit=max(queue_limit, size))
        self.callers: list[Caller] = []
        self.number = 0
        self.unexplained: list[Any] = []

    async def run(self, steps: Sequence[Step]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, problem: self.unexplained.append(problem))
        for name, value in steps:
            await getattr(self, "step_" + name.replace(" ", "_"))(value)
            self.check()
        await self.end()

    async def step_call(self, seconds: int) -> None:
        self.number += 1
        full = self.bench.batcher.queued >= self.bench.batcher.queue_limit
        self.submit(lambda: self.bench.call(self.number, seconds), [self.number], seconds, alone=True, full=full)

    async def step_many(self, count: int) -> None:
        requests = list(range(self.number + 1, self.number + 1 + count))
        self.number += count
        full = count > 0 and self.bench.batcher.queued + count > self.bench.batcher.queue_limit
        self.submit(lambda: self.bench.many(requests, 10), requests, 10, alone=False, full=full)

    def submit(
        self, call: Callable[[], asyncio.Future[Any]], requests: list[int], seconds: float, *, alone: bool, full: bool
    ) -> None:
        try:
            future = call()
        except Overloaded:
            assert full
        else:
            assert not full
            self.callers.append(Caller(future, requests, self.bench.clock.now + seconds, alone=alone))

    async def step_complete(self, which: int) -> None:
        if batch := self.pick(which):
            complete(batch)

    async def step_fail(self, which: int) -> None:
        if batch := self.pick(which):
            batch.result.set_exception(Unavailable(service="things"))

    async def step_break(self, which: int) -> None:
        if batch := self.pick(which):
            batch.result.set_exception(Broken())

    async def step_miscount(self, which: int) -> None:
        if batch := self.pick(which):
            batch.result.set_result(["neighbour"] * (len(batch.requests) + 1))

    async def step_kill(self, which: int) -> None:
        """Cancels the task of a batch, started or not."""
        if batches := list(self.bench.batcher._in_flight):
            task = batches[which % len(batches)].task
            assert task is not None
            task.cancel()

    async def step_cancel(self, which: int) -> None:
        if open_callers := [caller for caller in self.callers if not caller.future.done()]:
            caller = open_callers[which % len(open_callers)]
            caller.future.cancel()
            caller.left_at = self.bench.clock.now

    async def step_wait(self, seconds: int) -> None:
        self.bench.clock.now += seconds
        self.bench.ring()

    async def step_turn(self, count: int) -> None:
        await turns(count)

    async def step_flush_and_ring(self, seconds: int) -> None:
        """The alarm rings in the turn in which batches are sent: their tasks have not begun."""
        self.bench.batcher._flush()
        self.bench.clock.now += seconds
        self.bench.ring()

    def pick(self, which: int) -> Sent | None:
        hanging = self.bench.service.hanging
        return hanging[which % len(hanging)] if hanging else None

    def check(self) -> None:
        batcher, now = self.bench.batcher, self.bench.clock.now
        assert batcher.in_flight <= batcher.lanes
        assert batcher.queued <= batcher.queue_limit
        for caller in self.callers:
            self.check_settled(caller)
            # No caller waits longer than to the deadline, whatever hangs.
            if caller.deadline <= now and batcher._timer_at <= now:
                raise AssertionError("the alarm should have rung")
        self.check_sent()

    def check_settled(self, caller: Caller) -> None:
        assert caller.settled <= 1
        if not caller.future.done():
            assert caller.deadline > self.bench.clock.now, "a deadline has passed in silence"
            return
        if caller.future.cancelled():
            return
        error = caller.future.exception()
        outcomes: Any = [error or caller.future.result()] if caller.alone else caller.future.result()
        assert len(outcomes) == len(caller.requests)
        for request, outcome in zip(caller.requests, outcomes, strict=True):
            own = str(outcome) == str(answer(request))
            assert own or isinstance(outcome, Unavailable | Internal | DeadlineExceeded | OutcomeUnknown), (
                request,
                outcome,
            )

    def check_sent(self) -> None:
        sent = [request for batch in self.bench.service.batches for request in batch.requests]
        assert len(sent) == len(set(sent)), "sent twice"
        for batch in self.bench.service.batches:
            assert 0 < len(batch.requests) <= self.bench.batcher.size
            assert batch.requests == sorted(batch.requests), "out of order"

    async def end(self) -> None:
        """Everything hangs from now on: yet every caller is answered, every lane is free, and the batcher works."""
        await turns()
        self.bench.clock.now += 1_000
        self.bench.ring()
        await turns()
        assert all(caller.future.done() for caller in self.callers)
        assert (self.bench.batcher.in_flight, self.bench.batcher.queued) == (0, 0)
        after = self.bench.call(1_000)
        await turns()
        complete(self.bench.service.batches[-1])
        assert await after == answer(1_000)
        await self.bench.batcher.close()
        self.check()
        self.callers.clear()
        assert self.unexplained == []


@settings(max_examples=400, deadline=None)
@given(
    size=st.integers(1, 4),
    lanes=st.integers(1, 3),
    queue_limit=st.integers(1, 10),
    steps=st.lists(STEPS, max_size=60),
)
def test_any_schedule_keeps_every_invariant(size: int, lanes: int, queue_limit: int, steps: list[Step]):
    asyncio.run(Schedule(size, lanes, queue_limit).run(steps))


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), closed_at=st.integers(0, 40))
def test_close_settles_every_caller_at_any_moment(steps: list[Step], closed_at: int):
    async def body() -> None:
        schedule = Schedule(3, 2, 8)
        for name, value in steps[:closed_at]:
            await getattr(schedule, "step_" + name.replace(" ", "_"))(value)
        closing = asyncio.create_task(schedule.bench.batcher.close())
        await turns()
        for batch in schedule.bench.service.hanging:
            complete(batch)
        await asyncio.wait_for(closing, 10)
        assert all(caller.future.done() for caller in schedule.callers)
        for caller in schedule.callers:
            schedule.check_settled(caller)

    asyncio.run(body())


@settings(max_examples=100, deadline=None)
@given(cancelled=st.sets(st.integers(1, 12)), expired=st.sets(st.integers(1, 12)))
def test_queued_calls_are_sent_unless_they_are_cancelled_or_expired(cancelled: set[int], expired: set[int]):
    async def body() -> None:
        bench = Bench(size=5, lanes=1, queue_limit=20)
        bench.call(100)
        await turns()
        futures = {n: bench.call(n, seconds=1 if n in expired else 1_000) for n in range(1, 13)}
        for number in cancelled:
            futures[number].cancel()
        bench.clock.now += 1
        bench.ring()
        while bench.service.hanging:
            complete(bench.service.hanging[0])
            await turns()
        sent = [request for batch in bench.service.batches[1:] for request in batch.requests]
        assert sent == [n for n in range(1, 13) if n not in cancelled | expired]
        await asyncio.gather(*futures.values(), return_exceptions=True)

    asyncio.run(body())


def test_an_entry_of_a_single_call_takes_one_outcome():
    async def body() -> None:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        entry = PendingRequest(1, Context(ANONYMOUS_ACTOR, 1.0, "", ""), future, 0.0)
        entry.settle("first")
        entry.settle(Refused(number=1))
        assert (entry.is_waiting(), await future) == (False, "first")

    asyncio.run(body())


def _typed(send: Callable[[Sequence[Any], Sequence[Context]], Awaitable[Sequence[Any]]]) -> None:
    del send


_typed(Service().send)
