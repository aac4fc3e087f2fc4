"""How much was asked of a refund, and why less was given."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # No default, and constant defaults: no table is written anew. A refund from before asked for what it gave (NULL).
    op.execute("ALTER TABLE refunds ADD COLUMN asked_minor bigint")
    op.execute("ALTER TABLE refunds ADD COLUMN limit_reason text NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE history ADD COLUMN limit_reason text NOT NULL DEFAULT ''")
    # NOT VALID: the rows that are there are not read under the lock, and have NULL.
    op.execute(
        """
        ALTER TABLE refunds ADD CONSTRAINT refunds_limited_with_a_reason CHECK (
            asked_minor >= amount_minor AND (asked_minor > amount_minor) = (limit_reason <> '')) NOT VALID
        """
    )
