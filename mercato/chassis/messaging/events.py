"""Domain events: in order for each subject, with one effect on each consumer.

The parts
    outbox          One row in the transaction of the change holds all its events (`Tx.emit`). `Database.transaction`
                    writes it as the last statement, in one message with the COMMIT, under a lock that is held until
                    the commit. So the ids of rows are in the order of commits, and a reader that continues after the
                    last id misses nothing. A row is never updated.
    event log       The operation by which consumers read an outbox, over any transport (`outbox.py`).
    cursor          The position of a consumer in an outbox, in the consumer's database. It moves in the transaction
                    of the effect, by compare-and-set: each event has its effect once (`consumers.py`).
    parked          Events that a consumer could not process, with the later events of their subjects. They are
                    retried; after `TRIES` they are dead, and wait until an operator replays them.

Guaranteed
    - Every committed event reaches every consumer that subscribes to its type, or is parked or dead there.
    - The effect of an event happens once, in the consumer's own transaction.
    - A consumer gets the events of one subject (an order, a product) of one service in the order of their commits. An
      event that fails delays the later ones of its subject at that consumer, and nothing else. A dead event delays
      nothing: when it is replayed, it comes out of order.
    - A consumer never misses events without an error: a log that was restored behind its cursor, or from which unread
      rows were deleted, refuses the read.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from mercato.chassis.contract import Contract, Message
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.postgres.outbox_row import Outgoing

M = TypeVar("M", bound=Message)

TRIES: Final = 5
KEPT_DAYS: Final = 7
"""An outbox row is kept for so long, and until every registered consumer has acknowledged it."""
UNREAD_KEPT_DAYS: Final = 30
"""After so long a row is deleted, acknowledged or not."""
REPLAYED_KEPT_DAYS: Final = 14
"""A dead event that was replayed is kept for so long: the audit must know which events came out of order."""


class Event(Row):
    """An event as a consumer gets it. `data` is the JSON of the message that belongs to the type."""

    source: str
    """The service whose outbox it comes from."""
    id: int
    """Its position in that outbox."""
    type: str
    subject: str
    subject_id: int
    version: int
    data: str
    """`decoder` decodes it to a message."""
    at: datetime.datetime
    tries: int = 0
    """How often the consumer has failed to process it."""
    trace: str = ""
    """Where the traces of the change go on, if they are recorded."""


class SourceRow(Message):
    """A row of the outbox of `source`."""

    source: str
    id: int
    at: datetime.datetime
    events: str

    def unpack(self) -> list[Event]:
        stored = [(outbox_row.position(self.id, place), e) for place, e in enumerate(outbox_row.unpack(self.events))]
        return [
            Event(
                self.source,
                id_,
                e.type,
                e.subject,
                e.subject_id,
                e.version,
                bytes(e.data).decode(),
                self.at,
                0,
                e.trace,
            )
            for id_, e in stored
        ]


class Subscription(msgspec.Struct, frozen=True):
    """A consumer: the events that it reads, and how it handles them.

    `handle` gets events of one source, in order, inside the transaction of the consumer's database in which its cursor
    moves. If it raises, the transaction rolls back, and each event is processed alone. It calls no other service.
    """

    consumer: str
    sources: tuple[str, ...]
    """The services whose outboxes it reads."""
    handle: Callable[[Tx, Sequence[Event]], Awaitable[None]]
    types: frozenset[str] | None = None
    """None: all."""
    handle_rows: Callable[[Tx, Sequence[SourceRow]], Awaitable[int]] | None = None
    """Instead of `handle`, for a consumer of all types: handles whole rows; gives how many events they hold."""


def decoder(contract: type[Contract], message: type[M], *types: str) -> Callable[[str], M]:
    """Decodes `Event.data` of events of these types. Refuses at once a type that the contract declares otherwise."""
    for type_ in types:
        declared = contract.events.get(type_)
        assert declared is message, f"{contract.service} emits {type_} with {declared}, not with {message.__name__}"
    return msgspec.json.Decoder(message).decode


def declared_only(contract: type[Contract]) -> Callable[[Sequence[Outgoing]], list[str]]:
    """`outbox_row.pack` that refuses events which the contract does not declare: for `Database.pack` in tests."""

    def pack(events: Sequence[Outgoing]) -> list[str]:
        for event in events:
            declared = contract.events.get(event.type)
            assert declared is type(event.data), (
                f"{contract.service} emits {event.type} with {type(event.data).__name__}: "
                f"its contract declares {declared.__name__ if declared else 'no such event'}"
            )
        return outbox_row.pack(events)

    return pack
