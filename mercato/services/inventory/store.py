"""Every SQL statement of inventory.

Locks are taken in one order in every transaction, or two batches would wait for each other for ever:

    0. the keys of adjustments, in key order
    1. new reservations, by ascending order (the insert itself locks; who inserts the same one waits)
    2. reservations that are there, by ascending order
    3. new levels, by ascending product (as in step 1)
    4. levels that are there, by ascending product

Who waits in step 1 or 3 holds nothing that those in later steps wait for: they see only what is committed.
The expiry loop skips step 2 where somebody else is at it, so that it never waits there.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Collection, Sequence

import msgspec

from mercato.chassis import events
from mercato.chassis.db import Row, Tx
from mercato.chassis.rounds import PAGE
from mercato.contracts.inventory import Level, MovementKind, ReservationState

from .rules import Change, HeldLine, Movement, Plan, ReturnedLine, Shift, Standing


class NotAsLocked(Exception):
    """A guard refused what was decided about locked rows: nothing of this transaction may be committed."""


class OpenedRow(Row):
    order_id: int
    expires_in_s: float | None


class ReservationRow(Row):
    order_id: int
    state: ReservationState
    version: int
    expires_in_s: float | None


class LineRow(Row):
    order_id: int
    product_id: int
    quantity: int
    returned: int


class LevelRow(Row):
    product_id: int
    on_hand: int
    reserved: int
    available: int
    updated_at: datetime.datetime
    version: int


class ReturnRow(Row):
    order_id: int
    reference: str


class AdjustmentRow(Row):
    reference: str
    product_id: int
    delta: int
    reason: str


class TracedReservationRow(Row):
    state: ReservationState
    created_at: datetime.datetime
    updated_at: datetime.datetime


class TracedMovementRow(Row):
    id: int
    kind: MovementKind
    reference: str | None
    product_id: int
    quantity: int
    at: datetime.datetime


# ------------------------------------------------------------------------------------------------------ reservations


async def open_reservations(
    tx: Tx, order_ids: Sequence[int], for_payment: Sequence[bool], hold_seconds: float
) -> list[Standing]:
    """Inserts held reservations without lines; gives those that were not there. The rest is there, and committed."""
    # A twin that is inserting one of them makes this wait for its commit; one that was refused by then is ours.
    rows = await tx.fetch(
        OpenedRow,
        """
        INSERT INTO reservations (order_id, state, expires_at)
        SELECT w.order_id, 'held', CASE WHEN w.for_payment THEN NULL ELSE now() + make_interval(secs => $3) END
          FROM unnest($1::bigint[], $2::boolean[]) AS w (order_id, for_payment)
         ORDER BY w.order_id
            ON CONFLICT ON CONSTRAINT reservations_pkey DO NOTHING
        RETURNING order_id, extract(epoch FROM expires_at - clock_timestamp())::float8 AS expires_in_s
        """,
        order_ids,
        for_payment,
        hold_seconds,
    )
    return [Standing(row.order_id, "held", 1, row.expires_in_s) for row in rows]


async def bury(tx: Tx, order_ids: Sequence[int]) -> list[Standing]:
    """Inserts released reservations without lines; gives those that were not there.

    A reserve that is still on its way finds them, also when it is running at this very moment: one of the two waits.
    """
    inserted = await tx.fetch_values(
        int,
        """
        INSERT INTO reservations (order_id, state)
        SELECT w.order_id, 'released' FROM unnest($1::bigint[]) AS w (order_id)
         ORDER BY w.order_id
            ON CONFLICT ON CONSTRAINT reservations_pkey DO NOTHING
        RETURNING order_id
        """,
        order_ids,
    )
    return [Standing(order_id, "released", 1, None) for order_id in inserted]


async def lock_reservations(tx: Tx, order_ids: Collection[int]) -> list[Standing]:
    """Those that are there, by ascending order, as they stay until this transaction ends."""
    if not order_ids:
        return []
    # What its time is measured by is this clock alone, and not that of the transaction's start: it may have waited.
    rows = await tx.fetch(
        ReservationRow,
        """
        SELECT order_id, state, version, extract(epoch FROM expires_at - clock_timestamp())::float8 AS expires_in_s
          FROM reservations
         WHERE order_id = ANY($1::bigint[])
         ORDER BY order_id
           FOR NO KEY UPDATE
        """,
        list(order_ids),
    )
    return await _with_lines(tx, rows)


async def lock_overdue(tx: Tx, limit: int) -> list[Standing]:
    """Up to `limit` held reservations whose time is over and that nobody else is at."""
    # A payment that begins meanwhile takes the expiry away: the row is looked at again under its lock, and left out.
    rows = await tx.fetch(
        ReservationRow,
        """
        SELECT order_id, state, version, extract(epoch FROM expires_at - clock_timestamp())::float8 AS expires_in_s
          FROM reservations
         WHERE expires_at < now()
         ORDER BY expires_at
         LIMIT $1
           FOR NO KEY UPDATE SKIP LOCKED
        """,
        limit,
    )
    return await _with_lines(tx, rows)


async def _with_lines(tx: Tx, rows: Sequence[ReservationRow]) -> list[Standing]:
    # A statement of its own, after the lock: it sees what those have committed for whom the lock was waited.
    lines: defaultdict[int, list[HeldLine]] = defaultdict(list)
    if rows:
        for line in await lines_of(tx, [row.order_id for row in rows]):
            lines[line.order_id].append(HeldLine(line.product_id, line.quantity, line.returned))
    return [
        Standing(row.order_id, row.state, row.version, row.expires_in_s, tuple(lines[row.order_id])) for row in rows
    ]


async def lines_of(tx: Tx, order_ids: Sequence[int]) -> list[LineRow]:
    """By ascending order and product."""
    return await tx.fetch(
        LineRow,
        """
        SELECT order_id, product_id, quantity, returned
          FROM reservation_lines
         WHERE order_id = ANY($1::bigint[])
         ORDER BY order_id, product_id
        """,
        order_ids,
    )


async def returns_made(tx: Tx, wanted: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
    """Which of these returns (order, reference) have been made. Their reservations are locked by the caller."""
    rows = await tx.fetch(
        ReturnRow,
        """
        SELECT DISTINCT m.order_id, m.reference
          FROM unnest($1::bigint[], $2::text[]) AS w (order_id, reference)
          JOIN movements m ON m.kind = 'return' AND m.order_id = w.order_id AND m.reference = w.reference
        """,
        [order_id for order_id, _ in wanted],
        [reference for _, reference in wanted],
    )
    return {(row.order_id, row.reference) for row in rows}


# ------------------------------------------------------------------------------------------------------------ levels


async def lock_levels(tx: Tx, product_ids: Collection[int]) -> list[Level]:
    """Those that somebody has counted, by ascending product, as they stay until this transaction ends."""
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


async def open_levels(tx: Tx, product_ids: Sequence[int]) -> int:
    """Makes empty levels at version 0 where there are none, for this transaction to count; gives how many."""
    return await tx.execute(
        """
        INSERT INTO levels (product_id)
        SELECT w.product_id FROM unnest($1::bigint[]) AS w (product_id)
         ORDER BY w.product_id
            ON CONFLICT ON CONSTRAINT levels_pkey DO NOTHING
        """,
        product_ids,
    )


async def keep_levels(tx: Tx) -> bool:
    """Keeps everybody else from writing levels until this transaction ends; True where there are none."""
    await tx.execute("""LOCK TABLE levels IN SHARE ROW EXCLUSIVE MODE""")
    # A statement of its own: it must see what was committed while the lock was waited for.
    return not await tx.fetch_values(int, """SELECT 1 FROM levels LIMIT 1""")


async def levels(tx: Tx, product_ids: Sequence[int]) -> dict[int, Level]:
    """Those that somebody has counted, by product."""
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
    # What is available has no index: each reservation would write to it. This reads levels until the page is full.
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


def _level(row: LevelRow) -> Level:
    return Level(**msgspec.structs.asdict(row))


async def adjustments(tx: Tx, references: Sequence[str]) -> dict[str, AdjustmentRow]:
    """What was once adjusted under these references, by reference."""
    # One look at the index for each: a join that was planned when nothing had moved would read all movements.
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


async def write(tx: Tx, plan: Plan) -> dict[int, Level]:
    """Writes what was decided about the rows that this transaction has locked; gives the changed levels.

    Raises `NotAsLocked` when a guard refuses any of it: what did not come back did not happen.
    """
    if plan.refused:
        await _remove(tx, plan.refused)
    if plan.opened:
        await _insert_lines(tx, plan.opened)
    if plan.changes and await change_reservations(tx, plan.changes) != len(plan.changes):
        raise NotAsLocked("reservations")
    if plan.returned and await _return_lines(tx, plan.returned) != len(plan.returned):
        raise NotAsLocked("lines")
    changed = await shift_levels(tx, plan.shifts) if plan.shifts else []
    if len(changed) != len(plan.shifts):
        raise NotAsLocked("levels")
    if plan.movements:
        await _insert_movements(tx, plan.movements)
    await events.emit(tx, plan.events)
    return {level.product_id: level for level in changed}


async def _remove(tx: Tx, order_ids: Sequence[int]) -> None:
    # They were inserted by this transaction: nobody has ever seen them.
    await tx.execute("""DELETE FROM reservations WHERE order_id = ANY($1::bigint[])""", order_ids)


async def _insert_lines(tx: Tx, reservations: Sequence[Standing]) -> None:
    # Before the levels change: the foreign keys then meet rows whose locks this transaction holds, and lock nothing.
    lines = [(reservation.order_id, line) for reservation in reservations for line in reservation.lines]
    await tx.execute(
        """
        INSERT INTO reservation_lines (order_id, product_id, quantity)
        SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::integer[])
        """,
        [order_id for order_id, _ in lines],
        [line.product_id for _, line in lines],
        [line.quantity for _, line in lines],
    )


async def change_reservations(tx: Tx, changes: Sequence[Change]) -> int:
    """Gives the number of those that were still at the version before. Whatever changes, nothing expires any more."""
    return await tx.execute(
        """
        UPDATE reservations r
           SET state = c.state, version = c.version, expires_at = NULL,
               updated_at = greatest(r.updated_at, clock_timestamp())
          FROM unnest($1::bigint[], $2::text[], $3::integer[], $4::integer[])
               AS c (order_id, state, version, version_before)
         WHERE r.order_id = c.order_id AND r.version = c.version_before
        """,
        [change.order_id for change in changes],
        [change.state for change in changes],
        [change.version for change in changes],
        [change.version_before for change in changes],
    )


async def _return_lines(tx: Tx, lines: Sequence[ReturnedLine]) -> int:
    # No more comes back than was sold.
    return await tx.execute(
        """
        UPDATE reservation_lines l
           SET returned = l.returned + b.quantity
          FROM unnest($1::bigint[], $2::bigint[], $3::integer[]) AS b (order_id, product_id, quantity)
         WHERE l.order_id = b.order_id AND l.product_id = b.product_id AND l.returned + b.quantity <= l.quantity
        """,
        [line.order_id for line in lines],
        [line.product_id for line in lines],
        [line.quantity for line in lines],
    )


async def shift_levels(tx: Tx, shifts: Sequence[Shift]) -> list[Level]:
    """Changes levels, one shift a product; gives those that had enough, as they are now.

    The guard decides, whatever the caller believes: pieces are taken only where so many are available in this moment.
    """
    rows = await tx.fetch(
        LevelRow,
        """
        UPDATE levels l
           SET on_hand = l.on_hand + s.on_hand, reserved = l.reserved + s.reserved, version = l.version + s.versions,
               updated_at = greatest(l.updated_at, clock_timestamp())
          FROM unnest($1::bigint[], $2::integer[], $3::integer[], $4::integer[])
               AS s (product_id, on_hand, reserved, versions)
         WHERE l.product_id = s.product_id
           AND l.on_hand - l.reserved >= s.reserved - s.on_hand
           AND l.reserved + s.reserved >= 0
        RETURNING l.product_id, l.on_hand, l.reserved, l.on_hand - l.reserved AS available, l.updated_at, l.version
        """,
        [shift.product_id for shift in shifts],
        [shift.on_hand for shift in shifts],
        [shift.reserved for shift in shifts],
        [shift.versions for shift in shifts],
    )
    return [_level(row) for row in rows]


async def _insert_movements(tx: Tx, movements: Sequence[Movement]) -> None:
    # Unique keys refuse a second sale of a line, a second return with its reference, a second adjustment with its key.
    await tx.execute(
        """
        INSERT INTO movements (product_id, kind, delta, order_id, reference, reason, actor_role, actor_id)
        SELECT m.product_id, m.kind, m.delta, m.order_id, m.reference, m.reason, m.actor_role, m.actor_id
          FROM unnest($1::bigint[], $2::text[], $3::integer[], $4::bigint[], $5::text[], $6::text[], $7::text[],
                      $8::bigint[])
               WITH ORDINALITY
               AS m (product_id, kind, delta, order_id, reference, reason, actor_role, actor_id, n)
         ORDER BY m.n
        """,
        [movement.product_id for movement in movements],
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
        SELECT state, created_at, updated_at FROM reservations WHERE order_id = $1
        """,
        order_id,
    )


async def traced_movements(tx: Tx, order_id: int) -> list[TracedMovementRow]:
    """Sales and returns of an order, in the order in which they happened."""
    # Two parts, for two indexes: each of them knows one kind.
    return await tx.fetch(
        TracedMovementRow,
        """
        SELECT id, kind, reference, product_id, -delta AS quantity, at
          FROM movements
         WHERE kind = 'sale' AND order_id = $1
         UNION ALL
        SELECT id, kind, reference, product_id, delta AS quantity, at
          FROM movements
         WHERE kind = 'return' AND order_id = $1
         ORDER BY id
        """,
        order_id,
    )


# --------------------------------------------------------------------------------------------------- reconciliation


async def pinned(tx: Tx, before: int, quiet_seconds: float, limit: int) -> list[int]:
    """The orders of those on the page of reservations before an order that are held without an end for a while."""
    return await tx.fetch_values(
        int,
        """
        WITH page AS MATERIALIZED (
            SELECT order_id, state, expires_at, updated_at
              FROM reservations
             WHERE order_id < $1
             ORDER BY order_id DESC
             LIMIT $2
        )
        SELECT order_id
          FROM page
         WHERE state = 'held' AND expires_at IS NULL AND updated_at < now() - make_interval(secs => $3)
         LIMIT $4
        """,
        before,
        PAGE,
        quiet_seconds,
        limit,
    )


async def end_of_page(tx: Tx, before: int) -> int | None:
    """The last order of that page; None where there are no more behind it."""
    last = await tx.fetch_values(
        int,
        "SELECT order_id FROM reservations WHERE order_id < $1 ORDER BY order_id DESC OFFSET $2 - 1 LIMIT 1",
        before,
        PAGE,
    )
    return last[0] if last else None
