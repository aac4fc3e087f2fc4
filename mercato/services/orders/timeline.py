"""What has happened to an order: its own moves, its stock, its money and its sagas, in one list by time."""

from __future__ import annotations

import asyncio
import datetime

from mercato.chassis import saga
from mercato.chassis.db import Database
from mercato.chassis.rpc import as_service
from mercato.chassis.saga import StepRow
from mercato.contracts.inventory import Inventory, StockStep, TraceStock
from mercato.contracts.orders import HistoryEntry, Timeline, TimelineEntry
from mercato.contracts.payments import Payments, PaymentStep, TracePayments

from . import store


class Tracing:
    """Asks whoever did something for an order. Times are those of the databases, which a person sees as one."""

    def __init__(self, database: Database, *, inventory: Inventory, payments: Payments) -> None:
        self._database = database
        self._inventory = inventory
        self._payments = payments

    async def timeline(self, order_id: int) -> Timeline:
        """Of an order that the caller has looked at, and may see."""
        async with self._database.read() as tx:
            moves = await store.history(tx, order_id)
            steps = await saga.steps(tx, order_id)
        with as_service():
            stock, money = await asyncio.gather(
                self._inventory.trace(TraceStock(order_id=order_id)),
                self._payments.trace(TracePayments(order_id=order_id)),
            )
        entries = [
            *(_move(entry) for entry in moves),
            *(_stock(step) for step in stock.steps),
            *(_money(step) for step in money.steps),
            *(_saga(step) for step in steps),
        ]
        return Timeline(entries=tuple(sorted(entries, key=lambda entry: entry.at)))


def _move(entry: HistoryEntry) -> TimelineEntry:
    return TimelineEntry(
        at=entry.at,
        part="order",
        what=f"{entry.axis} {entry.after}",
        outcome="succeeded",
        attempts=1,
        took_ms=None,
        by=f"{entry.actor_role} {entry.actor_id}" if entry.actor_id else entry.actor_role,
        detail=entry.reason,
    )


def _stock(step: StockStep) -> TimelineEntry:
    detail = ", ".join(f"{line.quantity} x product {line.product_id}" for line in step.lines)
    return TimelineEntry(
        at=step.at,
        part="stock",
        what=step.what,
        outcome="succeeded",
        attempts=1,
        took_ms=None,
        by="service",
        detail=detail,
    )


def _money(step: PaymentStep) -> TimelineEntry:
    return TimelineEntry(
        at=step.settled_at or step.began_at,
        part="money",
        what=step.kind,
        outcome=f"{step.status} {step.code}" if step.code else step.status,
        attempts=step.calls,
        took_ms=_milliseconds(step.began_at, step.settled_at) if step.settled_at else None,
        by="service",
        detail=f"payment {step.payment_id}: {step.amount_minor} {step.currency} (minor units)",
    )


def _saga(step: StepRow) -> TimelineEntry:
    return TimelineEntry(
        at=step.at,
        part="saga",
        what=f"{step.kind} {step.step}",
        outcome=step.outcome,
        attempts=step.tries,
        took_ms=_milliseconds(step.began_at, step.at),
        by="service",
        detail=f"driver {step.epoch}" if step.epoch > 1 else "",
    )


def _milliseconds(began: datetime.datetime, ended: datetime.datetime) -> int:
    return max(0, round((ended - began).total_seconds() * 1_000))
