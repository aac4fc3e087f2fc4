"""Everything that events need, on both sides, and a table of effects that takes the same effect twice."""

from alembic import op

from mercato.chassis import events

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(events.OUTBOX)
    op.execute(events.OUTBOX_INDEX)
    op.execute(events.RELAY)
    op.execute(events.INBOX)
    op.execute(events.DEAD_LETTERS)
    op.execute(
        """
        CREATE TABLE effects (
            n bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT effects_pkey PRIMARY KEY,
            consumer text NOT NULL,
            event_id bigint NOT NULL,
            subject_id bigint NOT NULL,
            version bigint NOT NULL
        )
        """
    )
