"""The counts that the processes of a gateway share."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import sys
from multiprocessing.synchronize import Barrier, Event

import pytest

from mercato.gateway.shared_counts import NOTHING, SLOTS, Changed, Numbers, SharedCounts, new_file

PROCESSES = 2
TIMES = 2_000
LATER = 1e9


class StoppedClock:
    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        return self.seconds


def one_more(numbers: Numbers) -> Changed:
    return Changed((numbers[0] + 1, numbers[1], numbers[2]), LATER)


def look(numbers: Numbers) -> Changed:
    return Changed(numbers, LATER if numbers != NOTHING else 0.0)


def count_up(file: int, start: Barrier) -> None:
    # The other process may lose its processor while it has the lock, for as long as the machine likes.
    counts = SharedCounts(StoppedClock().monotonic, file, lock_attempts=sys.maxsize)
    start.wait()
    for _ in range(TIMES):
        counts.change("a key", one_more)


def test_processes_count_together_and_lose_nothing() -> None:
    file = new_file()
    try:
        forking = multiprocessing.get_context("fork")
        start = forking.Barrier(PROCESSES)
        processes = [forking.Process(target=count_up, args=(file, start)) for _ in range(PROCESSES)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

        assert [process.exitcode for process in processes] == [0] * PROCESSES
        counts = SharedCounts(StoppedClock().monotonic, file)
        assert counts.change("a key", look).numbers == (PROCESSES * TIMES, 0.0, 0.0)
    finally:
        os.close(file)


def test_one_process_alone_shares_nothing() -> None:
    one, other = SharedCounts(StoppedClock().monotonic), SharedCounts(StoppedClock().monotonic)
    one.change("a key", one_more)

    assert one.change("a key", look).numbers == (1.0, 0.0, 0.0)
    assert other.change("a key", look).numbers == NOTHING


def test_what_has_expired_is_forgotten() -> None:
    clock = StoppedClock()
    counts = SharedCounts(clock.monotonic)
    counts.change("a key", lambda _: Changed((1.0, 2.0, 3.0), clock.seconds + 5))
    clock.seconds += 4
    before = counts.change("a key", lambda numbers: Changed(numbers, clock.seconds + 1))
    clock.seconds += 1

    assert before.numbers == (1.0, 2.0, 3.0)
    assert counts.change("a key", look).numbers == NOTHING


@pytest.mark.parametrize("file", ["none", "shared"])
def test_the_memory_is_bounded_and_what_expires_first_gives_way(file: str) -> None:
    descriptor = new_file() if file == "shared" else None
    counts = SharedCounts(StoppedClock().monotonic, descriptor)
    counts.change("lasting", one_more)
    for number in range(3 * SLOTS):
        counts.change(f"passing {number}", lambda _: Changed((1.0, 0.0, 0.0), 2_000.0))

    assert counts.change("lasting", look).numbers[0] == 1
    found = sum(counts.change(f"passing {number}", look_briefly).numbers[0] for number in range(3 * SLOTS))
    assert found < 3 * SLOTS
    if descriptor is not None:
        os.close(descriptor)


def look_briefly(numbers: Numbers) -> Changed:
    return Changed(numbers, 2_000.0)


def test_a_lock_that_is_not_given_back_stops_no_process() -> None:
    file = new_file()
    forking = multiprocessing.get_context("fork")
    locked, done = forking.Event(), forking.Event()
    process = forking.Process(target=hold_all_locks, args=(file, locked, done))
    process.start()
    try:
        assert locked.wait(60)
        counts = SharedCounts(StoppedClock().monotonic, file)
        assert counts.change("a key", one_more).numbers[0] == 1
    finally:
        done.set()
        process.join()
        os.close(file)


def hold_all_locks(file: int, locked: Event, done: Event) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX, 0, 0)
    locked.set()
    done.wait(60)
