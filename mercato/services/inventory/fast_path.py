"""The hot path of stock: one statement for a whole batch, which changes everything or nothing.

    reserve_all     holds new orders, where all are new and there is enough stock for all together
    end_all_held    commits, releases or expires, where all reservations are held

A batch that does not fit is rolled back and decided one by one (`reserving.py`): an order without stock, or a repeated
one, must not fail the others. Locks are taken in the order of `store.py`, and in the order of keys, because the CTE
that locks is sorted and the update takes its rows from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.inventory import ReservationState

from .rules import ReservedLine


class NewReservation(msgspec.Struct, frozen=True, gc=False):
    """A reservation to insert. `lines` by ascending product; `for_payment`: it does not expire."""

    order_id: int
    nonce: int
    for_payment: bool
    lines: tuple[ReservedLine, ...]


class ReservedLevelRow(Row):
    product_id: int
    available: int
    version: int
    elapsed_s: float
    """The time since the transaction began: the holds of the batch end so much sooner than `hold_seconds` from now."""


class EndedRow(Row):
    """A reservation that the batch has ended. `available` is that of each line's level after the batch."""

    order_id: int
    version: int
    product_ids: list[int]
    quantities: list[int]
    level_versions: list[int]
    available: list[int]


RESERVE_ALL: Final = """
    WITH inserted AS (
        INSERT INTO reservations (order_id, nonce, state, expires_at, product_ids, quantities)
        SELECT n.order_id, n.nonce, 'held', CASE WHEN NOT n.for_payment THEN now() + make_interval(secs => $10) END,
               ($6::bigint[])[n.first:n.last], ($7::integer[])[n.first:n.last]
          FROM unnest($1::bigint[], $2::bigint[], $3::boolean[], $4::integer[], $5::integer[])
               AS n (order_id, nonce, for_payment, first, last)
         -- Read without a lock, so it guarantees nothing: it saves batches of a sold-out product the inserts.
         WHERE cardinality($8::bigint[]) = (
            SELECT count(*)
              FROM levels
             WHERE product_id = ANY($8) AND on_hand - reserved >= ($9::integer[])[width_bucket(product_id, $8)]
               AND on_hand >= ($11::integer[])[width_bucket(product_id, $8)]
         )
         ORDER BY n.order_id
            ON CONFLICT ON CONSTRAINT reservations_pkey DO NOTHING
        RETURNING order_id
    ), locked AS MATERIALIZED (
        SELECT product_id
          FROM levels
         WHERE product_id = ANY($8) AND (SELECT count(*) FROM inserted) = cardinality($1)
         ORDER BY product_id
           FOR NO KEY UPDATE
    ), changed AS (
        UPDATE levels
           SET reserved = reserved + $9[width_bucket(product_id, $8)], version = version + 1,
               updated_at = greatest(updated_at, clock_timestamp())
         WHERE product_id = ANY($8) AND (SELECT count(*) FROM locked) = cardinality($8)
           AND on_hand - reserved >= $9[width_bucket(product_id, $8)]
           AND on_hand >= $11[width_bucket(product_id, $8)]
        RETURNING product_id, on_hand - reserved AS available, version
    )
    SELECT product_id, available, version, extract(epoch FROM clock_timestamp() - now())::float8 AS elapsed_s
      FROM changed
"""


async def reserve_all(
    tx: Tx,
    reservations: Sequence[NewReservation],
    quantities: Mapping[int, int],
    hold_seconds: float,
    needed_on_hand: Mapping[int, int],
) -> list[ReservedLevelRow]:
    """Holds the lines of new orders, each order once; `quantities` are their sums by product.

    `needed_on_hand`, by product: with fewer pieces on hand, an order would exceed the bound of its customer.

    Gives the changed levels. Where these are fewer than the products, something does not fit or exists already, and the
    caller must roll back.
    """
    product_ids = sorted(quantities)
    return await tx.fetch(
        ReservedLevelRow,
        RESERVE_ALL,
        *new_columns(reservations),
        product_ids,
        [quantities[product_id] for product_id in product_ids],
        hold_seconds,
        [needed_on_hand.get(product_id, 0) for product_id in product_ids],
    )


def new_columns(reservations: Sequence[NewReservation]) -> tuple[list[object], ...]:
    """Id, nonce, `for_payment`, first and last line of each; then products and quantities of all lines."""
    firsts, lasts = places([len(reservation.lines) for reservation in reservations])
    lines = [line for reservation in reservations for line in reservation.lines]
    return (
        [reservation.order_id for reservation in reservations],
        [reservation.nonce for reservation in reservations],
        [reservation.for_payment for reservation in reservations],
        firsts,
        lasts,
        [line.product_id for line in lines],
        [line.quantity for line in lines],
    )


def places(lengths: Sequence[int]) -> tuple[list[object], list[object]]:
    """The first and last index, from 1, of each of several arrays in their concatenation."""
    lasts = list(itertools.accumulate(lengths))
    return [last - length + 1 for last, length in zip(lasts, lengths, strict=True)], [*lasts]


END_ALL_HELD: Final = """
    WITH locked AS MATERIALIZED (
        SELECT r.*, r.state = 'held' AND r.nonce = w.nonce AS may_end
          FROM (SELECT * FROM unnest($1::bigint[], $2::bigint[]) AS w (order_id, nonce) ORDER BY order_id) w
         CROSS JOIN LATERAL (
            SELECT ctid AS tid, order_id, nonce, state, version, expires_at, product_ids, quantities, returned
              FROM reservations
             WHERE order_id = w.order_id
             LIMIT 1
               FOR NO KEY UPDATE
         ) r
    ), sums AS MATERIALIZED (
        SELECT line.product_id, sum(line.quantity)::integer AS quantity
          FROM locked CROSS JOIN unnest(product_ids, quantities) AS line (product_id, quantity)
         WHERE (SELECT count(*) FROM locked WHERE may_end) = cardinality($1)
         GROUP BY line.product_id
    ), wanted AS MATERIALIZED (
        SELECT array_agg(product_id ORDER BY product_id) AS product_ids,
               array_agg(quantity ORDER BY product_id) AS quantities
          FROM sums
    ), locked_levels AS MATERIALIZED (
        SELECT product_id
          FROM levels
         WHERE product_id = ANY((SELECT product_ids FROM wanted)::bigint[])
         ORDER BY product_id
           FOR NO KEY UPDATE
    ), changed AS (
        -- `wanted` in uncorrelated subqueries, which are evaluated once, also for a row that has changed meanwhile.
        UPDATE levels
           SET on_hand = on_hand - ($3 = 'committed')::integer
                         * (SELECT quantities FROM wanted)[width_bucket(product_id, (SELECT product_ids FROM wanted))],
               reserved = reserved
                          - (SELECT quantities FROM wanted)[width_bucket(product_id, (SELECT product_ids FROM wanted))],
               version = version + 1, updated_at = greatest(updated_at, clock_timestamp())
         WHERE product_id = ANY((SELECT product_ids FROM wanted)::bigint[])
           AND (SELECT count(*) FROM locked_levels) = cardinality((SELECT product_ids FROM wanted))
        RETURNING product_id, version, on_hand - reserved AS available
    ), sorted AS MATERIALIZED (
        SELECT array_agg(product_id ORDER BY product_id) AS product_ids,
               array_agg(version ORDER BY product_id) AS versions,
               array_agg(available ORDER BY product_id) AS available
          FROM changed
        HAVING count(*) = cardinality((SELECT product_ids FROM wanted))
    ), decided AS MATERIALIZED (
        SELECT l.tid, l.order_id, l.version + 1 AS version, l.product_ids, l.quantities,
               ARRAY(SELECT s.versions[width_bucket(id, s.product_ids)] FROM unnest(l.product_ids) AS id)
                   AS level_versions,
               ARRAY(SELECT s.available[width_bucket(id, s.product_ids)] FROM unnest(l.product_ids) AS id)
                   AS available
          FROM locked l CROSS JOIN sorted s
    ), ended AS (
        -- By the ctid of the locked row. A row that another transaction has changed since this statement began has
        -- another ctid and is not found: the count shows that to the caller, who must not commit.
        UPDATE reservations r
           SET state = $3, expires_at = NULL, version = d.version, ended_at = clock_timestamp(),
               updated_at = greatest(r.updated_at, clock_timestamp()),
               level_versions = CASE WHEN $3 = 'committed' THEN d.level_versions END
          FROM decided d
         WHERE r.ctid = d.tid
        RETURNING r.order_id
    )
    SELECT order_id, version, product_ids, quantities, level_versions, available
      FROM decided
     WHERE (SELECT count(*) FROM ended) = cardinality($1)
"""


async def end_all_held(tx: Tx, orders: Mapping[int, int], state: ReservationState) -> list[EndedRow]:
    """Ends the reservations of these orders (id to nonce), where all exist, are held, and have that nonce.

    Gives all of them by ascending order, or none: then the caller must roll back.
    """
    return await tx.fetch(EndedRow, END_ALL_HELD, list(orders), list(orders.values()), state)
