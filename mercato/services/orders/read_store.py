"""The SQL statements that read and lock orders. Lists are in `list_store.py`, the history in `history_store.py`."""

from __future__ import annotations

import datetime
import operator
from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor
from mercato.chassis.idempotency.keys import Identity
from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.order_refusals import OrderNotFound
from mercato.contracts.orders import CancelReason, Fulfilment, Order, OrderLine, Payment, Status

from . import rules


class OrderRecord(msgspec.Struct, frozen=True, gc=False):
    """An order, and what only this service knows of it."""

    order: Order
    nonce: int
    """The random part of the order: requests to other services carry it beside the id."""
    payment_attempt: int
    """The number of the last payment that was begun, which is the captured one of a paid order; 0: none."""
    on_account: bool
    """It was confirmed without a payment."""
    refund_pending_minor: int
    open_units: tuple[int, ...] | None = None
    """Element n: pieces of line n's product that other open orders of the buyer had when this one was placed.

    None: they do not bound it.
    """

    @property
    def id(self) -> int:
        return self.order.id

    @property
    def refundable_minor(self) -> int:
        """The part of what was paid that was neither refunded nor reserved for a refund."""
        return rules.payable_minor(self.order) - self.order.refunded_minor - self.refund_pending_minor

    @property
    def is_being_refunded(self) -> bool:
        """Whether refunds of all that is left are under way."""
        return self.refund_pending_minor > 0 and self.refundable_minor == 0


class OrderRow(Row):
    id: int
    user_id: int
    status: Status
    payment: Payment
    fulfilment: Fulfilment
    currency: str
    total_minor: int
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    refunded_minor: int
    reason: str | None
    lines: str
    returned: list[int] | None
    nonce: int
    payment_attempt: int
    on_account: bool
    refund_pending_minor: int
    customer_note: str
    waived_minor: int
    guest_email: str | None
    open_units: list[int] | None


COLUMNS: Final = ", ".join(f"o.{name}" for name in OrderRow.__struct_fields__)
NOT_AS_STORED: Final = ("lines", "reason", "waived_minor")
AS_STORED: Final = tuple(
    name for name in Order.__struct_fields__ if name in OrderRow.__struct_fields__ and name not in NOT_AS_STORED
)
"""The fields of an order that are columns with the same name and value."""


class StoredLine(msgspec.Struct, frozen=True, gc=False):
    """A line as the JSON of its order stores it. Amounts in minor units."""

    id: int
    product_id: int
    sku: str
    name: str
    quantity: int
    unit_price_minor: int
    discount_minor: int
    tax_minor: int
    total_minor: int


_decode_lines: Final = msgspec.json.Decoder(tuple[StoredLine, ...]).decode
_as_stored: Final = operator.attrgetter(*AS_STORED)
_decode_reason: Final = msgspec.json.Decoder(CancelReason).decode


GET_SQL: Final = f"SELECT {COLUMNS} FROM orders o WHERE o.id = ANY($1::bigint[])"  # noqa: S608  # of constants alone
LOCK_SQL: Final = f"{GET_SQL} ORDER BY o.id FOR NO KEY UPDATE"


async def get(tx: Tx, ids: Sequence[int]) -> dict[int, OrderRecord]:
    """The orders that exist, by id."""
    return {row.id: record_of(row) for row in await tx.fetch(OrderRow, GET_SQL, ids)}


async def visible_record(tx: Tx, order_id: int, actor: Actor) -> OrderRecord:
    """An order that the caller may see. Raises `OrderNotFound`."""
    record = (await get(tx, [order_id])).get(order_id)
    order = rules.visible(record.order if record else None, order_id, actor)
    if record is None or isinstance(order, OrderNotFound):
        raise OrderNotFound(order_id=order_id)
    return record


async def bound_lock_waits(tx: Tx, seconds: float) -> None:
    """From now on, a statement of this transaction that waits longer for a lock raises `LockTimeout`."""
    await tx.execute("SELECT set_config('lock_timeout', $1, true)", f"{seconds * 1_000:.0f}ms")


async def lock(tx: Tx, ids: Sequence[int]) -> dict[int, OrderRecord]:
    """Orders that no other transaction changes before this one ends, by id."""
    return {row.id: record_of(row) for row in await tx.fetch(OrderRow, LOCK_SQL, ids)}


class KeyedRow(Row):
    order_id: int
    principal: str
    key: str
    fingerprint: bytes


class KeyedOrder(msgspec.Struct, frozen=True):
    """The order that was placed with a key, and the fingerprint of its request."""

    order: Order
    nonce: int
    fingerprint: bytes


async def by_keys(tx: Tx, identities: Sequence[Identity]) -> dict[Identity, KeyedOrder]:
    """The one order that was ever placed with each key, as it was when it was placed, by principal and key."""
    # One index lookup for each key: a join that was planned when the shop was new would read all orders.
    rows = await tx.fetch(
        KeyedRow,
        """
        SELECT o.id AS order_id, o.principal, o.idempotency_key AS key, o.fingerprint
          FROM unnest($1::text[], $2::text[]) AS w (principal, key)
         CROSS JOIN LATERAL (
            SELECT id, principal, idempotency_key, fingerprint
              FROM orders
             WHERE principal = w.principal AND idempotency_key = w.key AND idempotency_key IS NOT NULL
             LIMIT 1
         ) o
        """,
        [principal for principal, _ in identities],
        [key for _, key in identities],
    )
    found = await get(tx, [row.order_id for row in rows]) if rows else {}
    return {
        (row.principal, row.key): KeyedOrder(
            rules.as_placed(found[row.order_id].order, row.principal), found[row.order_id].nonce, row.fingerprint
        )
        for row in rows
    }


def record_of(row: OrderRow) -> OrderRecord:
    stored = _decode_lines(row.lines)
    returned = row.returned or [0] * len(stored)
    lines = tuple(
        OrderLine(
            id=line.id,
            product_id=line.product_id,
            sku=line.sku,
            name=line.name,
            quantity=line.quantity,
            unit_price_minor=line.unit_price_minor,
            discount_minor=line.discount_minor,
            tax_minor=line.tax_minor,
            line_total_minor=line.total_minor,
            returned=back,
        )
        for line, back in zip(stored, returned, strict=True)
    )
    order = Order(
        lines=lines,
        reason=None if row.reason is None else _decode_reason(row.reason),
        # The column is written when a payment begins: goods that are returned before then lower what is due.
        waived_minor=rules.returned_value(lines) if row.payment == "unpaid" else row.waived_minor,
        **dict(zip(AS_STORED, _as_stored(row), strict=True)),
    )
    open_units = None if row.open_units is None else tuple(row.open_units)
    return OrderRecord(order, row.nonce, row.payment_attempt, row.on_account, row.refund_pending_minor, open_units)
