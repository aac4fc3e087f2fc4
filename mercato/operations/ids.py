"""Ids that are never given twice: which service knows the ids of which other, and moving sequences past known ids.

A database that was restored alone from an older backup lacks ids that other databases know. Its sequence would give
them again, to another order or another account. `advance` moves it past them; the audit checks the same on copies.
Orders also gets a list of the lost orders that payments knows: an order that is placed again with its key is not
charged again. After the restore of a whole shop no database knows the ids of the lost time: `margin` is how many there
can be.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.postgres.sequences import NEXT, UNKNOWN_IDS, move_past
from mercato.chassis.postgres.sessions import WHOLE_TABLES, connect

LOCK_SECONDS: Final = 10
IDS_PER_SECOND_MAX: Final = 10_000
"""On average since the backup: more orders than one machine places (`docs/performance.md`). A shop that gave more ids
than this and `MARGIN_MIN` may give some of them again."""
MARGIN_MIN: Final = UNKNOWN_IDS
"""Also for a burst before a backup that is minutes old, and for clocks of machines that differ by minutes."""
NEWEST_ROWS: Final = 1000
"""Without an index on the id, only the newest so many rows are read: later ids are in later rows."""


log: Any = structlog.get_logger()


class Sequence(msgspec.Struct, frozen=True):
    """A sequence of ids."""

    owner: str
    """The service."""
    name: str


class Known(msgspec.Struct, frozen=True):
    """Ids of a service that another service stores."""

    sequence: Sequence
    by: str
    """The service."""
    newest: str
    """A query for the highest id, or NULL; an index answers it."""
    copied: str | None
    """The same query on the copies of an audit; None where they do not have the rows."""


ORDERS: Final = Sequence("orders", "orders_id_seq")
USERS: Final = Sequence("users", "users_id_seq")
PRODUCTS: Final = Sequence("products", "products_id_seq")
PAYMENTS: Final = Sequence("payments", "payments_id_seq")
CHARGES: Final = Sequence("sandbox", "charges_id_seq")
BANK_OPERATIONS: Final = Sequence("sandbox", "operations_id_seq")

_IN_FEED: Final = """
    SELECT max(e.subject_id)
      FROM unnest(ARRAY[{types}]) AS wanted (type)
     CROSS JOIN LATERAL (
           SELECT position FROM feed_types t WHERE t.type = wanted.type ORDER BY position DESC LIMIT {rows}) newest
      JOIN feed f ON f.position = newest.position
     CROSS JOIN LATERAL json_to_recordset(f.events::json) AS e (type text, subject_id bigint)
     WHERE e.type = wanted.type
"""
_PAYMENT_TYPES: Final = "'payment.authorized', 'payment.failed', 'payment.captured'"

KNOWN: Final = (
    Known(
        ORDERS,
        "inventory",
        "SELECT max(order_id) FROM reservations",
        "SELECT max(order_id) FROM inventory.reservations",
    ),
    Known(
        ORDERS,
        "payments",
        "SELECT max(order_id) FROM payments",
        "SELECT max(order_id) FROM payments.payments",
    ),
    Known(
        ORDERS,
        "events",
        _IN_FEED.format(types="'order.placed'", rows=NEWEST_ROWS),
        "SELECT max(subject_id) FROM events.feed WHERE type = 'order.placed'",
    ),
    Known(USERS, "orders", "SELECT max(user_id) FROM orders", "SELECT max(user_id) FROM orders.orders"),
    Known(USERS, "payments", "SELECT max(user_id) FROM payments", None),
    Known(
        PRODUCTS,
        "inventory",
        "SELECT max(product_id) FROM levels",
        "SELECT max(product_id) FROM inventory.levels",
    ),
    Known(
        PRODUCTS,
        "orders",
        "SELECT max(product_id) FROM order_products",
        "SELECT max(product_id) FROM orders.order_products",
    ),
    Known(
        PRODUCTS,
        "events",
        _IN_FEED.format(types="'product.price_changed'", rows=NEWEST_ROWS),
        "SELECT max(subject_id) FROM events.feed WHERE type = 'product.price_changed'",
    ),
    Known(
        PAYMENTS,
        "events",
        _IN_FEED.format(types=_PAYMENT_TYPES, rows=NEWEST_ROWS),
        "SELECT max(subject_id) FROM events.feed WHERE type LIKE 'payment.%'",
    ),
    Known(
        CHARGES,
        "payments",
        f"SELECT max(charge_id) FROM (SELECT charge_id FROM payments ORDER BY id DESC LIMIT {NEWEST_ROWS}) newest",  # noqa: S608
        None,
    ),
    # An operation below the cursor of the reconciliation would never be compared.
    Known(BANK_OPERATIONS, "payments", "SELECT max(after) FROM reconciliation", None),
)

SEQUENCES: Final = tuple(dict.fromkeys(known.sequence for known in KNOWN))


LISTED_AT_ONCE: Final = 10_000
_LOST_ORDERS: Final = """
    SELECT DISTINCT ON (order_id) order_id, nonce FROM payments WHERE order_id >= $1 ORDER BY order_id LIMIT $2
"""
_KEEP_LOST: Final = """
    INSERT INTO lost_orders (nonce, order_id)
    SELECT * FROM unnest($1::bigint[], $2::bigint[])
        ON CONFLICT (nonce) DO UPDATE SET order_id = greatest(lost_orders.order_id, excluded.order_id)
"""


class Moved(msgspec.Struct, frozen=True):
    """A sequence that was behind the ids that another service knows."""

    sequence: Sequence
    by: str
    """The service that knows the highest id."""
    next_id: int
    """The id that it would have given next."""
    newest: int
    """The highest known id; the sequence continues `UNKNOWN_IDS` after it."""


def margin(taken_at: datetime.datetime, now: datetime.datetime) -> int:
    """How many ids a sequence may have given between a backup and its restore; never less than `MARGIN_MIN`.

    A backup that is a year old costs 3 * 10^11 ids. A number in JSON can hold 9 * 10^15 of them; the rows of an
    outbox, whose ids are a part of positions, have 2 * 10^12.
    """
    return MARGIN_MIN + IDS_PER_SECOND_MAX * max(0, int((now - taken_at).total_seconds()))


async def advance(dsns: Mapping[str, str], *, listed_at_once: int = LISTED_AT_ONCE) -> tuple[Moved, ...]:
    """Moves each sequence of the services in `dsns` past all ids that other services know, never backwards.

    Gives the sequences that were behind, and logs them. Raises the errors of the driver.
    """
    found = [known for known in KNOWN if known.sequence.owner in dsns and known.by in dsns]
    async with contextlib.AsyncExitStack() as stack:
        names = sorted({name for known in found for name in (known.sequence.owner, known.by)})
        connections = {name: await stack.enter_async_context(connection_to(dsns[name])) for name in names}
        newest: dict[Sequence, tuple[int, str]] = {}
        for known in found:
            id_ = await connections[known.by].fetchval(known.newest)
            if id_ is not None:
                newest[known.sequence] = max(newest.get(known.sequence, (0, "")), (id_, known.by))
        if ORDERS in newest and "payments" in connections:
            id_, _ = newest[ORDERS]
            await _list_lost_orders(connections["orders"], connections["payments"], id_, listed_at_once)
        moved = [
            await _advance(connections[sequence.owner], sequence, id_, by) for sequence, (id_, by) in newest.items()
        ]
    return tuple(each for each in moved if each is not None)


async def _list_lost_orders(orders: Any, payments: Any, newest: int, at_once: int) -> None:
    """Where the sequence of orders is behind, gives orders the nonces of all orders that only payments has.

    It runs before the sequence moves. After a crash in between the sequence is still behind, so it runs again.
    """
    next_id = await orders.fetchval(NEXT.format(name=ORDERS.name))
    while next_id <= newest and (rows := await payments.fetch(_LOST_ORDERS, next_id, at_once)):
        await orders.execute(_KEEP_LOST, [row["nonce"] for row in rows], [row["order_id"] for row in rows])
        next_id = rows[-1]["order_id"] + 1


async def _advance(connection: Any, sequence: Sequence, newest: int, by: str) -> Moved | None:
    async with connection.transaction():
        next_id = await move_past(connection, sequence.name, newest)
    if next_id is None:
        return None
    log.warning(
        "sequence_moved",
        owner=sequence.owner,
        sequence=sequence.name,
        known_by=by,
        next_id=next_id,
        known_id=newest,
    )
    return Moved(sequence, by, next_id, newest)


@contextlib.asynccontextmanager
async def connection_to(dsn: str) -> AsyncGenerator[Any]:
    """A connection that waits for a lock at most `LOCK_SECONDS`."""
    connection = await connect(dsn, {**WHOLE_TABLES, "lock_timeout": f"{LOCK_SECONDS}s"})
    try:
        yield connection
    finally:
        connection.terminate()  # at once, also where a statement was cancelled


def behind() -> str:
    """SQL over the copies of an audit: a row for each service that knows an id which its owner would give again."""
    return " UNION ALL ".join(
        f"""
        SELECT '{known.sequence.owner}' AS owner, '{known.by}' AS known_by, k.newest AS known_id, s.next_id,
               'run mercato migrate, or start mercato up again' AS way_out
          FROM ({known.copied}) AS k (newest)
         CROSS JOIN (SELECT last_value + is_called::integer FROM {known.sequence.owner}.{known.sequence.name})
               AS s (next_id)
         WHERE k.newest >= s.next_id
        """  # noqa: S608  # no value is in it
        for known in KNOWN
        if known.copied is not None
    )
