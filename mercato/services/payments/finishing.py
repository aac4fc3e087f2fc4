"""Finishes operations that no request waits for any more: the sweep, and the repairs of the reconciliation.

Both use parts 2 and 3 of `charging.py`, with the stored keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import structlog

from mercato.chassis.contract import ServiceError
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database

from . import list_store, operation_store, payment_store, rules
from .charging import Charging, ProviderCall, Results, new_intent, operations, settle, write_payments
from .rules import NextOperation, Succeeded
from .store import PaymentRow

SWEPT_AT_ONCE: Final = 256

faults.declare("payments.reconcile.before_record_commit", "payments.reconcile.after_record_commit")

log = structlog.stdlib.get_logger("mercato.payments")


class Finishing:
    """The sweep after a crash, and the repairs of the reconciliation."""

    def __init__(self, database: Database, charging: Charging) -> None:
        self._database = database
        self._charging = charging

    # ----------------------------------------------------------------------------------------------------------- sweep

    async def sweep(self, quiet_seconds: float) -> int:
        """Calls the provider again with intents that no process has settled for a while; gives how many these were.

        This finishes the operations of a process that died between the parts, and those whose answer was lost where the
        client does not repeat its request.
        """
        async with self._database.transaction() as tx:
            due = await operation_store.lease_intents(tx, quiet_seconds, SWEPT_AT_ONCE)
            payments = await list_store.payments(tx, [intent.payment_id for intent in due]) if due else {}
            await faults.point("payments.sweep.before_intent_commit")
        await faults.point("payments.sweep.after_intent_commit")
        calls = [ProviderCall(intent, payments[intent.payment_id]) for intent in due]
        try:
            await self._finish("sweep", calls)
        except ServiceError:
            raise  # the database or the provider is unavailable: single calls would fail as well
        except Exception as error:  # an edge: one operation that fails must not block the others
            log.warning("sweep_rerun", size=len(calls), exc_info=error)
            for call in calls:
                await self._finish_alone(call)
        return len(due)

    async def _finish(self, flow: str, calls: Sequence[ProviderCall]) -> None:
        await self._charging.record_results(flow, calls, await self._charging.call_provider(flow, calls))

    async def _finish_alone(self, call: ProviderCall) -> None:
        try:
            await self._finish("sweep", [call])
        except ServiceError:
            raise
        except Exception:  # an edge, as above
            log.exception("operation_not_finished", key=call.intent.key)

    # ---------------------------------------------------------------------------------------------------------- repair

    async def record_statement(self, results: Results) -> int:
        """Records the results of intents that are on the provider's statement; gives how many it settled."""
        async with self._database.transaction() as tx:
            settled = await settle(tx, results)
            await faults.point("payments.reconcile.before_record_commit")
        await faults.point("payments.reconcile.after_record_commit")
        return len(settled)

    async def void_authorizations(self, charges: Mapping[int, int]) -> int:
        """Voids authorizations that the provider holds for payments that are closed; gives how many it voided.

        `charges` by payment. All voids of a payment have one key, so that two processes void it once.
        """
        async with self._database.transaction() as tx:
            payments = await payment_store.lock_payments(tx, sorted(charges))
            closed = {i: _with_charge(p, charges[i]) for i, p in payments.items() if p.status in rules.CLOSED}
            known = await operations(tx, closed)
            unvoided = [p for p in closed.values() if ("void", "") not in known[p.id]]
            await write_payments(tx, [p for p in unvoided if p is not payments[p.id]])
            voids = [new_intent(p, NextOperation("void", "", p.amount_minor)) for p in unvoided]
            calls = [ProviderCall(i, closed[i.payment_id]) for i in await operation_store.begin_operations(tx, voids)]
            await faults.point("payments.void_authorization.before_intent_commit")
        await faults.point("payments.void_authorization.after_intent_commit")
        results = await self._charging.call_provider("void_authorization", calls)
        await self._charging.record_results("void_authorization", calls, results)
        return sum(isinstance(result, Succeeded) for result in results.values())


def _with_charge(payment: PaymentRow, charge_id: int) -> PaymentRow:
    return payment if payment.charge_id == charge_id else msgspec.structs.replace(payment, charge_id=charge_id)
