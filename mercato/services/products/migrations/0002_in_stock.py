"""Whether a product can be bought at this moment, as inventory tells."""

from alembic import op

from mercato.chassis import events

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # `stock_version` is that of the newest news: news that come late change nothing.
    op.execute(
        """
        ALTER TABLE products
            ADD COLUMN in_stock boolean NOT NULL DEFAULT false,
            ADD COLUMN stock_version bigint NOT NULL DEFAULT 0
        """
    )
    op.execute(events.INBOX)
    op.execute(events.DEAD_LETTERS)
