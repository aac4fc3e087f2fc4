"""The SQL statement that makes an account the owner of a guest's order."""

from __future__ import annotations

from mercato.chassis.contract import Actor
from mercato.chassis.postgres.database import Tx

from . import rules
from .read_store import OrderRecord, get
from .store import event_of


async def claim(tx: Tx, order_id: int, actor: Actor) -> OrderRecord:
    """Makes the account of `actor` the owner of an order that the caller has locked, and that no account owns."""
    claimed = await tx.execute(
        """
        WITH claimed AS (
            UPDATE orders o
               SET user_id = $2, version = o.version + 1, updated_at = greatest(o.updated_at, clock_timestamp())
             WHERE o.id = $1 AND o.user_id = 0
            RETURNING o.id, o.version, o.status, o.payment, o.fulfilment, o.updated_at
        )
        INSERT INTO history (order_id, version, status, payment, fulfilment, events, actor_role, actor_id, at)
        SELECT id, version, status, payment, fulfilment, '{order.claimed}', $3, $2, updated_at FROM claimed
        """,
        order_id,
        actor.id,
        actor.role,
    )
    assert claimed == 1, "the row is locked, and was a guest's"
    record = (await get(tx, [order_id]))[order_id]
    tx.emit([event_of(rules.CLAIMED, record.order)])
    return record
