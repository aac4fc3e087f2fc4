"""Sagas, and a table of effects that takes the same effect twice."""

from alembic import op

from mercato.chassis import saga

revision = "0001"
down_revision = None


def upgrade() -> None:
    for statement in saga.TABLES:
        op.execute(statement)
    op.execute(
        """
        CREATE TABLE effects (
            n bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT effects_pkey PRIMARY KEY,
            subject_id bigint NOT NULL,
            step text NOT NULL,
            driver text NOT NULL
        )
        """
    )
