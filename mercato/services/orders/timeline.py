"""The timeline of an order: its own moves, its stock and its money, in one list by time."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence

from mercato.chassis.contract import Actor, as_service, current
from mercato.chassis.postgres.database import Database
from mercato.contracts.inventory import Inventory, StockStep, TraceStock
from mercato.contracts.order_history import HistoryAxis, HistoryEntry, Timeline, TimelineEntry
from mercato.contracts.orders import (
    GetTimeline,
)
from mercato.contracts.payments import Payments, PaymentStep, TracePayments

from . import history_store, read_store, rules
from .guests import Guests
from .history_store import HistoryRow


class TimelineReader:
    """Asks inventory and payments for their steps. Times are those of their databases."""

    def __init__(self, database: Database, guests: Guests, *, inventory: Inventory, payments: Payments) -> None:
        self._database = database
        self._guests = guests
        self._inventory = inventory
        self._payments = payments

    async def timeline(self, request: GetTimeline) -> Timeline:
        order_id = request.id
        async with self._guests.acting(order_id, request.access_token), self._database.read() as tx:
            actor = current.get().actor
            nonce = (await read_store.visible_record(tx, order_id, actor)).nonce
            transitions = await history_store.history(tx, order_id)
        with as_service():
            stock, money = await asyncio.gather(
                self._inventory.trace(TraceStock(order_id=order_id, order_nonce=nonce)),
                self._payments.trace(TracePayments(order_id=order_id, order_nonce=nonce)),
            )
        entries = [
            *(entry for transition, moves in _moves(transitions, actor) for entry in _entries(transition, moves)),
            *(_stock(step) for step in stock.steps),
            *(_money(step) for step in money.steps),
        ]
        return Timeline(entries=tuple(sorted(entries, key=lambda entry: entry.at)))


def entries_of(transitions: Sequence[HistoryRow], actor: Actor) -> tuple[HistoryEntry, ...]:
    """The moves of all transitions, in order: one for each axis along which a transition went."""
    return tuple(move for _, moves in _moves(transitions, actor) for move in moves)


def _moves(transitions: Sequence[HistoryRow], actor: Actor) -> list[tuple[HistoryRow, list[HistoryEntry]]]:
    """Each transition with its moves, as `actor` may see them. A move starts where the transition before has ended."""
    found: list[tuple[HistoryRow, list[HistoryEntry]]] = []
    before: HistoryRow | None = None
    for row in transitions:
        moves = [
            HistoryEntry(
                version=row.version,
                axis=axis,
                before=was,
                after=now,
                reason=row.note,
                actor_role=row.actor_role,
                actor_id=rules.shown_actor_id(row.actor_role, row.actor_id, actor),
                at=row.at,
                internal_note=row.internal_note if not rules.is_buyer(actor) else "",
                limit_reason=row.limit_reason,
            )
            for axis, was, now in (_move(event, before, row) for event in row.events)
        ]
        found.append((row, moves))
        before = row
    return found


def _move(event: str, before: HistoryRow | None, row: HistoryRow) -> tuple[HistoryAxis, str | None, str]:
    """The axis of an event, the state of the order before it, and the state after it."""
    if event == rules.CLAIMED:
        return "owner", "guest", "account"
    axis = rules.axis_of(event)
    return axis, None if before is None else getattr(before, axis), getattr(row, axis)


def _entries(transition: HistoryRow, moves: Sequence[HistoryEntry]) -> list[TimelineEntry]:
    return [
        TimelineEntry(
            at=move.at,
            part="order",
            what=f"{move.axis} {move.after}",
            outcome="succeeded",
            attempts=transition.tries + 1,
            took_ms=None,
            by=f"{move.actor_role} {move.actor_id}" if move.actor_id else move.actor_role,
            detail="; ".join(filter(None, (move.reason, move.limit_reason))),
            internal_note=move.internal_note,
        )
        for move in moves
    ]


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


def _milliseconds(began: datetime.datetime, ended: datetime.datetime) -> int:
    return max(0, round((ended - began).total_seconds() * 1_000))
