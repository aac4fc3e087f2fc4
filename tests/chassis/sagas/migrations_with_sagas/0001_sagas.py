"""Sagas, and a table of effects that takes the same effect twice."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("CREATE SEQUENCE saga_epochs")
    op.execute(
        """
        CREATE TABLE sagas (
            subject_id bigint NOT NULL,
            kind text NOT NULL,
            reference text NOT NULL,
            step text NOT NULL,
            state text NOT NULL,
            epoch bigint NOT NULL DEFAULT nextval('saga_epochs'),
            version integer NOT NULL DEFAULT 1,
            tries integer NOT NULL DEFAULT 0,
            trace text,
            driver bigint,
            wake_at timestamptz,
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT sagas_pkey PRIMARY KEY (subject_id, kind, reference),
            CONSTRAINT sagas_driven_or_waiting CHECK (driver IS NULL OR wake_at IS NULL)
        ) WITH (fillfactor = 60)
        """
    )
    op.execute("CREATE INDEX sagas_driver_idx ON sagas (driver) WHERE driver IS NOT NULL")
    op.execute("CREATE INDEX sagas_wake_at_idx ON sagas (wake_at) WHERE wake_at IS NOT NULL")
    op.execute(
        """
        CREATE TABLE saga_drivers (
            driver bigint NOT NULL CONSTRAINT saga_drivers_pkey PRIMARY KEY,
            leased_until timestamptz NOT NULL,
            renewed_at timestamptz NOT NULL
        ) WITH (fillfactor = 50)
        """
    )
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
