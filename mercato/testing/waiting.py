"""Waiting for a condition, with a bound: a test whose condition does not become true fails with its description."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, Final, TypeVar

from .tables import BLOCKED_STATEMENTS, connected

T = TypeVar("T")

BOUND_SECONDS: Final = 240.0
"""The bound of every wait of a test, for a busy machine. It is no promise about the product."""
POLL_SECONDS: Final = 0.01
TIMED_OUT: Final = "the condition of the test does not become true"


async def until(holds: Callable[[], Awaitable[object]], what: str = TIMED_OUT, seconds: float = BOUND_SECONDS) -> None:
    """Polls until the condition is true. Raises AssertionError with `what` where it is not in time."""
    end = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < end, what
        await asyncio.sleep(POLL_SECONDS)


async def until_true(holds: Callable[[], object], what: str = TIMED_OUT, seconds: float = BOUND_SECONDS) -> None:
    """As `until`, for a condition that needs no await."""

    async def is_true() -> object:
        return holds()

    await until(is_true, what, seconds)


async def until_blocked(dsn: str, statements: int = 1, by: Collection[asyncio.Future[Any]] = ()) -> None:
    """Waits until so many statements in a database wait for a lock.

    `by` are the calls that must wait: the test fails as soon as too few of them are in progress.
    """
    async with connected(dsn) as connection:

        async def are_blocked() -> bool:
            ended = sum(call.done() for call in by)
            assert len(by) - ended >= min(statements, len(by)), f"{ended} calls ended, and did not wait"
            return await connection.fetchval(BLOCKED_STATEMENTS) >= statements

        await until(are_blocked, f"{statements} statements wait for a lock")


async def without_waiting(dsn: str, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Fails as soon as a statement in its database waits for a lock, which might never end."""
    task = asyncio.ensure_future(work)
    try:
        async with asyncio.timeout(BOUND_SECONDS), connected(dsn) as connection:
            while not task.done():
                assert not await connection.fetchval(BLOCKED_STATEMENTS), "it waits for a lock of another transaction"
                await asyncio.wait([task], timeout=POLL_SECONDS)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])


def wait_until(
    condition: Callable[[], object], seconds: float = BOUND_SECONDS, explain: Callable[[], str] = str
) -> None:
    """As `until`, for tests without an event loop; it blocks. `explain` gives the message of the AssertionError."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(POLL_SECONDS)
