"""The state of the consumer that writes changes of prices and refunds into the security log."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # The position of a consumer in the outbox of a source. `at`: the time of the row there; NULL before the first.
    op.execute(
        """
        CREATE TABLE IF NOT EXISTS cursors (
            consumer text NOT NULL,
            source text NOT NULL,
            position bigint NOT NULL,
            at timestamptz,
            CONSTRAINT cursors_pkey PRIMARY KEY (consumer, source)
        ) WITH (fillfactor = 20)
        """
    )
    # Events that a consumer could not process, and later ones of their subjects: of these only the first has a finite
    # `retry_at`. A dead event waits for an operator.
    op.execute(
        """
        CREATE TABLE IF NOT EXISTS parked (
            consumer text NOT NULL,
            source text NOT NULL,
            position bigint NOT NULL,
            type text NOT NULL,
            subject text NOT NULL,
            subject_id bigint NOT NULL,
            version bigint NOT NULL,
            data text NOT NULL,
            event_at timestamptz NOT NULL,
            tries integer NOT NULL,
            retry_at timestamptz NOT NULL,
            error text NOT NULL,
            at timestamptz NOT NULL DEFAULT now(),
            dead_at timestamptz,
            replayed_at timestamptz,
            CONSTRAINT parked_pkey PRIMARY KEY (consumer, source, position)
        )
        """
    )
    op.execute(
        """
        CREATE INDEX IF NOT EXISTS parked_subject_idx ON parked (consumer, source, subject, subject_id, position)
         WHERE dead_at IS NULL
        """
    )
    op.execute(
        "CREATE INDEX IF NOT EXISTS parked_retry_at_idx ON parked (consumer, source, retry_at) WHERE dead_at IS NULL"
    )
