"""Every SQL statement of inventory.

Every transaction takes locks in one order, or two batches would deadlock:

    0. the keys of adjustments, in key order
    1. new reservations, by ascending order (the insert itself locks; a second insert of the same one waits)
    2. existing reservations, by ascending order
    3. new levels, by ascending product (as in step 1)
    4. existing levels, by ascending product

A transaction that waits in step 1 or 3 has no lock for which transactions in later steps wait: they see only committed
rows. The expiry skips locked rows in step 2, so that it never waits there.

A transaction inserts and locks, decides (`rules.StockLedger`), and writes. `fast_path.py` has single statements for
batches that fit as a whole.

Rows are looked up with CROSS JOIN LATERAL (... LIMIT 1), one index search each: a plain join that was planned while the
table was small scans all of it. The lines of many orders are passed in one array; `first` and `last` are the indexes of
an order's lines.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.hosting.table_scan import PAGE
from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.inventory import LINES_LIMIT, AnotherOrder, Hold, Level, ReservationState, StockLine

from .fast_path import NewReservation, new_columns, places
from .rules import LevelDelta, Movement, ReservationChange, ReservedLine, StoredReservation, WriteSet

HOLDS_LIMIT: Final = 500


class NotAsLockedError(Exception):
    """The guard of an UPDATE refused a change of locked rows: this transaction must not be committed."""


class InsertedRow(Row):
    order_id: int
    expires_in_s: float | None


class ReservationRow(Row):
    order_id: int
    nonce: int
    state: ReservationState
    version: int
    expires_in_s: float | None
    product_ids: list[int]
    quantities: list[int]
    returned: list[int] | None


class LevelRow(Row):
    product_id: int
    on_hand: int
    reserved: int
    available: int
    updated_at: datetime.datetime
    version: int


class GuestsRow(Row):
    product_id: int
    quantity: int


class OrderRow(Row):
    order_id: int
    nonce: int


class ReturnRow(Row):
    order_id: int
    reference: str
    product_id: int
    quantity: int


class AdjustmentRow(Row):
    reference: str
    product_id: int
    delta: int
    reason: str


class TracedReservationRow(Row):
    nonce: int
    state: ReservationState
    product_ids: list[int]
    quantities: list[int]
    created_at: datetime.datetime
    ended_at: datetime.datetime | None


class TracedReturnRow(Row):
    reference: str
    product_id: int
    quantity: int
    at: datetime.datetime


# ------------------------------------------------------------------------------------------------------- reservations


async def insert_reservations(
    tx: Tx, reservations: Sequence[NewReservation], hold_seconds: float
) -> list[StoredReservation]:
    """Inserts held reservations; gives the inserted ones. The others exist, and are committed."""
    # This waits for a transaction that is inserting one of them. If that deleted its refused row, this inserts one.
    rows = await tx.fetch(
        InsertedRow,
        """
        INSERT INTO reservations (order_id, nonce, state, expires_at, product_ids, quantities)
        SELECT n.order_id, n.nonce, 'held', CASE WHEN NOT n.for_payment THEN now() + make_interval(secs => $8) END,
               ($6::bigint[])[n.first:n.last], ($7::integer[])[n.first:n.last]
          FROM unnest($1::bigint[], $2::bigint[], $3::boolean[], $4::integer[], $5::integer[])
               AS n (order_id, nonce, for_payment, first, last)
         ORDER BY n.order_id
            ON CONFLICT ON CONSTRAINT reservations_pkey DO NOTHING
        RETURNING order_id, extract(epoch FROM expires_at - clock_timestamp())::float8 AS expires_in_s
        """,
        *new_columns(reservations),
        hold_seconds,
    )
    new = {reservation.order_id: reservation for reservation in reservations}
    return [
        StoredReservation(row.order_id, new[row.order_id].nonce, "held", 1, row.expires_in_s, new[row.order_id].lines)
        for row in rows
    ]


async def insert_tombstones(tx: Tx, orders: Mapping[int, int]) -> list[StoredReservation]:
    """Inserts released reservations without lines for these orders (id to nonce); gives the inserted ones.

    A reserve that arrives later finds them, and so does a concurrent one: one of the two waits.
    """
    inserted = await tx.fetch_values(
        int,
        """
        INSERT INTO reservations (order_id, nonce, state, ended_at)
        SELECT w.order_id, w.nonce, 'released', clock_timestamp()
          FROM unnest($1::bigint[], $2::bigint[]) AS w (order_id, nonce)
         ORDER BY w.order_id
            ON CONFLICT ON CONSTRAINT reservations_pkey DO NOTHING
        RETURNING order_id
        """,
        list(orders),
        list(orders.values()),
    )
    return [StoredReservation(order_id, orders[order_id], "released", 1, None) for order_id in inserted]


async def lock_reservations(tx: Tx, order_ids: Collection[int]) -> list[StoredReservation]:
    """The existing reservations, by ascending order. No other transaction changes them until this one ends."""
    if not order_ids:
        return []
    # The expiry is compared with the current time, not with that of the transaction's start: it may have waited.
    rows = await tx.fetch(
        ReservationRow,
        """
        SELECT order_id, nonce, state, version,
               extract(epoch FROM expires_at - clock_timestamp())::float8 AS expires_in_s,
               product_ids, quantities, returned
          FROM reservations
         WHERE order_id = ANY($1::bigint[])
         ORDER BY order_id
           FOR NO KEY UPDATE
        """,
        list(order_ids),
    )
    return [_stored(row) for row in rows]


def _stored(row: ReservationRow) -> StoredReservation:
    returned = row.returned or [0] * len(row.product_ids)
    lines = tuple(map(ReservedLine, row.product_ids, row.quantities, returned))
    return StoredReservation(row.order_id, row.nonce, row.state, row.version, row.expires_in_s, lines)


async def name_newest_order(tx: Tx, refused: Sequence[AnotherOrder]) -> None:
    """Sets the highest order id that has a reservation or a tombstone in refusals."""
    if refused:
        [newest] = await tx.fetch_values(int, "SELECT max(order_id) FROM reservations")
        for refusal in refused:
            refusal.newest_order_id = newest


async def lock_overdue(tx: Tx, limit: int) -> dict[int, int]:
    """Up to `limit` expired held reservations that no other transaction has locked: id to nonce."""
    # A payment that begins meanwhile removes the expiry: the condition is checked again under the lock.
    rows = await tx.fetch(
        OrderRow,
        """
        SELECT order_id, nonce
          FROM reservations
         WHERE expires_at < now()
         ORDER BY expires_at
         LIMIT $1
           FOR NO KEY UPDATE SKIP LOCKED
        """,
        limit,
    )
    return {row.order_id: row.nonce for row in rows}


async def returns_made(tx: Tx, wanted: Collection[tuple[int, str]]) -> dict[tuple[int, str], tuple[StockLine, ...]]:
    """The committed ones of these returns (order, reference), with their lines by ascending product.

    The caller has locked their reservations.
    """
    rows = await tx.fetch(
        ReturnRow,
        """
        SELECT m.order_id, m.reference, m.product_id, m.delta AS quantity
          FROM unnest($1::bigint[], $2::text[]) AS w (order_id, reference)
         CROSS JOIN LATERAL (
            SELECT order_id, reference, product_id, delta
              FROM movements
             WHERE kind = 'return' AND order_id = w.order_id AND reference = w.reference
             LIMIT $3
         ) m
         ORDER BY m.product_id
        """,
        [order_id for order_id, _ in wanted],
        [reference for _, reference in wanted],
        LINES_LIMIT,
    )
    made: dict[tuple[int, str], tuple[StockLine, ...]] = {}
    for row in rows:
        line = StockLine(product_id=row.product_id, quantity=row.quantity)
        made[row.order_id, row.reference] = (*made.get((row.order_id, row.reference), ()), line)
    return made


# ------------------------------------------------------------------------------------------------------------ levels


async def lock_levels(tx: Tx, product_ids: Collection[int]) -> list[Level]:
    """The existing levels, by ascending product. No other transaction changes them until this one ends."""
    if not product_ids:
        return []
    rows = await tx.fetch(
        LevelRow,
        """
        SELECT product_id, on_hand, reserved, on_hand - reserved AS available, updated_at, version
          FROM levels
         WHERE product_id = ANY($1::bigint[])
         ORDER BY product_id
           FOR NO KEY UPDATE
        """,
        list(product_ids),
    )
    return [_level(row) for row in rows]


async def held_by_guests(tx: Tx, product_ids: Collection[int]) -> dict[int, int]:
    """Pieces that orders of guests hold, by product. The caller has locked the levels.

    A transaction that changes holds of a product locks its level, so the result does not change until the commit.
    """
    await tx.execute(
        """
        DELETE FROM guest_holds g
         WHERE g.product_id = ANY($1::bigint[])
           AND NOT EXISTS (SELECT FROM reservations r WHERE r.order_id = g.order_id AND r.state = 'held')
        """,
        list(product_ids),
    )
    rows = await tx.fetch(
        GuestsRow,
        """
        SELECT product_id, sum(quantity)::bigint AS quantity
          FROM guest_holds
         WHERE product_id = ANY($1::bigint[])
         GROUP BY product_id
        """,
        list(product_ids),
    )
    return {row.product_id: row.quantity for row in rows}


async def insert_guest_holds(tx: Tx, reservations: Sequence[StoredReservation]) -> None:
    """Stores that these new reservations are of guests."""
    lines = [(line.product_id, r.order_id, line.quantity) for r in reservations for line in r.lines]
    await tx.execute(
        """
        INSERT INTO guest_holds (product_id, order_id, quantity)
        SELECT product_id, order_id, quantity
          FROM unnest($1::bigint[], $2::bigint[], $3::integer[]) AS h (product_id, order_id, quantity)
        """,
        [product_id for product_id, _, _ in lines],
        [order_id for _, order_id, _ in lines],
        [quantity for _, _, quantity in lines],
    )


async def insert_levels(tx: Tx, product_ids: Sequence[int]) -> int:
    """Inserts missing levels, at version 0, which this transaction must count; gives how many."""
    return await tx.execute(
        """
        INSERT INTO levels (product_id)
        SELECT w.product_id FROM unnest($1::bigint[]) AS w (product_id)
         ORDER BY w.product_id
            ON CONFLICT ON CONSTRAINT levels_pkey DO NOTHING
        """,
        product_ids,
    )


async def lock_all_levels(tx: Tx) -> bool:
    """Locks all levels against writes until this transaction ends; True where there are no levels."""
    await tx.execute("""LOCK TABLE levels IN SHARE ROW EXCLUSIVE MODE""")
    # A statement of its own: it must see rows that were committed while the lock was waited for.
    return not await tx.fetch_values(int, """SELECT 1 FROM levels LIMIT 1""")


async def levels(tx: Tx, product_ids: Sequence[int]) -> dict[int, Level]:
    """The existing levels, by product."""
    rows = await tx.fetch(
        LevelRow,
        """
        SELECT product_id, on_hand, reserved, on_hand - reserved AS available, updated_at, version
          FROM levels
         WHERE product_id = ANY($1::bigint[])
        """,
        product_ids,
    )
    return {row.product_id: _level(row) for row in rows}


async def list_levels(tx: Tx, below: int | None, after: int, limit: int) -> list[Level]:
    """Up to `limit` levels by ascending product."""
    # Availability has no index, because each reservation would write to it. This reads levels until the page is full.
    rows = await tx.fetch(
        LevelRow,
        """
        SELECT product_id, on_hand, reserved, on_hand - reserved AS available, updated_at, version
          FROM levels
         WHERE product_id > $2 AND ($1::integer IS NULL OR on_hand - reserved < $1)
         ORDER BY product_id
         LIMIT $3
        """,
        below,
        after,
        limit,
    )
    return [_level(row) for row in rows]


async def count_levels(tx: Tx, below: int | None) -> int:
    """The number of levels on all pages of `list_levels`."""
    found = await tx.fetch_values(
        int, """SELECT count(*) FROM levels WHERE $1::integer IS NULL OR on_hand - reserved < $1""", below
    )
    return found[0]


def _level(row: LevelRow) -> Level:
    return Level(**msgspec.structs.asdict(row))


async def adjustments(tx: Tx, references: Sequence[str]) -> dict[str, AdjustmentRow]:
    """The adjustments with these references, by reference."""
    rows = await tx.fetch(
        AdjustmentRow,
        """
        SELECT m.reference, m.product_id, m.delta, m.reason
          FROM unnest($1::text[]) AS w (reference)
         CROSS JOIN LATERAL (
            SELECT reference, product_id, delta, reason
              FROM movements
             WHERE reference = w.reference AND kind IN ('receipt', 'adjustment') AND reference IS NOT NULL
             LIMIT 1
         ) m
        """,
        references,
    )
    return {row.reference: row for row in rows}


# ----------------------------------------------------------------------------------------------------------- writing


async def write(tx: Tx, write_set: WriteSet) -> dict[int, Level]:
    """Writes the changes of rows that this transaction has locked; gives the changed levels.

    Raises `NotAsLockedError` where a guard refuses a change: RETURNING lacks its row.
    """
    if write_set.refused:
        await _delete_reservations(tx, write_set.refused)
    if write_set.changes and await change_reservations(tx, write_set.changes) != len(write_set.changes):
        raise NotAsLockedError("reservations")
    changed = await change_levels(tx, write_set.deltas) if write_set.deltas else []
    if len(changed) != len(write_set.deltas):
        raise NotAsLockedError("levels")
    if write_set.movements:
        await _insert_movements(tx, write_set.movements)
    tx.emit(write_set.events)
    return {level.product_id: level for level in changed}


async def _delete_reservations(tx: Tx, order_ids: Sequence[int]) -> None:
    # This transaction has inserted them: no other has seen them.
    await tx.execute("""DELETE FROM reservations WHERE order_id = ANY($1::bigint[])""", order_ids)


async def change_reservations(tx: Tx, changes: Sequence[ReservationChange]) -> int:
    """Changes reservations that still have the version before; gives their number. A changed one does not expire."""
    firsts, lasts = places([len(change.level_versions) for change in changes])
    first_returns, last_returns = places([len(change.returned) for change in changes])
    return await tx.execute(
        """
        UPDATE reservations r
           SET state = c.state, version = c.version, expires_at = NULL,
               updated_at = greatest(r.updated_at, clock_timestamp()),
               ended_at = CASE WHEN c.state <> 'held' THEN coalesce(r.ended_at, clock_timestamp()) END,
               level_versions = coalesce(nullif(($7::bigint[])[c.first:c.last], '{}'), r.level_versions),
               returned = coalesce(nullif(($10::integer[])[c.first_return:c.last_return], '{}'), r.returned)
          FROM unnest($1::bigint[], $2::text[], $3::integer[], $4::integer[], $5::integer[], $6::integer[],
                      $8::integer[], $9::integer[])
               AS c (order_id, state, version, version_before, first, last, first_return, last_return)
         CROSS JOIN LATERAL (SELECT ctid FROM reservations WHERE order_id = c.order_id LIMIT 1) locked
         WHERE r.ctid = locked.ctid AND r.version = c.version_before
        """,
        [change.order_id for change in changes],
        [change.state for change in changes],
        [change.version for change in changes],
        [change.version_before for change in changes],
        firsts,
        lasts,
        [version for change in changes for version in change.level_versions],
        first_returns,
        last_returns,
        [quantity for change in changes for quantity in change.returned],
    )


async def change_levels(tx: Tx, deltas: Sequence[LevelDelta]) -> list[Level]:
    """Changes levels, one delta for each product; gives the changed levels.

    The guard in the statement decides: pieces are taken only where so many are available at this moment.
    """
    rows = await tx.fetch(
        LevelRow,
        """
        UPDATE levels l
           SET on_hand = l.on_hand + d.on_hand, reserved = l.reserved + d.reserved, version = l.version + d.versions,
               updated_at = greatest(l.updated_at, clock_timestamp())
          FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::integer[])
               AS d (product_id, on_hand, reserved, versions)
         CROSS JOIN LATERAL (SELECT ctid FROM levels WHERE product_id = d.product_id LIMIT 1) locked
         WHERE l.ctid = locked.ctid
           AND l.on_hand - l.reserved >= d.reserved - d.on_hand
           AND l.reserved + d.reserved >= 0
        RETURNING l.product_id, l.on_hand, l.reserved, l.on_hand - l.reserved AS available, l.updated_at, l.version
        """,
        [delta.product_id for delta in deltas],
        [delta.on_hand for delta in deltas],
        [delta.reserved for delta in deltas],
        [delta.versions for delta in deltas],
    )
    return [_level(row) for row in rows]


async def _insert_movements(tx: Tx, movements: Sequence[Movement]) -> None:
    # Unique keys refuse a second return with its reference, and a second adjustment with its key.
    await tx.execute(
        """
        INSERT INTO movements (product_id, level_version, kind, delta, order_id, reference, reason, actor_role,
                               actor_id)
        SELECT m.product_id, m.level_version, m.kind, m.delta, m.order_id, m.reference, m.reason, m.actor_role,
               m.actor_id
          FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::integer[], $5::bigint[], $6::text[], $7::text[],
                      $8::text[], $9::bigint[])
               WITH ORDINALITY
               AS m (product_id, level_version, kind, delta, order_id, reference, reason, actor_role, actor_id, n)
         ORDER BY m.n
        """,
        [movement.product_id for movement in movements],
        [movement.level_version for movement in movements],
        [movement.kind for movement in movements],
        [movement.delta for movement in movements],
        [movement.order_id for movement in movements],
        [movement.reference for movement in movements],
        [movement.reason for movement in movements],
        [movement.actor.role for movement in movements],
        [movement.actor.id for movement in movements],
    )


# ------------------------------------------------------------------------------------------------------------- trace


async def traced_reservation(tx: Tx, order_id: int) -> TracedReservationRow | None:
    return await tx.fetch_one(
        TracedReservationRow,
        """
        SELECT nonce, state, product_ids, quantities, created_at, ended_at FROM reservations WHERE order_id = $1
        """,
        order_id,
    )


async def traced_returns(tx: Tx, order_id: int) -> list[TracedReturnRow]:
    """Returned lines of an order, in the order of their returns."""
    return await tx.fetch(
        TracedReturnRow,
        """
        SELECT reference, product_id, delta AS quantity, at
          FROM movements
         WHERE kind = 'return' AND order_id = $1
         ORDER BY id
        """,
        order_id,
    )


# --------------------------------------------------------------------------------------------------- reconciliation


async def indefinite_holds(tx: Tx, before: int, quiet_seconds: float) -> list[Hold]:
    """From the page of reservations before an order, up to `HOLDS_LIMIT` quiet holds without an expiry."""
    rows = await tx.fetch(
        OrderRow,
        """
        WITH page AS MATERIALIZED (
            SELECT order_id, nonce, state, expires_at, updated_at
              FROM reservations
             WHERE order_id < $1
             ORDER BY order_id DESC
             LIMIT $2
        )
        SELECT order_id, nonce
          FROM page
         WHERE state = 'held' AND expires_at IS NULL AND updated_at < now() - make_interval(secs => $3)
         LIMIT $4
        """,
        before,
        PAGE,
        quiet_seconds,
        HOLDS_LIMIT,
    )
    return [Hold(order_id=row.order_id, order_nonce=row.nonce) for row in rows]


async def end_of_page(tx: Tx, before: int) -> int | None:
    """The last order of that page; None on the last page."""
    last = await tx.fetch_values(
        int,
        "SELECT order_id FROM reservations WHERE order_id < $1 ORDER BY order_id DESC OFFSET $2 - 1 LIMIT 1",
        before,
        PAGE,
    )
    return last[0] if last else None
