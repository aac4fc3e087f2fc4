"""A table for tests of the chassis."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE things (
            id bigint CONSTRAINT things_pkey PRIMARY KEY,
            name text NOT NULL,
            rank integer CONSTRAINT things_rank_key UNIQUE DEFERRABLE INITIALLY DEFERRED
        )
        """
    )
    op.execute("CREATE SEQUENCE things_number")
