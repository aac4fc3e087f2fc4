"""The history of an order: its moves, and its timeline over all services."""

from __future__ import annotations

import datetime
from typing import Literal

from mercato.chassis.contract import Message, Open

HistoryAxis = Literal["status", "payment", "fulfilment", "owner"]
"""`owner`: of a guest's order that an account has claimed, from `guest` to `account`."""
TimelinePart = Literal["order", "stock", "money"]


class TimelineEntry(Message):
    """One step of an order, its stock or its money."""

    at: datetime.datetime
    part: Open[TimelinePart]
    what: str
    """`status confirmed`, `held`, `charge`."""
    outcome: str
    """`succeeded`, `declined insufficient_funds`, `unknown`."""
    attempts: int
    took_ms: int | None
    """How long it took, where its beginning is known."""
    by: str
    detail: str
    internal_note: str = ""
    """Empty for customers."""


class Timeline(Message):
    """The timeline of an order, by time."""

    entries: tuple[TimelineEntry, ...]


class HistoryEntry(Message):
    """One move of one axis; moves of one transition have one version. The first entry of an order has no `before`."""

    version: int
    axis: Open[HistoryAxis]
    before: str | None
    after: str
    reason: str
    actor_role: str
    actor_id: int
    """Customers see 0 for an account of staff."""
    at: datetime.datetime
    internal_note: str = ""
    """Empty for customers."""
    limit_reason: str = ""
    """Of a refund or return of less than was requested: both amounts, and why."""


class History(Message):
    """The entries in the order in which they happened."""

    entries: tuple[HistoryEntry, ...]
