"""The SQL statements of orders about money: keys of payments, refunds, returns."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor
from mercato.chassis.idempotency.keys import Identity, Keyed
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.sagas.store import Key
from mercato.contracts.orders import Order, RefundStatus, ReturnLine
from mercato.contracts.refunds import OrderRefunded

_encode: Final = msgspec.json.Encoder().encode
_decode_returned: Final = msgspec.json.Decoder(tuple[ReturnLine, ...]).decode

CANCEL: Final = "cancel"
"""The id of the refund by which a paid order was cancelled: it has no row of its own; the history records it."""

# ----------------------------------------------------------------------------------------------------------- paying


class PaymentKeyRow(Row):
    """The payment that a key has begun."""

    order_id: int
    payment_attempt: int
    fingerprint: bytes


async def payment_of_key(tx: Tx, identity: Identity) -> PaymentKeyRow | None:
    return await tx.fetch_one(
        PaymentKeyRow,
        "SELECT order_id, payment_attempt, fingerprint FROM payment_keys WHERE principal = $1 AND key = $2",
        *identity,
    )


async def insert_payment_key(tx: Tx, key: Keyed, order_id: int, payment_attempt: int) -> None:
    """Raises `UniqueViolation` where the key has begun a payment of another order at this moment."""
    await tx.execute(
        """
        INSERT INTO payment_keys (principal, key, fingerprint, order_id, payment_attempt) VALUES ($1, $2, $3, $4, $5)
        """,
        key.principal,
        key.key,
        key.fingerprint,
        order_id,
        payment_attempt,
    )


async def begin_payment(tx: Tx, order_id: int, payment_attempt: int, waived_minor: int) -> None:
    """Writes the number of a new payment of a locked order, and the part of the total that it does not take."""
    await tx.execute(
        "UPDATE orders SET payment_attempt = $2, waived_minor = $3 WHERE id = $1",
        order_id,
        payment_attempt,
        waived_minor,
    )


# --------------------------------------------------------------------------------------------------- refunds, returns


class RefundRecord(msgspec.Struct, frozen=True):
    """A refund, with the goods that were returned for it, if any."""

    order_id: int
    reference: str
    lines: tuple[ReturnLine, ...]
    amount_minor: int
    """0: only goods are returned, which were not paid for."""
    currency: str
    payment_attempt: int
    """The number of the payment that is refunded."""
    status: RefundStatus
    code: str | None
    """Why it was declined."""
    reason: str
    fingerprint: bytes | None
    """Of the request that began it."""
    actor_role: str
    actor_id: int
    created_at: datetime.datetime
    settled_at: datetime.datetime | None
    internal_note: str
    asked_minor: int | None
    """More than `amount_minor` where less was left; None: the refund is older than this column."""
    limit_reason: str


class NewRefund(msgspec.Struct, frozen=True):
    """A refund that is about to be written, as pending. Amounts as in `RefundRecord`."""

    order_id: int
    reference: str
    lines: tuple[ReturnLine, ...]
    amount_minor: int
    currency: str
    payment_attempt: int
    reason: str
    fingerprint: bytes | None
    internal_note: str
    asked_minor: int
    limit_reason: str


class RefundRow(Row):
    order_id: int
    reference: str
    lines: str
    amount_minor: int
    currency: str
    payment_attempt: int
    status: RefundStatus
    code: str | None
    reason: str
    fingerprint: bytes | None
    actor_role: str
    actor_id: int
    created_at: datetime.datetime
    settled_at: datetime.datetime | None
    internal_note: str
    asked_minor: int | None
    limit_reason: str


def _refund_record(row: RefundRow) -> RefundRecord:
    return RefundRecord(
        order_id=row.order_id,
        reference=row.reference,
        lines=_decode_returned(row.lines),
        amount_minor=row.amount_minor,
        currency=row.currency,
        payment_attempt=row.payment_attempt,
        status=row.status,
        code=row.code,
        reason=row.reason,
        fingerprint=row.fingerprint,
        actor_role=row.actor_role,
        actor_id=row.actor_id,
        created_at=row.created_at,
        settled_at=row.settled_at,
        internal_note=row.internal_note,
        asked_minor=row.asked_minor,
        limit_reason=row.limit_reason,
    )


async def refund_of_key(tx: Tx, reference: str) -> RefundRecord | None:
    """The refund that a key has begun, of any order."""
    row = await tx.fetch_one(
        RefundRow,
        """
        SELECT order_id, reference, lines, amount_minor, currency, payment_attempt, status, code, reason, fingerprint,
               actor_role, actor_id, created_at, settled_at, internal_note, asked_minor, limit_reason
          FROM refunds
         WHERE reference = $1 AND fingerprint IS NOT NULL
        """,
        reference,
    )
    return None if row is None else _refund_record(row)


async def refunds(tx: Tx, keys: Sequence[Key]) -> dict[tuple[int, str], RefundRecord]:
    """The refunds of sagas, by order and reference."""
    rows = await tx.fetch(
        RefundRow,
        """
        SELECT r.order_id, r.reference, r.lines, r.amount_minor, r.currency, r.payment_attempt, r.status, r.code,
               r.reason, r.fingerprint, r.actor_role, r.actor_id, r.created_at, r.settled_at,
               r.internal_note, r.asked_minor, r.limit_reason
          FROM unnest($1::bigint[], $2::text[]) AS w (order_id, reference)
         CROSS JOIN LATERAL (
            SELECT * FROM refunds WHERE order_id = w.order_id AND reference = w.reference LIMIT 1
         ) r
        """,
        [key[0] for key in keys],
        [key[2] for key in keys],
    )
    return {(row.order_id, row.reference): _refund_record(row) for row in rows}


async def refunds_of(tx: Tx, order_id: int) -> list[RefundRecord]:
    """The refunds and returns of an order, by time."""
    rows = await tx.fetch(
        RefundRow,
        """
        SELECT order_id, reference, lines, amount_minor, currency, payment_attempt, status, code, reason, fingerprint,
               actor_role, actor_id, created_at, settled_at, internal_note, asked_minor, limit_reason
          FROM refunds
         WHERE order_id = $1
         ORDER BY created_at, reference
        """,
        order_id,
    )
    return list(map(_refund_record, rows))


async def insert_refund(tx: Tx, refund: NewRefund, actor: Actor) -> None:
    await tx.execute(
        """
        INSERT INTO refunds (order_id, reference, lines, amount_minor, currency, payment_attempt, reason, actor_role,
                             actor_id, fingerprint, internal_note, asked_minor, limit_reason)
        VALUES ($1, $2, $3::json, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
        """,
        refund.order_id,
        refund.reference,
        _encode(refund.lines).decode(),
        refund.amount_minor,
        refund.currency,
        refund.payment_attempt,
        refund.reason,
        actor.role,
        actor.id,
        refund.fingerprint,
        refund.internal_note,
        refund.asked_minor,
        refund.limit_reason,
    )


async def settle_refunds(tx: Tx, settled: Sequence[tuple[RefundRecord, str | None]]) -> None:
    """Writes the results of refunds: succeeded, or declined with a code. The caller has locked their sagas."""
    await tx.execute(
        """
        UPDATE refunds r
           SET status = CASE WHEN w.code IS NULL THEN 'succeeded' ELSE 'declined' END,
               code = w.code,
               settled_at = clock_timestamp()
          FROM (
            SELECT k.place, w.code
              FROM unnest($1::bigint[], $2::text[], $3::text[]) AS w (order_id, reference, code)
             CROSS JOIN LATERAL (
                SELECT ctid AS place FROM refunds WHERE order_id = w.order_id AND reference = w.reference LIMIT 1
             ) k
          ) w
         WHERE r.ctid = w.place AND r.status = 'pending'
        """,
        [refund.order_id for refund, _ in settled],
        [refund.reference for refund, _ in settled],
        [code for _, code in settled],
    )


class Refunded(msgspec.Struct, frozen=True):
    """Money that was refunded. `order`: with this refund; `actor`: the one that asked for it."""

    order: Order
    refund_id: str
    amount_minor: int
    actor: Actor


def emit_refunded(tx: Tx, refunds: Sequence[Refunded]) -> None:
    """Emits the events of refunds. The caller has emitted those of their orders."""
    tx.emit([_refunded(refund) for refund in refunds])


def _refunded(refund: Refunded) -> Outgoing:
    order = refund.order
    data = OrderRefunded(
        order_id=order.id,
        user_id=order.user_id,
        refund_id=refund.refund_id,
        amount_minor=refund.amount_minor,
        refunded_minor=order.refunded_minor,
        currency=order.currency,
        version=order.version,
        actor_role=refund.actor.role,
        actor_id=refund.actor.id,
    )
    return Outgoing("refund.succeeded", "order", order.id, order.version, data)


async def reserve_refund(tx: Tx, order_id: int, amount_minor: int) -> bool:
    """Reserves an amount for a refund. False, and nothing written, where less is left.

    Of two concurrent refunds, the second sees what the first has reserved.
    """
    return bool(
        await tx.execute(
            """
            UPDATE orders
               SET refund_pending_minor = refund_pending_minor + $2
             WHERE id = $1 AND refunded_minor + refund_pending_minor + $2 <= total_minor - waived_minor
            """,
            order_id,
            amount_minor,
        )
    )


async def release_refunds(tx: Tx, amounts: Sequence[tuple[int, int]]) -> None:
    """Releases the reservations of declined refunds of locked orders. `amounts`: order and minor units of each."""
    await tx.execute(
        """
        UPDATE orders o
           SET refund_pending_minor = refund_pending_minor - w.amount_minor
          FROM unnest($1::bigint[], $2::bigint[]) AS w (order_id, amount_minor)
         CROSS JOIN LATERAL (SELECT ctid AS place FROM orders WHERE id = w.order_id LIMIT 1) k
         WHERE o.ctid = k.place
        """,
        [order_id for order_id, _ in amounts],
        [amount_minor for _, amount_minor in amounts],
    )


async def set_returned(tx: Tx, order_id: int, returned: Sequence[int]) -> None:
    """Writes the returned quantity of each line of an order that the caller has locked."""
    await tx.execute("UPDATE orders SET returned = $2::integer[] WHERE id = $1", order_id, returned)
