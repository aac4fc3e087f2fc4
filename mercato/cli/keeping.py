"""Restarts an embedded server of a shop (PostgreSQL, NATS) that dies, at the same address."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, Protocol, TypeVar

from mercato.cli.progress import Progress
from mercato.embedded_postgres import SupervisorError

RESTARTS: Final = 3
WITHIN_SECONDS: Final = 60.0
"""A server that dies more often within a minute has a cause that a restart does not remove."""

STOPPED: Final = "the shop has stopped. Start it again: no acknowledged order is lost"


class EmbeddedServer(Protocol):
    """A server under guard, such as `EmbeddedPostgres`."""

    async def stop(self) -> None: ...

    async def died(self) -> str:
        """Waits until it ends without having been asked to; gives a sentence about it."""
        ...


S = TypeVar("S", bound=EmbeddedServer)


@contextlib.asynccontextmanager
async def kept(
    server: S, again: Callable[[S], Awaitable[S]], name: str, progress: Progress, give_up: Callable[[str], None]
) -> AsyncGenerator[None]:
    """Keeps `server` running for the time of the block, and stops it at its end.

    `again` starts it at the same address after it has died. `give_up` gets a sentence if that fails: the server died
    more than `RESTARTS` times within a minute, or does not start.
    """
    current = [server]
    watch = asyncio.create_task(_watch(current, again, name, progress, give_up), name=f"keep {name}")
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait({watch})
        await current[0].stop()


async def _watch(
    current: list[S],
    again: Callable[[S], Awaitable[S]],
    name: str,
    progress: Progress,
    give_up: Callable[[str], None],
) -> None:
    deaths = collections.deque[float](maxlen=RESTARTS + 1)
    while True:
        sentence = (await current[0].died()).rstrip(".")
        deaths.append(time.monotonic())
        if len(deaths) > RESTARTS and deaths[-1] - deaths[0] < WITHIN_SECONDS:
            give_up(f"{sentence}, for the {len(deaths)}th time within a minute; {STOPPED}")
            return
        progress.step(f"{sentence}: starting it again")
        try:
            current[0] = await again(current[0])
        except SupervisorError as error:
            give_up(f"{str(error).rstrip('.')}; {STOPPED}")
            return
        progress.step(f"{name} is running again")
