"""One move may concern two axes at once: confirming an order is also the authorization of its payment."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS order_history_by_axis")  # of a run that was cut short
        op.execute(
            """
            CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS order_history_by_axis
                ON order_history (order_id, version, axis)
            """
        )
    op.execute(
        """
        ALTER TABLE order_history
            -- squawk-ignore ban-drop-constraint
            DROP CONSTRAINT order_history_pkey,
            ADD CONSTRAINT order_history_pkey PRIMARY KEY USING INDEX order_history_by_axis
        """
    )
