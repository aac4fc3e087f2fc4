"""What a customer wants the shop to know about an order."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # A constant default: the table is not written anew. Its length is checked where it comes in.
    op.execute("ALTER TABLE orders ADD COLUMN customer_note text NOT NULL DEFAULT ''")
