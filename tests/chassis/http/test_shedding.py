"""Which requests are let into work, which wait, and which are refused, on a clock that the tests move."""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Any

import msgspec
import pytest

from mercato.chassis.contract import Overloaded
from mercato.chassis.http import LoadLimits, Priority, Shedder
from mercato.chassis.observability.telemetry import Telemetry

PAY, ORDER, BROWSE, REPORT = Priority
DEADLINE_SECONDS = 10.0
NO_SWEEP = LoadLimits(sweep_seconds=3_600.0, refusal_seconds=0.0)
"""Only the test says when what waits is looked through; refusals go out at once."""
TEN = msgspec.structs.replace(NO_SWEEP, floor=10, start=10, ceiling=10)
WINDOW = 32
"""As `LoadLimits.window_requests`: the fewest requests of a window."""


class Served:
    """A shedder, its clock, and an application that does what the prologue of the module says."""

    def __init__(self, limits: LoadLimits = TEN, *, jitter: float = 0.0) -> None:
        self.now = 1_000.0
        self.looks = 0
        """How often the shedder has read the clock."""
        self.telemetry = Telemetry()
        self.shedder = Shedder(limits, monotonic=self.monotonic, telemetry=self.telemetry, jitter=lambda: jitter)
        self.tasks: list[asyncio.Task[float]] = []

    def monotonic(self) -> float:
        self.looks += 1
        return self.now

    def enters(self, priority: Priority) -> bool:
        """Whether a request of a class enters at once; it stays in work until `leaves`."""
        shedder = self.shedder
        if shedder.in_work >= shedder.capacity[priority]:
            return False
        shedder.in_work += 1
        shedder.peak = max(shedder.peak, shedder.in_work)
        return True

    def fill(self, priority: Priority) -> int:
        """Lets in what may enter; how many that were."""
        entered = 0
        while self.enters(priority):
            entered += 1
        return entered

    def leaves(self) -> None:
        self.shedder.in_work -= 1
        self.shedder.end_window()

    async def waits(self, priority: Priority, seconds: float = DEADLINE_SECONDS) -> asyncio.Task[float]:
        """A request that is in the queue, or was refused there."""
        task = asyncio.create_task(self.shedder.queue(priority, f"a {priority.name}", self.now + seconds))
        self.tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def outcomes(self, *tasks: asyncio.Task[float]) -> list[str]:
        """Of each request: in, refused or waits."""
        for _ in range(3):
            await asyncio.sleep(0)
        return [
            "waits" if not task.done() else "refused" if isinstance(task.exception(), Overloaded) else "in"
            for task in tasks
        ]

    def window(self, *, slow: int, peak: int | None = None, seconds: float = 0.11) -> int:
        """A window of requests in which so many were slow; the limit after it."""
        shedder = self.shedder
        shedder.peak = shedder.limit if peak is None else peak
        shedder.measured, shedder.slow = WINDOW, slow
        self.now += seconds
        shedder.end_window()
        return shedder.limit

    def shown(self, name: str, **labels: str) -> float | None:
        return self.telemetry.registry.get_sample_value(name, labels)

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def refusal(task: asyncio.Task[float]) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        await task
    return caught.value


# The limit


async def test_limit_falls_by_a_tenth_after_a_slow_window_and_rises_by_a_step_after_a_fast_one() -> None:
    served = Served(LoadLimits(floor=64, start=256, ceiling=512))
    assert served.window(slow=WINDOW) == 230
    assert served.window(slow=4) == 207  # more than a tenth
    assert served.window(slow=3) == 215
    assert served.window(slow=0) == 223
    assert served.shown("mercato_http_limit") == 223


async def test_limit_stays_between_floor_and_ceiling() -> None:
    served = Served(LoadLimits(floor=64, start=256, ceiling=512))
    assert [served.window(slow=WINDOW) for _ in range(30)][-2:] == [64, 64]
    assert [served.window(slow=0) for _ in range(60)][-2:] == [512, 512]


async def test_limit_falls_below_its_floor_only_while_the_queue_stands() -> None:
    served = Served(msgspec.structs.replace(NO_SWEEP, floor=192, standing_floor=64, start=192))
    assert served.window(slow=WINDOW) == 192
    served.fill(PAY)
    waiting = await served.waits(BROWSE)
    limits = [served.window(slow=WINDOW) for _ in range(20)]
    assert (limits[0], limits[-1]) == (172, 64)
    waiting.cancel()
    await asyncio.sleep(0)
    assert served.shedder.waiting == 0
    assert served.window(slow=WINDOW) == 192


def test_lower_ceiling_lowers_floor_and_start() -> None:
    low, high, usual = LoadLimits.up_to(10), LoadLimits.up_to(1_000), LoadLimits()
    assert (low.floor, low.start, low.ceiling) == (10, 10, 10)
    assert (high.floor, high.start, high.ceiling) == (usual.floor, usual.start, 1_000)


async def test_limit_stays_where_fewer_than_half_of_it_are_in_work() -> None:
    served = Served(LoadLimits(floor=64, start=256, ceiling=512))
    assert served.window(slow=WINDOW, peak=127) == 256
    assert served.window(slow=0, peak=127) == 256
    assert served.window(slow=WINDOW, peak=128) == 230


async def test_window_lasts_until_it_has_requests_enough_and_time_enough() -> None:
    served = Served(LoadLimits(floor=64, start=256, ceiling=512))
    shedder = served.shedder
    shedder.peak, shedder.measured = 256, WINDOW
    shedder.end_window()
    assert shedder.limit == 256
    served.now += 0.11
    shedder.measured = WINDOW - 1
    shedder.end_window()
    assert shedder.limit == 256
    shedder.measured = WINDOW
    shedder.end_window()
    assert (shedder.limit, shedder.measured, shedder.peak) == (264, 0, 0)


async def test_limit_that_rises_lets_in_what_waits() -> None:
    served = Served(msgspec.structs.replace(TEN, ceiling=100))
    served.fill(PAY)
    served.now += 0.1
    waiting = await served.waits(PAY)
    served.window(slow=0, seconds=0.0)
    assert await served.outcomes(waiting) == ["in"]


# Shares


async def test_each_class_leaves_room_for_those_above_it() -> None:
    served = Served(LoadLimits(floor=100, start=100, ceiling=100))
    assert [served.fill(priority) for priority in reversed(Priority)] == [50, 20, 20, 10]


async def test_every_class_has_a_place_in_the_smallest_limit() -> None:
    served = Served(LoadLimits(floor=1, start=1, ceiling=1))
    assert served.shedder.capacity == (1, 1, 1, 1)


# The queue


async def test_queue_lets_in_higher_classes_first_and_the_longest_waiting_of_a_class() -> None:
    served = Served()
    served.fill(PAY)
    browse, order, pay, later = [await served.waits(each) for each in (BROWSE, ORDER, PAY, PAY)]
    served.leaves()
    assert await served.outcomes(browse, order, pay, later) == ["waits", "waits", "in", "waits"]
    served.leaves()
    assert await served.outcomes(browse, order, later) == ["waits", "waits", "in"]
    served.leaves()
    assert await served.outcomes(browse, order) == ["waits", "waits"]  # nine are in work, and orders have nine places
    served.leaves()
    assert await served.outcomes(browse, order) == ["waits", "in"]
    assert served.shedder.in_work == 9
    for _ in range(3):
        served.leaves()
    assert await served.outcomes(browse) == ["in"]
    assert served.shedder.waiting == 0
    assert served.shown("mercato_http_waiting") == 0


async def test_one_place_goes_to_the_highest_class_that_waits() -> None:
    served = Served(msgspec.structs.replace(TEN, floor=1, start=1, ceiling=1))
    served.fill(PAY)
    report, browse = await served.waits(REPORT), await served.waits(BROWSE)
    served.leaves()
    assert await served.outcomes(report, browse) == ["waits", "in"]
    await served.end()


async def test_request_that_was_let_in_counts_among_the_most_in_work() -> None:
    served = Served()
    served.fill(PAY)
    waiting = await served.waits(PAY)
    served.shedder.peak = 0
    served.leaves()
    assert await served.outcomes(waiting) == ["in"]
    assert served.shedder.peak == 10


async def test_full_queue_refuses_the_newcomer() -> None:
    served = Served(jitter=0.99)
    served.fill(PAY)
    waiting = [await served.waits(BROWSE) for _ in range(20)]
    assert served.shown("mercato_http_waiting") == 20
    with pytest.raises(Overloaded):
        await served.shedder.check(BROWSE, "GET /products")
    error = await refusal(await served.waits(BROWSE))
    assert (error.retry_after_s, error.operation) == (3, "a BROWSE")
    assert set(await served.outcomes(*waiting)) == {"waits"}
    assert served.shown("mercato_http_shed_total", **{"class": "browse", "reason": "queue_full"}) == 2
    await served.end()


async def test_refusals_for_a_full_queue_go_out_a_few_at_once_the_oldest_first() -> None:
    served = Served(msgspec.structs.replace(TEN, queue_share=0.0, refusal_seconds=3_600.0, refusals_at_once=2))
    served.fill(PAY)
    gone, *others = [await served.waits(BROWSE) for _ in range(6)]
    assert set(await served.outcomes(gone, *others)) == {"waits"}
    gone.cancel()
    loop = asyncio.get_running_loop()
    served.shedder.send_refusals(loop)
    assert await served.outcomes(*others) == ["refused", "refused", "waits", "waits", "waits"]
    served.shedder.send_refusals(loop)
    assert await served.outcomes(*others) == [*["refused"] * 4, "waits"]
    assert served.shedder.waiting == 0
    await served.end()


@pytest.mark.parametrize(("late_seconds", "sent"), [(0.001, 2), (0.016, 3), (0.051, 10), (9.0, 12)])
async def test_late_timer_sends_as_many_refusals_more(late_seconds: float, sent: int) -> None:
    pace = {"refusal_seconds": 0.01, "refusals_at_once": 2, "most_refusals_at_once": 12}
    served = Served(msgspec.structs.replace(TEN, queue_share=0.0, **pace))
    served.fill(PAY)
    answered: list[int] = []

    def answer(number: int) -> bool:
        answered.append(number)
        return True

    for number in range(15):
        served.shedder.hold(functools.partial(answer, number))
    served.now += late_seconds
    served.shedder.send_refusals(asyncio.get_running_loop())
    assert answered == list(range(sent))


async def test_timer_sends_refusals_until_there_are_no_more() -> None:
    served = Served(msgspec.structs.replace(TEN, queue_share=0.0, refusal_seconds=0.001, refusals_at_once=1))
    served.fill(PAY)
    async with asyncio.timeout(60):
        for _ in range(2):
            for task in [await served.waits(BROWSE) for _ in range(3)]:
                assert isinstance(await refusal(task), Overloaded)


async def test_full_queue_gives_the_place_of_the_oldest_of_the_lowest_class_to_a_higher_one() -> None:
    served = Served()
    served.fill(PAY)
    oldest, *others = [await served.waits(BROWSE) for _ in range(20)]
    await served.shedder.check(ORDER, "POST /orders")
    order = await served.waits(ORDER)
    assert await served.outcomes(oldest, order) == ["refused", "waits"]
    assert set(await served.outcomes(*others)) == {"waits"}
    assert served.shedder.waiting == 20
    assert served.shown("mercato_http_shed_total", **{"class": "browse", "reason": "displaced"}) == 1
    await served.end()


async def test_queue_that_begins_to_stand_while_a_request_comes_displaces_none_of_a_higher_class() -> None:
    served = Served(msgspec.structs.replace(TEN, standing_share=0.1))
    served.fill(PAY)
    orders = [await served.waits(ORDER) for _ in range(2)]
    looks = served.looks
    # When it is looked whether the request can wait, and at once after it.
    served.shedder._monotonic = lambda: served.monotonic() + (0.0999 if served.looks == looks + 1 else 0.1001)
    browse = await served.waits(BROWSE)
    assert await served.outcomes(*orders, browse) == ["waits"] * 3
    await served.end()


async def test_full_queue_spares_the_higher_of_two_lower_classes() -> None:
    served = Served()
    served.fill(PAY)
    browse = [await served.waits(BROWSE) for _ in range(10)]
    report = [await served.waits(REPORT) for _ in range(10)]
    await served.waits(ORDER)
    assert set(await served.outcomes(*browse)) == {"waits"}
    assert await served.outcomes(*report) == ["refused", *["waits"] * 9]
    await served.end()


async def test_refused_clients_get_different_times_to_retry() -> None:
    seconds: set[int | None] = set()
    for jitter in (0.0, 0.34, 0.67, 0.999):
        served = Served(msgspec.structs.replace(TEN, queue_share=0.0), jitter=jitter)
        seconds.add((await refusal(await served.waits(BROWSE))).retry_after_s)
    assert seconds == {1, 2, 3}


# Waiting


async def test_request_that_waited_for_half_of_its_time_is_refused() -> None:
    served = Served(msgspec.structs.replace(TEN, standing_seconds=1e9))
    served.fill(PAY)
    short, long = await served.waits(PAY, seconds=4.0), await served.waits(PAY, seconds=6.0)
    served.now += 1.9
    served.shedder.expire()
    assert await served.outcomes(short, long) == ["waits", "waits"]
    served.now += 0.2
    served.shedder.expire()
    assert await served.outcomes(short, long) == ["refused", "waits"]
    served.now += 1.0
    served.leaves()  # no request is left that may take the place
    assert await served.outcomes(long) == ["refused"]
    assert served.shedder.in_work == 9
    assert served.shown("mercato_http_shed_total", **{"class": "pay", "reason": "waited"}) == 2


async def test_standing_queue_lets_in_the_newest_and_refuses_what_waited_for_long() -> None:
    served = Served()
    served.fill(PAY)
    old = await served.waits(PAY)
    served.now += 0.07
    newer, newest = await served.waits(PAY), await served.waits(PAY)
    served.shedder.expire()
    assert await served.outcomes(old, newer, newest) == ["waits"] * 3  # a burst, until a tenth of a second is over
    served.now += 0.04
    served.leaves()
    assert await served.outcomes(old, newer, newest) == ["waits", "waits", "in"]
    served.shedder.expire()
    assert await served.outcomes(old, newer) == ["refused", "waits"]
    served.now += 0.03
    served.shedder.expire()
    assert await served.outcomes(newer) == ["refused"]
    assert served.shedder.waiting == 0
    soon = await served.waits(PAY)
    served.now += 0.06
    served.shedder.expire()
    assert await served.outcomes(soon) == ["refused"]  # the queue was empty, but something was refused a moment ago
    served.now += 0.1
    again = await served.waits(PAY)
    served.now += 0.09
    served.shedder.expire()
    assert await served.outcomes(again) == ["waits"]  # and is none that stands
    await served.end()


async def test_standing_queue_takes_less_until_nothing_was_refused_for_a_while() -> None:
    served = Served(msgspec.structs.replace(TEN, standing_share=0.3, standing_wait_seconds=1e9))
    served.fill(PAY)
    waiting = [await served.waits(PAY) for _ in range(3)]
    assert not served.shedder.is_full(PAY)
    served.now += 0.1
    assert served.shedder.is_full(PAY)
    served.shedder.count_refusal(PAY, "queue_full")
    for _ in range(5):
        served.now += 0.09
        served.leaves()
        served.enters(PAY)
        if served.shedder.waiting < 3:
            waiting.append(await served.waits(PAY))
        assert served.shedder.is_full(PAY)
        served.shedder.count_refusal(PAY, "queue_full")
    while served.shedder.waiting:
        served.leaves()
    served.fill(PAY)
    served.now += 0.1
    waiting += [await served.waits(PAY) for _ in range(20 - served.shedder.waiting)]
    assert served.shedder.is_full(PAY)
    assert set(await served.outcomes(*waiting[-20:])) == {"waits"}
    await served.end()


async def test_timer_refuses_what_waits_although_no_request_ends() -> None:
    served = Served(msgspec.structs.replace(TEN, sweep_seconds=0.001))
    served.fill(PAY)
    waiting = await served.waits(PAY)
    async with asyncio.timeout(60):
        looks = served.looks
        while served.looks < looks + 2:  # two sweeps
            await asyncio.sleep(0)
        assert await served.outcomes(waiting) == ["waits"]
        served.now += 0.2
        assert isinstance(await refusal(waiting), Overloaded)
    assert served.shedder.waiting == 0


# Requests that are cancelled


async def test_cancelled_request_leaves_the_queue() -> None:
    served = Served()
    served.fill(PAY)
    first, second = await served.waits(PAY), await served.waits(PAY)
    first.cancel()
    served.leaves()  # in the turn of the cancellation
    assert await served.outcomes(second) == ["in"]
    assert (served.shedder.in_work, served.shedder.waiting) == (10, 0)
    third = await served.waits(PAY)
    third.cancel()
    served.now += 0.2
    served.shedder.expire()
    with pytest.raises(asyncio.CancelledError):
        await third
    assert (served.shedder.in_work, served.shedder.waiting) == (10, 0)


async def test_request_that_is_cancelled_once_it_was_let_in_gives_its_place_to_the_next() -> None:
    served = Served()
    served.fill(PAY)
    first, second = await served.waits(PAY), await served.waits(PAY)
    served.leaves()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await served.outcomes(second) == ["in"]
    assert (served.shedder.in_work, served.shedder.waiting) == (10, 0)


# All together


@pytest.mark.parametrize("seed", range(20))
async def test_every_request_has_one_outcome_and_no_place_is_lost(seed: int) -> None:
    chosen = random.Random(seed)
    served = Served(msgspec.structs.replace(NO_SWEEP, floor=4, start=6, ceiling=9, window_requests=4), jitter=0.5)
    shedder, in_work, waiting = served.shedder, 0, list[asyncio.Task[Any]]()

    def note_entered() -> int:
        entered = [task for task in waiting if task.done() and not task.cancelled() and not task.exception()]
        waiting[:] = [task for task in waiting if not task.done()]
        return len(entered)

    for _ in range(400):
        step = chosen.random()
        if step < 0.5:
            priority = chosen.choice(list(Priority))
            if served.enters(priority):
                in_work += 1
            else:
                waiting.append(await served.waits(priority))
        elif step < 0.8 and in_work:
            in_work -= 1
            shedder.measured += 1
            shedder.slow += chosen.random() < 0.2
            served.leaves()
        elif step < 0.9 and waiting:
            chosen.choice(waiting).cancel()
        else:
            served.now += chosen.random() * 0.1
            shedder.expire()
        await served.outcomes()
        in_work += note_entered()
        assert shedder.in_work == in_work <= 9
        assert shedder.waiting == len(waiting) == sum(map(len, shedder._queues))
        assert 4 <= shedder.limit <= 9
        assert shedder.waiting <= 2 * 9
    while in_work:
        in_work -= 1
        served.leaves()
        await served.outcomes()
        in_work += note_entered()
    assert (shedder.in_work, shedder.waiting, waiting) == (0, 0, [])
