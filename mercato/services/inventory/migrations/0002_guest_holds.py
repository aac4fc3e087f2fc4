"""Which of the held reservations are of guests."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Written and read under the lock of the product's level. Rows of reservations that have ended are deleted by the
    # next guest's reservation of the product: what ends reservations needs not know of guests.
    op.execute(
        """
        CREATE TABLE guest_holds (
            product_id bigint NOT NULL,
            order_id bigint NOT NULL,
            quantity integer NOT NULL,
            CONSTRAINT guest_holds_pkey PRIMARY KEY (product_id, order_id),
            CONSTRAINT guest_holds_quantity_positive CHECK (quantity > 0)
        )
        """
    )
