"""What staff note for staff, apart from the reasons that customers read."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # Constant defaults: no table is written anew. Their length is checked where they come in.
    op.execute("ALTER TABLE history ADD COLUMN internal_note text NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE refunds ADD COLUMN internal_note text NOT NULL DEFAULT ''")
