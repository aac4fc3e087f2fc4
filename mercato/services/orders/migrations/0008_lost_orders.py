"""Orders that this database had before it was restored alone from an older backup, as far as payments knows them."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    # Filled when the sequence of orders is moved past ids that others know (`mercato/operations/ids.py`). Empty in a
    # shop that was never restored so. A repeated key makes the same nonce again, and finds its former order here.
    op.execute(
        """
        CREATE TABLE lost_orders (
            nonce bigint CONSTRAINT lost_orders_pkey PRIMARY KEY,
            order_id bigint NOT NULL
        )
        """
    )
