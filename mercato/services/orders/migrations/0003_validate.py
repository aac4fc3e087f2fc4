"""Validates the checks of 0002 in a transaction of its own: it reads all rows, and stops nobody."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE orders VALIDATE CONSTRAINT orders_refunds_within_total")
    op.execute("ALTER TABLE order_lines VALIDATE CONSTRAINT order_lines_returned_within_quantity")
