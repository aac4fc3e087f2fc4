"""A warehouse: a consumer of the feed as another team would write it, from `GET /events` or from the stream.

The bodies of the stream are the entries of the feed. It reads only what it needs to pack, ship and stop.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class _Order(msgspec.Struct, frozen=True):
    order_id: int


class Entry(msgspec.Struct, frozen=True):
    """An entry of the feed. `id` is the same at every delivery: the warehouse handles an event once."""

    id: str
    type: str
    data: _Order


class Task(msgspec.Struct, frozen=True):
    """What the warehouse does for an order."""

    what: Literal["pack", "close", "stop"]
    order_id: int
    because_of: str


TASKS: dict[str, Literal["pack", "close", "stop"]] = {
    "order.paid": "pack",
    "order.shipped": "close",
    "order.cancelled": "stop",
}


def task_of(body: bytes) -> Task:
    """The task of an entry of one of the types that the warehouse asks for. Raises where it cannot be read."""
    entry = msgspec.json.decode(body, type=Entry)
    return Task(TASKS[entry.type], entry.data.order_id, entry.id)
