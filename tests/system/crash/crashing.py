"""Crashes at fault points: a shop that is killed at one, started again, killed once more on its way up, and looked at.

For each point, on one data folder:

1. While the shop is at rest, the fault is injected, and a client's scenario runs into it. The process is killed
   (SIGKILL), and its database goes with it.
2. Where the point is one of those that are crashed at in recovery too (`dies_in_recovery`), it is started with the same
   fault still injected. Recovery mostly comes to the same point, and dies there; else it must come to rest.
3. It is started without the fault, and must come to rest. The client, who never got an
   answer, does what is documented: the same again, with the same keys. Everything has happened once, and an audit of
   all databases finds nothing.
4. With `CAMPAIGN=full`: where 2 has killed it, the same once more with an undisturbed recovery.

To be at rest means that no order, payment, event or operation of the bank is on its way anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import http.client
import itertools
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

import asyncpg
import msgspec

from mercato import topology
from mercato.chassis.postgres.outbox_row import end_of_row
from mercato.operations.audit.checking import audit
from mercato.testing.caller import Caller
from mercato.testing.process import Process
from mercato.testing.waiting import BOUND_SECONDS
from system.chaos.final_state import CONSUMED
from system.crash import injectable

IS_CAMPAIGN: Final = os.environ.get("CAMPAIGN") == "full"
SEED: Final = os.environ.get("CRASH_SEED") or f"{datetime.datetime.now(datetime.UTC):%Y%m%d}"
"""Chooses the points that are crashed at in recovery too: others each day. A failure shows it, CRASH_SEED sets it."""
SHARE_IN_RECOVERY: Final = 0.3
SAMPLE_STEP: Final = 29
"""`make test` has every 29th point of each table: being odd, the step takes turns before and after a commit."""
CONVERGED_SECONDS: Final = BOUND_SECONDS
"""A bound for a machine that is busy with other things. On a quiet one nothing is under way after 15 seconds."""
REACHED_SECONDS: Final = 20.0
"""A bound for points that only the shop's own loops come to."""
ATTEMPTS: Final = 5
"""A point that depends on who comes first is tried again."""
POLL_SECONDS: Final = 0.05

QUICKLY: Final[Mapping[str, str]] = {
    "MERCATO_ORDERS_LEASE_SECONDS": "0.5",
    "MERCATO_ORDERS_SWEEP_SECONDS": "0.1",
    "MERCATO_ORDERS_RECONCILE_SECONDS": "0.2",
    "MERCATO_PAYMENTS_SWEEP_SECONDS": "0.1",
    "MERCATO_PAYMENTS_RECONCILE_SECONDS": "0.5",
    "MERCATO_SANDBOX_STATEMENT_DELAY_SECONDS": "0",
    "MERCATO_AUDIT_SECONDS": "0",
}
"""Leases and pauses of a shop with short times. What they mean is the same."""

NO_ANSWER: Final = (OSError, http.client.HTTPException)
# The driver is not at its best when the server dies in the middle of its words.
DATABASE_AWAY: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

# Whatever is still under way, by the database that knows it.
UNREST: Final[Mapping[str, str]] = {
    "orders": """
        SELECT format('order %s: %s %s', s.subject_id, s.kind, s.step)
          FROM sagas s
         WHERE s.driver IS NOT NULL OR (s.wake_at IS NOT NULL AND s.step <> 'awaiting')
        UNION ALL
        SELECT format('order %s is pending', o.id)
          FROM orders o
         WHERE o.status = 'pending'
           AND NOT EXISTS (SELECT FROM sagas s WHERE s.subject_id = o.id AND s.kind = 'checkout' AND step = 'awaiting')
    """,
    "payments": """
        SELECT format('payment %s is pending', id) FROM payments WHERE status = 'pending'
        UNION ALL
        SELECT format('operation %s is %s', key, status) FROM intents
    """,
    "sandbox": "SELECT format('the bank is at %s', key) FROM operations WHERE status = 'processing'",
    "events": "SELECT format('parked event %s of %s', position, source) FROM parked WHERE dead_at IS NULL",
    "products": "SELECT format('parked event %s of %s', position, source) FROM parked WHERE dead_at IS NULL",
    "users": "SELECT format('parked event %s of %s', position, source) FROM parked WHERE dead_at IS NULL",
}

LAST_ROW: Final = "SELECT id FROM outbox ORDER BY id DESC LIMIT 1"
BEHIND: Final = "SELECT consumer FROM cursors WHERE source = $1 AND position < $2"

AUTHORIZED: Final = "SELECT order_id FROM payments WHERE status IN ('pending', 'authorized')"

NO_SETTINGS: Final[Mapping[str, str]] = {}

_numbers = itertools.count(1)


class Crash(msgspec.Struct):
    """A point, and the scenario of a client that comes to it.

    `prepare` is what was done before, when nothing is wrong yet; its result is given to the others. `act` runs into the
    fault, or leaves work for a loop of the shop that does. `recover` is what the client does when the shop is back, and
    says what must have come of it all; by default the same again. A `key` is new for each run.
    """

    point: str
    act: Callable[[Caller, Any], object]
    recover: Callable[[Caller, Any], object] | None = None
    prepare: Callable[[Shop, str], Any] = lambda _shop, key: key
    environment: Mapping[str, str] = NO_SETTINGS
    """For the lives in which the fault is injected."""

    def __str__(self) -> str:
        return self.point


class Shop:
    """A data folder, and the process that serves it at the moment. Use it as a context manager."""

    def __init__(self, data: Path, environment: Mapping[str, str] = NO_SETTINGS) -> None:
        self.data = data
        self._environment = {**QUICKLY, **environment}
        self._own = NO_SETTINGS
        self._process: Process | None = None

    # ----------------------------------------------------------------------------------------------------------- lives

    @property
    def process(self) -> Process:
        assert self._process is not None, "nothing was started"
        return self._process

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.is_running

    def start(self, point: str | None = None, own: Mapping[str, str] = NO_SETTINGS) -> bool:
        """A new process, with a fault injected or without. False: it died there before it was ready."""
        self.stop()
        fault = {} if point is None else {"MERCATO_FAULTS": f"{point}=kill"}
        environment = {**self._environment, **own, **fault}
        self._own = own
        self._process = Process(self.data, environment=environment, has_input=True, first=injectable.prepare)
        self._wait_for("PostgreSQL", "is running")
        if not self._wait_for('"event": "ready"'):
            return False
        self.process.ready()
        return True

    def ensure(self, own: Mapping[str, str] = NO_SETTINGS) -> None:
        """A process without a fault, with these settings."""
        if not self.lives or self._own != own:
            assert self.start(own=own), self.process.output

    def inject(self, point: str) -> bool:
        """From now on the process dies at this point. False: it has done so at once."""
        return self._command(f"inject {point}")

    def remove(self, point: str) -> bool:
        """Removes the fault again. False: the process has died of it."""
        return self._command(f"remove {point}")

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            with self._process:
                self._process = None

    def has_died(self, seconds: float) -> bool:
        """Whether it is dead by then: killed at a point, and everything that it had started gone with it."""
        end = time.monotonic() + seconds
        while self.lives:
            if time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        assert self.process.exit_code() == -9, self.process.output
        self.process.assert_gone()
        return True

    def caller(self) -> Caller:
        return self.process.caller()

    def _command(self, line: str) -> bool:
        self.process.write_line(line)
        return self._wait_for('"event": "executed"', f'"line": "{line}"')

    def _wait_for(self, *words: str) -> bool:
        """Waits for a line with all these words. False: it has died before."""

        def is_said() -> bool:
            return any(all(word in line for word in words) for line in self.process.lines)

        self.process.wait_for(lambda: is_said() or not self.lives, " ".join(words))
        return is_said()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------------- databases

    def execute(self, service: str, statement: str, *values: object) -> None:
        asyncio.run(self._execute(service, statement, *values))

    def fetch(self, service: str, query: str, *values: object) -> list[Any]:
        """The first column."""

        async def fetch() -> list[Any]:
            async with self._connected(service) as connection:
                return await _column(connection, query, *values)

        return asyncio.run(fetch())

    def until(self, service: str, query: str, *values: object) -> list[Any]:
        """The first column of a query, once it gives anything; the query may change what it finds."""
        end = time.monotonic() + CONVERGED_SECONDS
        while not (found := self.fetch(service, query, *values)):
            assert time.monotonic() < end, f"nothing came of {query}"
            time.sleep(POLL_SECONDS)
        return found

    async def _execute(self, service: str, statement: str, *values: object) -> None:
        async with self._connected(service) as connection:
            await connection.execute(statement, *values)

    @contextlib.asynccontextmanager
    async def _connected(self, service: str) -> AsyncGenerator[Any]:
        connection = await cast(Any, asyncpg).connect(self.process.dsn(service), timeout=5)
        try:
            yield connection
        finally:
            with contextlib.suppress(*DATABASE_AWAY):
                await connection.close(timeout=5)

    # ------------------------------------------------------------------------------------------------------------ rest

    def comes_to_rest(self) -> bool:
        """Waits until nothing is under way; fails when that takes longer than is promised. False: it has died."""
        if asyncio.run(self._rests()):
            return True
        assert self.has_died(0)
        return False

    async def _rests(self) -> bool:
        end = time.monotonic() + CONVERGED_SECONDS
        async with contextlib.AsyncExitStack() as stack:
            connections: dict[str, Any] = {}
            while self.lives:
                try:
                    unrest = await self._unrest(stack, connections)
                except DATABASE_AWAY as error:
                    unrest = [repr(error)]
                if not unrest and self.lives:
                    return True
                assert time.monotonic() < end, f"not at rest: {unrest}\n{self.process.output}"
                await asyncio.sleep(POLL_SECONDS)
        return False

    async def _unrest(self, stack: contextlib.AsyncExitStack, connections: dict[str, Any]) -> list[str]:
        found: list[str] = []
        for service in (*UNREST, "inventory"):
            if service not in connections:
                connections[service] = await stack.enter_async_context(self._connected(service))
        for service, query in UNREST.items():
            found += await _column(connections[service], query)
        for source, consumers in CONSUMED.items():
            for last in await _column(connections[source], LAST_ROW):
                for service in consumers:
                    behind = await _column(connections[service], BEHIND, source, end_of_row(last))
                    found += [f"{consumer} has not read all of {source}" for consumer in behind]
        wanted = await _column(connections["payments"], AUTHORIZED)
        held = await _column(connections["sandbox"], "SELECT order_id FROM charges WHERE state = 'open'")
        return [*found, *(f"the bank holds money for order {order_id}" for order_id in held if order_id not in wanted)]

    def assert_correct(self) -> None:
        """Every invariant of the shop holds, of what is there now."""
        dsns = {name: self.process.dsn(name) for name in topology.SERVICES}
        report = asyncio.run(audit(self.process.admin_dsn, dsns, settled_seconds=0))
        assert report.copied_rows > 0
        assert not report.violated, "\n".join(map(str, report.violated))


async def _column(connection: Any, query: str, *values: object) -> list[Any]:
    """The first."""
    return [record[0] for record in await connection.fetch(query, *values)]


# ----------------------------------------------------------------------------------------------------------- the trial


def sample(crashes: Sequence[Crash]) -> Sequence[Crash]:
    """Those that `make test` runs; `make test-all` runs the others."""
    return crashes[::SAMPLE_STEP]


def dies_in_recovery(crash: Crash, seed: str = SEED) -> bool:
    """Whether the shop is crashed at this point in its recovery too: of a campaign all, else a part by the seed."""
    return IS_CAMPAIGN or random.Random(f"{seed} {crash.point}").random() < SHARE_IN_RECOVERY


def crash_and_recover(shop: Shop, crash: Crash) -> None:
    """The four steps above."""
    sys.stdout.write(f"CRASH_SEED={SEED}\n")
    runs = list(_run_into(shop, crash))
    if dies_in_recovery(crash) and _crash_in_recovery(shop, crash) and IS_CAMPAIGN:
        _assert_recovers(shop, crash, runs)
        runs = list(_run_into(shop, crash))
    _assert_recovers(shop, crash, runs)


def _run_into(shop: Shop, crash: Crash) -> Iterator[Any]:
    """Lets the scenario run into the fault. Gives what was prepared, for each attempt that it took."""
    shop.ensure(crash.environment)
    for _ in range(ATTEMPTS):
        prepared = crash.prepare(shop, f"{crash.point}-{next(_numbers)}")
        yield prepared
        shop.inject(crash.point)
        with contextlib.suppress(*NO_ANSWER), shop.caller() as caller:
            crash.act(caller, prepared)
        if shop.has_died(REACHED_SECONDS) or not shop.remove(crash.point):
            return
    raise AssertionError(f"{crash.point} was not reached")


def _crash_in_recovery(shop: Shop, crash: Crash) -> bool:
    """Starts the shop with the fault still injected. False: it came to rest without coming to the point."""
    if not shop.start(crash.point, crash.environment):
        assert shop.has_died(0)
        return True
    return not shop.comes_to_rest() or not shop.remove(crash.point)


def _assert_recovers(shop: Shop, crash: Crash, runs: list[Any]) -> None:
    assert shop.lives or shop.start(), shop.process.output
    assert shop.comes_to_rest()
    for prepared in runs:
        with shop.caller() as caller:
            (crash.recover or crash.act)(caller, prepared)
    assert shop.comes_to_rest()
    shop.assert_correct()
