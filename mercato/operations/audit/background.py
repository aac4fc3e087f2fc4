"""The periodic audit of a running shop, every few minutes, and where its result is shown.

Every process has a `Background`. One of them takes the lease (`store.TURN`) and audits; all read the result and
show it: `mercato_audit_violations{invariant}`, `mercato_audit_timestamp_seconds`, and `audit` in `/health/ready`. A
violation does not make a shop unready: it continues to sell, and an operator has to investigate.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.operations.audit import store
from mercato.operations.audit.checking import SETTLED_SECONDS, audit
from mercato.operations.copying import SCRATCH, ensured
from mercato.operations.ids import advance

FIRST_SECONDS: Final = 30.0
"""The delay after the start of a process, which is busy then; shorter where audits are more frequent."""
LOOK_SECONDS: Final = (0.5, 15.0)
"""Bounds of the time between two reads of the last result, which is a tenth of the time between audits."""
CLOSE_SECONDS: Final = 0.5

log = structlog.stdlib.get_logger("mercato.operations.audit")


class Last(msgspec.Struct, frozen=True):
    """The last audit, whichever process made it."""

    at: datetime.datetime
    violations: Mapping[str, int]
    """The number of violations of every invariant, also of those that hold."""


class Background:
    """Audits the shop every `every_seconds`, in one of its processes, for as long as it is `running`. 0: never."""

    def __init__(
        self,
        admin_dsn: str,
        dsns: Mapping[str, str],
        telemetry: Telemetry,
        *,
        every_seconds: float,
        settled_seconds: float = SETTLED_SECONDS,
    ) -> None:
        self._admin_dsn = admin_dsn
        self._dsns = dsns
        self._telemetry = telemetry
        self._every_seconds = every_seconds
        self._settled_seconds = settled_seconds
        self._last: Last | None = None
        self._failure = ""
        self._logged = ""
        self._database: Database | None = None
        if not every_seconds:
            telemetry = Telemetry()  # it shows none: an audit that is never made is not late
        # Every process shows the result that it has read last: the most recent value is the newest.
        violations = "Places where an invariant did not hold in the last audit."
        self._violations = telemetry.gauge("mercato_audit_violations", violations, ["invariant"], workers="mostrecent")
        timestamp = "When the databases were copied for the last audit."
        self._timestamp = telemetry.gauge("mercato_audit_timestamp_seconds", timestamp, workers="mostrecent")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Runs it for the time of the block; with 0 seconds between audits, not at all."""
        if not self._every_seconds:
            yield
            return
        shortest, longest = LOOK_SECONDS
        turns = PeriodicTask(
            "audit",
            self.turn,
            min(max(self._every_seconds / 10, shortest), longest),
            delay_seconds=min(FIRST_SECONDS, self._every_seconds),
            on_failure=self._report,
        )
        task = asyncio.create_task(turns.run("audit", SystemClock(), self._telemetry))
        try:
            yield
        finally:
            task.cancel()
            # The end of a process does not wait for an audit: the server ends its sessions.
            await asyncio.wait({task}, timeout=CLOSE_SECONDS)

    async def turn(self) -> bool:
        """Audits if it is time and no other process does; then shows the last result. Gives whether it audited.

        Raises the errors of the server: `CopyError`, `Unavailable`. Nothing is left open when it is cancelled.
        """
        try:
            mine = await self._turn()
        except Exception as error:
            # It may be deleted, or created again without its table: the next turn opens it anew.
            self._database = None
            self._failure = _sentence(error)
            raise
        self._failure = self._logged = ""
        return mine

    def _report(self, error: Exception) -> None:
        """Logs a failure, such as that of a role that may not create databases, once until it changes."""
        if _sentence(error) != self._logged:
            self._logged = _sentence(error)
            log.warning("audit_failed", reason=self._logged)

    async def _turn(self) -> bool:
        database = await self._opened()
        try:
            async with database.transaction() as tx:
                mine = await store.TURN.take(tx, store.LAST, self._every_seconds)
            if mine:
                await self._audit(database)
            async with database.read() as tx:
                row = await store.latest(tx)
        finally:
            # Closed between turns: a connection for each process would reduce those that serve requests.
            await database.close()
        if row is not None:
            self._show(Last(row.at, msgspec.json.decode(row.violations, type=dict[str, int])))
        return mine

    def details(self) -> Mapping[str, Any]:
        """For `/health/ready`: the violations of the last audit; empty before the first.

        While turns fail, `failure` says why: the last result gets older.
        """
        shown: dict[str, Any] = {}
        if self._last is not None:
            violations = {name: count for name, count in self._last.violations.items() if count}
            shown = {"at": self._last.at, "violations": violations}
        if self._failure:
            shown["failure"] = self._failure
        return {"audit": shown} if shown else {}

    async def _audit(self, database: Database) -> None:
        await advance(self._dsns)
        report = await audit(self._admin_dsn, self._dsns, settled_seconds=self._settled_seconds)
        for finding in report.violated:
            log.error("invariant_violated", invariant=finding.name, title=finding.title, times=finding.violations)
        violations = {finding.name: finding.violations for finding in report.findings}
        async with database.transaction() as tx:
            await store.save(tx, report.taken_at, msgspec.json.encode(violations).decode())

    def _show(self, last: Last) -> None:
        self._last = last
        for name, count in last.violations.items():
            self._violations.labels(name).set(count)
        self._timestamp.set(last.at.timestamp())

    async def _opened(self) -> Database:
        if self._database is None:
            database = Database(await ensured(self._admin_dsn, SCRATCH), "audit", self._telemetry, size=1)
            await database.open()
            try:
                async with database.transaction() as tx:
                    await store.make_table(tx)
            except BaseException:
                await database.close()
                raise
            self._database = database
        else:
            await self._database.open()
        return self._database


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
