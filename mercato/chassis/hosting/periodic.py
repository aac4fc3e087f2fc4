"""Work that a process repeats for as long as it runs: sweeps, clean-ups, reconciliations, the reading of event logs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog

from mercato.chassis.contract import SERVICE_ROLE, Actor, Context, current
from mercato.chassis.messaging.consumers import INFRASTRUCTURE
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database, Tx

FIRST_RETRY_SECONDS: Final = 0.5
"""A database that restarts is back within a second or so."""
LONGEST_RETRY_SECONDS: Final = 5.0

log = structlog.stdlib.get_logger("mercato.periodic")

Work = Callable[[], Awaitable[int]]
"""Does one bounded round, and gives how much it did: rows, orders, pages."""


class PeriodicTask(msgspec.Struct, frozen=True):
    """One kind of work of a service. Rounds follow each other; no two of one process run at once.

    After a round that reached its `limit`, the next begins at once. After one that failed, it begins after a pause that
    doubles with each failure in a row, up to `longest_retry_seconds`. A reason is logged once, until rounds fail for
    another reason or succeed.
    """

    name: str
    work: Work
    every_seconds: float
    """The pause after a round that did less than `limit`. Each is up to a fifth shorter or longer, so that processes
    that were started together do not work at the same moment."""
    limit: int | None = None
    """What one round does at most: after a full round there is more to do. None: each is followed by a pause."""
    delay_seconds: float = 0.0
    """The pause before the first round."""
    round_seconds: float = 30.0
    """The deadline of all calls of a round, which the service makes as itself."""
    first_retry_seconds: float = FIRST_RETRY_SECONDS
    on_failure: Callable[[Exception], None] | None = None
    """Reports a failure instead of this module's log."""
    longest_retry_seconds: float = LONGEST_RETRY_SECONDS

    async def run(self, service: str, clock: Clock, telemetry: Telemetry) -> None:
        """Never returns, whatever the work raises. Counts in `mercato_periodic_rounds_total{service,task,outcome}`."""
        counter = telemetry.counter(
            "mercato_periodic_rounds", "Rounds of periodic tasks, by how they ended.", ["service", "task", "outcome"]
        )
        note_done, note_failed = (counter.labels(service, self.name, outcome).add for outcome in ("done", "failed"))
        failures, reason = 0, ""
        await asyncio.sleep(_varied(self.delay_seconds))
        while True:
            current.set(Context(Actor(SERVICE_ROLE), clock.monotonic() + self.round_seconds, "", ""))
            try:
                count = await self.work()
            except Exception as error:  # an edge: no failure of one round may end the others; logged by _report
                note_failed(1)
                before, reason = reason, str(error) or type(error).__name__
                if self.on_failure:
                    self.on_failure(error)
                elif reason != before:
                    self._report(service, error, reason)
                await asyncio.sleep(_varied(min(self.first_retry_seconds * 2**failures, self.longest_retry_seconds)))
                failures = min(failures + 1, 30)
            else:
                note_done(1)
                failures, reason = 0, ""
                is_more_due = self.limit is not None and count >= self.limit
                await asyncio.sleep(0 if is_more_due else _varied(self.every_seconds))

    def _report(self, service: str, error: Exception, reason: str) -> None:
        if isinstance(error, INFRASTRUCTURE):  # the database or a called service is away: a traceback adds nothing
            log.warning("task_waits", service=service, task=self.name, reason=reason)
        else:
            log.error("task_failed", service=service, task=self.name, exc_info=error)


def _varied(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)


def cleaning(database: Database, *deletes: Callable[[Tx], Awaitable[int]]) -> Work:
    """Work that deletes old rows: each of `deletes` deletes up to the limit of the task, and gives how many."""

    async def clean() -> int:
        deleted: list[int] = []
        for delete in deletes:
            async with database.transaction() as tx:
                deleted.append(await delete(tx))
        return max(deleted)

    return clean
