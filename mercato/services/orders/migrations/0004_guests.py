"""The e-mail address that a guest gives with an order. The orders of guests have the user 0."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("ALTER TABLE orders ADD COLUMN guest_email text")
