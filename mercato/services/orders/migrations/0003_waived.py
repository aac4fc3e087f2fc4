"""What of an order's total is not taken."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # A constant default: the table is not written anew. NOT VALID: it is not read as a whole under the lock either;
    # rows that are there have 0 and hold the constraint that this one sharpens.
    op.execute("ALTER TABLE orders ADD COLUMN waived_minor bigint NOT NULL DEFAULT 0")
    op.execute(
        """
        ALTER TABLE orders ADD CONSTRAINT orders_refunds_within_paid CHECK (
            waived_minor >= 0 AND waived_minor + refunded_minor + refund_pending_minor <= total_minor) NOT VALID
        """
    )
