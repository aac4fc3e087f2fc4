"""What has happened to an order: its moves, and its timeline over all parts of the shop."""

from __future__ import annotations

import datetime
from typing import Literal

from mercato.chassis.contract import Message, Open

HistoryAxis = Literal["status", "payment", "fulfilment", "owner"]
"""`owner`: of a guest's order that an account has claimed, from `guest` to `account`."""
TimelinePart = Literal["order", "stock", "money"]


class TimelineEntry(Message):
    """One step, of whichever part of the shop."""

    at: datetime.datetime
    part: Open[TimelinePart]
    what: str
    """`status confirmed`, `held`, `charge`."""
    outcome: str
    """`succeeded`, `declined insufficient_funds`, `unknown`."""
    attempts: int
    took_ms: int | None
    """Where it is known when it began."""
    by: str
    detail: str
    internal_note: str = ""
    """Empty for customers."""


class Timeline(Message):
    """By time."""

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
    """0 for customers, where it is an account of staff."""
    at: datetime.datetime
    internal_note: str = ""
    """Empty for customers."""
    limit_reason: str = ""
    """Of a refund or return that gave less than was asked: how much was asked and given, and why."""


class History(Message):
    """In the order in which it happened."""

    entries: tuple[HistoryEntry, ...]
