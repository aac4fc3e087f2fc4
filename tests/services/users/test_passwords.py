"""Hashing is bounded: two at once, fifty waiting, and no password is hashed for a caller that waits no longer."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from mercato.chassis.contract import Actor, DeadlineExceeded, current
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.observability.clock import SystemClock, SystemRandomness
from mercato.chassis.rpc.client import acting
from mercato.contracts.users import Register, SignIn, TooManyHashes, Users
from mercato.services.users.app import build
from mercato.services.users.passwords import (
    HASH_QUEUE_LIMIT,
    HASH_THREADS,
    NICENESS,
    Argon2Hasher,
    Passwords,
    threads_for,
)
from mercato.testing.harness import ServiceHarness
from mercato.testing.waiting import BOUND_SECONDS

PLACES = HASH_THREADS + HASH_QUEUE_LIMIT


class GatedHasher:
    """A hasher that stands still while its gate is shut. Its hash is the password itself."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.hashed: list[str] = []

    def hash(self, password: str, salt: bytes) -> str:
        self.begun.release()
        assert self.gate.wait(BOUND_SECONDS), "the test forgot to open the gate"
        self.hashed.append(password)
        return password

    def matches(self, password_hash: str, password: str) -> bool:
        return self.hash(password, b"") == password_hash

    def outdated(self, password_hash: str) -> bool:
        return False


class StepClock(SystemClock):
    """A clock that a test moves. It does not begin at 0, or a sum of times could stand for their difference."""

    time = 86_400.75

    def monotonic(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]  # a method, as in the protocol
        return self.time


@pytest.fixture
def hasher() -> Iterator[GatedHasher]:
    made = GatedHasher()
    yield made
    made.gate.set()  # whatever has failed: a service ends only when its hashes have


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
def passwords(hasher: GatedHasher, clock: StepClock) -> Iterator[Passwords]:
    made = Passwords(hasher, clock, SystemRandomness())
    hasher.begun.acquire()
    hasher.hashed.clear()
    yield made
    hasher.gate.set()
    made.close()


async def fill(passwords: Passwords, hasher: GatedHasher, count: int = PLACES) -> list[asyncio.Task[str]]:
    """Shuts the gate and sends so many hashes; returns when both threads stand at the gate."""
    hasher.gate.clear()
    tasks = [asyncio.create_task(passwords.hash(f"password {i}")) for i in range(count)]
    for _ in range(HASH_THREADS):
        assert await asyncio.to_thread(hasher.begun.acquire, timeout=BOUND_SECONDS)
    return tasks


async def test_beyond_the_queue_the_answer_is_at_once_too_many(passwords: Passwords, hasher: GatedHasher):
    tasks = await fill(passwords, hasher)

    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TooManyHashes) as refused:
            await passwords.hash("one too many")
        with pytest.raises(TooManyHashes):
            await passwords.matches(None, "one too many")

    assert refused.value.retry_after_s == 2
    hasher.gate.set()
    assert len(await asyncio.gather(*tasks)) == PLACES
    assert "one too many" not in hasher.hashed


async def test_two_are_hashed_at_once(passwords: Passwords, hasher: GatedHasher):
    tasks = await fill(passwords, hasher)

    assert not hasher.begun.acquire(blocking=False)
    hasher.gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
async def test_the_threads_that_hash_leave_the_cores_to_the_others():
    class Noting(GatedHasher):
        priorities: ClassVar[list[int]] = []

        def hash(self, password: str, salt: bytes) -> str:
            self.priorities.append(os.getpriority(os.PRIO_PROCESS, 0))
            return super().hash(password, salt)

    own = os.getpriority(os.PRIO_PROCESS, 0)
    passwords = Passwords(Noting(), SystemClock(), SystemRandomness())  # makes the decoy on this thread
    await passwords.hash("password")
    passwords.close()

    assert Noting.priorities == [own, min(own + NICENESS, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_one_core_is_left_to_the_others():
    assert [threads_for(cores) for cores in (None, 1, 2, 3, 64)] == [1, 1, 1, 2, 2]


async def test_places_are_given_back(passwords: Passwords, hasher: GatedHasher):
    for _ in range(2):
        tasks = await fill(passwords, hasher)
        hasher.gate.set()
        await asyncio.gather(*tasks)
        for _ in range(PLACES - HASH_THREADS):
            hasher.begun.acquire(blocking=False)


async def test_no_password_is_hashed_for_a_caller_that_is_gone(passwords: Passwords, hasher: GatedHasher):
    tasks = await fill(passwords, hasher)
    for task in tasks[HASH_THREADS:]:
        task.cancel()
    await asyncio.wait(tasks[HASH_THREADS:])

    # Their places are free again, although both threads are still busy.
    late = asyncio.create_task(passwords.hash("late"))
    await asyncio.sleep(0)
    hasher.gate.set()

    assert await late == "late"
    await asyncio.gather(*tasks[:HASH_THREADS])
    assert sorted(hasher.hashed) == ["late", "password 0", "password 1"]


async def test_a_caller_that_leaves_during_its_hash_keeps_its_place_until_the_thread_ends(
    passwords: Passwords, hasher: GatedHasher
):
    tasks = await fill(passwords, hasher)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])

    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TooManyHashes):
            await passwords.hash("one too many")

    hasher.gate.set()
    await asyncio.gather(*tasks[1:])


async def test_no_password_is_hashed_after_the_deadline_of_its_caller(
    passwords: Passwords, hasher: GatedHasher, clock: StepClock
):
    busy = await fill(passwords, hasher, HASH_THREADS)
    current.set(acting(Actor("anonymous"), clock=clock, seconds=5.0))
    waiting = asyncio.create_task(passwords.hash("late"))
    await asyncio.sleep(0)
    clock.time += 5.0
    hasher.gate.set()

    with pytest.raises(DeadlineExceeded):
        await waiting
    await asyncio.gather(*busy)
    assert "late" not in hasher.hashed


async def test_a_caller_that_would_wait_for_half_of_its_time_is_refused_at_once(
    passwords: Passwords, hasher: GatedHasher, clock: StepClock
):
    first = await fill(passwords, hasher, HASH_THREADS)
    clock.time += 2.0  # so long does a hash take here
    hasher.gate.set()
    await asyncio.gather(*first)

    busy = await fill(passwords, hasher, HASH_THREADS)
    current.set(acting(Actor("anonymous"), clock=clock, seconds=10.0))
    # With n before it on two threads it would wait n seconds: the fifth, with six, for more than half of its ten.
    *waiting, refused = [asyncio.create_task(passwords.hash(f"waits {i}")) for i in range(5)]
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TooManyHashes):
            await refused
    hasher.gate.set()

    assert len(await asyncio.gather(*busy, *waiting)) == 6


async def test_without_a_hash_the_work_is_done_and_the_answer_is_no(passwords: Passwords, hasher: GatedHasher):
    assert await passwords.matches("right", "right")
    assert not await passwords.matches("right", "wrong")
    assert not await passwords.matches(None, "anything")
    assert hasher.hashed == ["right", "wrong", "anything"]


async def test_the_decoy_hash_matches_no_password():
    class Yes(GatedHasher):
        def matches(self, password_hash: str, password: str) -> bool:
            return True

    passwords = Passwords(Yes(), SystemClock(), SystemRandomness())
    assert not await passwords.matches(None, "whatever the decoy was made of")
    passwords.close()


async def test_beyond_the_queue_sign_ins_are_refused_and_other_requests_are_answered(
    harness: ServiceHarness, hasher: GatedHasher
):
    @functools.wraps(build)
    def with_gate(env: Env) -> Service:
        return build(env, hasher)

    places = threads_for(os.cpu_count()) + HASH_QUEUE_LIMIT
    users = (await harness.open({"users": with_gate})).client(Users)
    with harness.acting(Actor("anonymous"), seconds=BOUND_SECONDS):
        alice = await users.register(Register(email="alice@example.com", name="Alice", password="correct horse"))
        hasher.gate.clear()
        request = SignIn(email=alice.email, password="correct horse")
        tasks = [asyncio.ensure_future(users.sign_in(request)) for _ in range(places + 3)]
        for answered_first in itertools.islice(asyncio.as_completed(tasks, timeout=BOUND_SECONDS), 3):
            with pytest.raises(TooManyHashes):
                await answered_first
        hasher.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    names = sorted(type(outcome).__name__ for outcome in outcomes)
    assert names == ["Tokens"] * places + ["TooManyHashes"] * 3


def test_argon2id_with_the_parameters_that_owasp_recommends():
    hasher = Argon2Hasher()
    password_hash = hasher.hash("correct horse", b"0123456789abcdef")

    assert password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert hasher.matches(password_hash, "correct horse")
    assert not hasher.matches(password_hash, "correct house")
    assert not hasher.matches(password_hash, "correct \ud800horse")


def test_a_hash_with_other_parameters_is_outdated():
    weak = Argon2Hasher(memory_kib=1_024, iterations=1)
    password_hash = weak.hash("correct horse", b"0123456789abcdef")

    assert Argon2Hasher().outdated(password_hash)
    assert not weak.outdated(password_hash)
    assert Argon2Hasher().matches(password_hash, "correct horse")
