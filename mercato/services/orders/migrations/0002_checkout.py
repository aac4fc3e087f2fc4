"""Checkout: sagas, refunds, returned quantities, why an order was cancelled; the outbox."""

from alembic import op

from mercato.chassis import events, saga

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Constants as defaults: no row is rewritten. The next revision validates the checks, without stopping writes.
    op.execute(
        """
        ALTER TABLE orders
            ADD COLUMN reason text,
            ADD COLUMN refunded_minor bigint NOT NULL DEFAULT 0,
            ADD COLUMN refund_pending_minor bigint NOT NULL DEFAULT 0,
            ADD CONSTRAINT orders_refunds_within_total CHECK (
                refunded_minor >= 0 AND refund_pending_minor >= 0
                AND refunded_minor + refund_pending_minor <= total_minor) NOT VALID
        """
    )
    op.execute(
        """
        ALTER TABLE order_lines
            ADD COLUMN returned integer NOT NULL DEFAULT 0,
            ADD CONSTRAINT order_lines_returned_within_quantity CHECK (returned BETWEEN 0 AND quantity) NOT VALID
        """
    )
    for statement in saga.TABLES:
        op.execute(statement)
    # Orders that wait from before begin their checkout now: their stock is reserved, and they expire like others. What
    # has been decided by hand already stays as it is.
    op.execute(
        """
        INSERT INTO sagas (kind, subject_id, reference, step, state, wake_at)
        SELECT 'checkout', id, '',
               CASE status WHEN 'pending' THEN 'reserve' ELSE 'done' END, '{}',
               CASE status WHEN 'pending' THEN now() END
          FROM orders
        """
    )
    op.execute(events.OUTBOX)
    op.execute(events.OUTBOX_INDEX)
    op.execute(events.RELAY)
