"""Reconciliation: compares our operations with the provider's statement, in both directions.

There is one round in each period in the whole shop; a lease decides which process executes it:

1. Read the statement from where the last round ended, a page at a time. Compare each line with our operation or intent
   of the same key, and each of our operations whose provider id is in the range of the page with the page.
2. At the end of the statement: our operations that were settled long ago must be on it.
3. Compare the open mismatches again: those that agree by now are resolved.

Safe repairs are made at once (`rules.Repair`): the result of an intent is recorded, an authorization of a closed
payment is voided. Every other difference is a row in `mismatches`, which `mercato_reconciliation_mismatches` counts and
staff have to examine. A round may be executed twice, or in part: a repeated repair changes nothing, and the cursor
moves only after a whole page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import structlog

from mercato.chassis.contract import ServiceError
from mercato.chassis.hosting.table_scan import repairs
from mercato.chassis.observability import faults
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database

from . import reconciliation_store as store, rules
from .finishing import Finishing
from .provider import Page, Provider
from .reconciliation_store import RecordedRow, Reported
from .rules import KeyParts, ProviderResult, StatementLine, Unknown
from .store import OperationId

PAGES_A_ROUND: Final = 100
COMPARED_AT_ONCE: Final = 500

faults.declare(
    "payments.reconcile.before_call",
    "payments.reconcile.after_call",
    "payments.reconcile.before_cursor_commit",
    "payments.reconcile.after_cursor_commit",
)

log = structlog.stdlib.get_logger("mercato.payments")

Theirs = Mapping[str, StatementLine]
Ours = Mapping[str, RecordedRow]


class Reconciling:
    """`period_seconds` between two rounds; `lag_seconds` after which an operation must be on the statement."""

    def __init__(
        self,
        database: Database,
        providers: Mapping[str, Provider],
        finishing: Finishing,
        telemetry: Telemetry,
        *,
        period_seconds: float,
        lag_seconds: float,
    ) -> None:
        self._database = database
        self._providers = providers
        self._finishing = finishing
        self._period_seconds = period_seconds
        self._lag_seconds = lag_seconds
        waiting = "What is wrong, and waits for a person to look at it."
        self._open = telemetry.gauge("mercato_reconciliation_mismatches", waiting, ["kind"], workers="mostrecent")
        self._repaired = repairs(telemetry)

    async def round(self) -> int:
        """Compares with each provider whose lease this process gets; gives how many these were."""
        compared = 0
        for name, provider in self._providers.items():
            async with self._database.transaction() as tx:
                after = await store.cursor(tx, name) if await store.TURN.take(tx, name, self._period_seconds) else None
            if after is not None:
                await self._compare_with(name, provider, after)
                compared += 1
        return compared

    async def _compare_with(self, name: str, provider: Provider, after: int) -> None:
        try:
            await self._read_on(name, provider, after)
            await self._compare_again(name, provider)
        except ServiceError as error:
            log.warning("reconciliation_put_off", provider=name, reason=str(error))
        async with self._database.read() as tx:
            counts = await store.count_mismatches(tx)
        for kind in rules.MISMATCHES:
            self._open.labels(kind).set(counts.get(kind, 0))

    # ----------------------------------------------------------------------------------------------- the statement

    async def _read_on(self, name: str, provider: Provider, after: int) -> None:
        for _ in range(PAGES_A_ROUND):
            page = await _statement(provider, after)
            await self._compare_page(name, provider, after, page)
            async with self._database.transaction() as tx:
                await store.move_cursor(tx, name, after, page.next_after)
                await faults.point("payments.reconcile.before_cursor_commit")
            await faults.point("payments.reconcile.after_cursor_commit")
            after = page.next_after
            if page.is_last:
                await self._compare_beyond(name, provider, after)
                return

    async def _compare_page(self, name: str, provider: Provider, after: int, page: Page) -> None:
        theirs = {line.key: line for line in page.operations}
        async with self._database.read() as tx:
            ours = await store.recorded_by_keys(tx, _parts(theirs))
            placed = await store.recorded_between(tx, name, after, page.next_after, COMPARED_AT_ONCE)
        await self._compare(name, theirs, ours)
        await self._compare_by_key(name, provider, {key: row for key, row in placed.items() if key not in theirs})

    async def _compare_beyond(self, name: str, provider: Provider, after: int) -> None:
        async with self._database.read() as tx:
            beyond = await store.recorded_beyond(tx, name, after, self._lag_seconds, COMPARED_AT_ONCE)
        await self._compare_by_key(name, provider, beyond)

    async def _compare_by_key(self, name: str, provider: Provider, ours: Ours) -> None:
        """Compares our operations that are not on the statement as expected: looks each up at the provider."""
        theirs, uncertain = await _look_up(provider, list(ours))
        await self._compare(name, theirs, {key: row for key, row in ours.items() if key not in uncertain})

    async def _compare_again(self, name: str, provider: Provider) -> None:
        async with self._database.read() as tx:
            open_ = await store.open_mismatches(tx, name, COMPARED_AT_ONCE)
            keys = [mismatch.key for mismatch in open_]
            ours = await store.recorded_by_keys(tx, _parts(keys))
        if not open_:
            return
        theirs, uncertain = await _look_up(provider, keys)
        changed = [
            m for m in open_ if m.key not in uncertain and rules.compare(theirs.get(m.key), ours.get(m.key)) != m.kind
        ]
        async with self._database.transaction() as tx:
            await store.resolve(tx, changed)
        keys = {mismatch.key for mismatch in changed}
        # An operation that differs in another way now is reported, or repaired, as if it were new.
        await self._compare(
            name, {k: theirs[k] for k in keys & theirs.keys()}, {k: ours[k] for k in keys & ours.keys()}
        )

    # ------------------------------------------------------------------------------------------------ differences

    async def _compare(self, name: str, theirs: Theirs, ours: Ours) -> None:
        results: dict[OperationId, ProviderResult] = {}
        charges: dict[int, int] = {}
        mismatches: list[Reported] = []
        for key in sorted(theirs.keys() | ours.keys()):
            line, recorded = theirs.get(key), ours.get(key)
            match rules.compare(line, recorded):
                case "outcome_recorded":
                    assert line
                    assert recorded
                    results[recorded.id] = line.result
                case "authorization_voided":
                    assert line
                    assert line.charge_id is not None
                    assert recorded
                    charges[recorded.payment_id] = line.charge_id
                case None:
                    pass
                case kind:
                    mismatches.append(Reported(kind, key, _described(line, recorded)))
        await self._repair(results, charges)
        await self._report(name, mismatches)

    async def _repair(self, results: Mapping[OperationId, ProviderResult], charges: Mapping[int, int]) -> None:
        if results:
            self._repaired.labels("outcome_recorded").inc(await self._finishing.record_statement(results))
        if charges:
            self._repaired.labels("authorization_voided").inc(await self._finishing.void_authorizations(charges))

    async def _report(self, name: str, mismatches: Sequence[Reported]) -> None:
        if not mismatches:
            return
        for mismatch in mismatches:
            log.error("reconciliation_mismatch", kind=mismatch.kind, key=mismatch.key, detail=mismatch.detail)
        async with self._database.transaction() as tx:
            await store.report(tx, name, mismatches)


async def _statement(provider: Provider, after: int) -> Page:
    await faults.point("payments.reconcile.before_call")
    page = await provider.statement(after)
    await faults.point("payments.reconcile.after_call")
    return page


async def _look_up(provider: Provider, keys: Sequence[str]) -> tuple[dict[str, StatementLine], set[str]]:
    """The provider's operation of each key, and the keys for which it has no certain answer now."""
    found = dict(zip(keys, await provider.look_up(keys), strict=True)) if keys else {}
    return (
        {key: line for key, line in found.items() if isinstance(line, StatementLine)},
        {key for key, line in found.items() if isinstance(line, Unknown)},
    )


def _parts(keys: Iterable[str]) -> dict[str, KeyParts]:
    """The parts of the keys that have the form of ours."""
    return {key: parts for key in keys if (parts := rules.parts_of(key))}


def _described(theirs: StatementLine | None, ours: RecordedRow | None) -> str:
    """Both sides in a sentence, without the method."""
    bank = (
        f"{theirs.kind} {theirs.amount_minor} {theirs.currency} {theirs.code or 'succeeded'}" if theirs else "nothing"
    )
    own = f"{ours.kind} {ours.amount_minor} {ours.currency} {ours.status}" if ours else "nothing"
    return f"the provider has {bank}, we have {own}"
