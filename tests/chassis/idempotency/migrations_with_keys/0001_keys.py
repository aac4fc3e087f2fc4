"""The table of idempotency keys alone."""

from alembic import op

from mercato.chassis.idempotency import keys as idempotency

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(idempotency.TABLE)
    op.execute(idempotency.EXPIRY_INDEX)
