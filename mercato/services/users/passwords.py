"""Hashing passwords without overloading the shop.

An Argon2id hash is slow by design and takes 19 MiB, so a flood of sign-ins would overload a shop. Hashes therefore run
on at most two threads of their own, with a queue of fifty. A caller gets `TooManyHashes` at once where the queue is
full, and where it would wait there for more than half of the time until its deadline, at the present speed. No password
is hashed for a caller that was cancelled or whose deadline has passed.

Under load these threads get a small share of the cores, and on two cores there is one thread: one core is left to the
rest of the shop. So a flood of sign-ins delays sign-ins, but not other requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

import argon2

from mercato.chassis.contract import DeadlineExceeded, current
from mercato.chassis.observability.clock import Clock, Randomness
from mercato.contracts.users import TooManyHashes

T = TypeVar("T")

HASH_THREADS: Final = 2
"""The most threads; `threads_for` gives their number."""
HASH_QUEUE_LIMIT: Final = 50
WAIT_SHARE: Final = 0.5
"""The largest share of a caller's time for waiting: a longer wait is refused, as in other queues of a server."""
RECENT_WEIGHT: Final = 0.2
"""The weight of the last hash in the moving average of their durations."""
NICENESS: Final = 10
"""Added to the process's niceness for hashing threads: a tenth of its weight. Linux has it for each thread."""
SALT_BYTES: Final = 16

# The OWASP Password Storage Cheat Sheet's first recommendation for Argon2id.
MEMORY_KIB: Final = 19_456
ITERATIONS: Final = 2
LANES: Final = 1


class Hasher(Protocol):
    """A slow, salted hash. Its methods are called on several threads at once."""

    def hash(self, password: str, salt: bytes) -> str:
        """The encoded hash: parameters, salt and digest."""
        ...

    def matches(self, password_hash: str, password: str) -> bool: ...

    def outdated(self, password_hash: str) -> bool:
        """True for a hash with other parameters than the current ones."""
        ...


class Argon2Hasher:
    """Argon2id."""

    def __init__(self, *, memory_kib: int = MEMORY_KIB, iterations: int = ITERATIONS, lanes: int = LANES) -> None:
        self._argon2 = argon2.PasswordHasher(
            time_cost=iterations, memory_cost=memory_kib, parallelism=lanes, salt_len=SALT_BYTES
        )

    def hash(self, password: str, salt: bytes) -> str:
        return self._argon2.hash(_as_bytes(password), salt=salt)

    def matches(self, password_hash: str, password: str) -> bool:
        try:
            return self._argon2.verify(password_hash, _as_bytes(password))
        except argon2.exceptions.VerifyMismatchError:
            return False

    def outdated(self, password_hash: str) -> bool:
        return self._argon2.check_needs_rehash(password_hash)


def threads_for(cores: int | None) -> int:
    """The number of hashing threads for so many cores; None: unknown."""
    return max(1, min(HASH_THREADS, (cores or 1) - 1))


def _lower_own_priority() -> None:
    """Lowers the priority of this thread. On other systems than Linux it would be that of the whole process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it: they hash at the usual priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


def _as_bytes(password: str) -> bytes:
    # A password with a lone surrogate is never stored, but a client may try to sign in with one.
    return password.encode("utf-8", "surrogatepass")


class _Slots:
    """The slots of callers whose hashes run or wait. Used on several threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._taken = 0
        self._hash_s = 0.0
        """The moving average of the duration of a hash; 0.0 before the first."""

    def acquire(self, seconds_left: float) -> bool:
        """Takes a slot for a caller with so much time; False where there is none."""
        with self._lock:
            waits = self._taken >= self._threads
            wait_s = self._taken * self._hash_s / self._threads
            if self._taken >= self._threads + HASH_QUEUE_LIMIT or (waits and wait_s > seconds_left * WAIT_SHARE):
                return False
            self._taken += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._taken -= 1

    def record(self, hash_s: float) -> None:
        with self._lock:
            self._hash_s += (hash_s - self._hash_s) * (RECENT_WEIGHT if self._hash_s else 1.0)


class Passwords:
    """Hashes and checks passwords on threads of its own. Raises `TooManyHashes` and `DeadlineExceeded`."""

    def __init__(self, hasher: Hasher, clock: Clock, randomness: Randomness, *, threads: int = HASH_THREADS) -> None:
        self._hasher = hasher
        self._clock = clock
        self._randomness = randomness
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="password-hash", initializer=_lower_own_priority)
        self._slots = _Slots(threads)
        # A hash with the usual parameters, so that checking against it takes as long as checking a stored one.
        self._decoy = hasher.hash(randomness.token(SALT_BYTES).hex(), randomness.token(SALT_BYTES))

    async def hash(self, password: str) -> str:
        salt = self._randomness.token(SALT_BYTES)
        return await self._run(lambda: self._hasher.hash(password, salt))

    async def matches(self, password_hash: str | None, password: str) -> bool:
        """Whether the password matches the hash. Without a hash it gives False, after the same work."""
        matched = await self._run(lambda: self._hasher.matches(password_hash or self._decoy, password))
        return matched and password_hash is not None

    def outdated(self, password_hash: str) -> bool:
        return self._hasher.outdated(password_hash)

    def close(self) -> None:
        """Waits for the running hashes, and cancels the waiting ones."""
        self._threads.shutdown(cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        call = current.get(None)
        deadline = call.deadline if call else float("inf")
        if not self._slots.acquire(deadline - self._clock.monotonic()):
            raise TooManyHashes
        # The slot is released by the future of the pool, when the thread is done or was never begun. For a cancelled
        # caller that is later than the end of its task.
        future = self._threads.submit(self._if_in_time, work, deadline)
        future.add_done_callback(lambda _: self._slots.release())
        # Cancelling the caller cancels a hash that has not begun.
        return await asyncio.wrap_future(future)

    def _if_in_time(self, work: Callable[[], T], deadline: float) -> T:
        began = self._clock.monotonic()
        if began >= deadline:
            raise DeadlineExceeded(operation="users.password_hash")
        try:
            return work()
        finally:
            self._slots.record(self._clock.monotonic() - began)
