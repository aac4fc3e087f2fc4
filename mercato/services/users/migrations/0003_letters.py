"""Letters with links: they prove an address, or let its owner set a password."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE users ADD COLUMN IF NOT EXISTS email_proven_at timestamptz")
    # The secret of a link is derived from the id, which is random, and a key: a copy of the table opens no account.
    # `user_id` NULL: there was no account with the address that was asked for. `wake_at`: when it is sent next.
    op.execute(
        """
        CREATE TABLE letters (
            id uuid CONSTRAINT letters_pkey PRIMARY KEY,
            kind text NOT NULL,
            address text NOT NULL,
            user_id bigint CONSTRAINT letters_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
            created_at timestamptz NOT NULL DEFAULT now(),
            wake_at timestamptz,
            tries integer NOT NULL DEFAULT 0,
            outcome text,
            settled_at timestamptz,
            used_at timestamptz,
            CONSTRAINT letters_kind_known CHECK (kind IN ('proof', 'reset')),
            CONSTRAINT letters_outcome_known CHECK (outcome IN ('sent', 'refused', 'given_up')),
            CONSTRAINT letters_settled CHECK ((outcome IS NULL) = (settled_at IS NULL)),
            CONSTRAINT letters_settled_sleep CHECK (outcome IS NULL OR wake_at IS NULL)
        )
        """
    )
    op.execute("CREATE INDEX letters_wake_at_idx ON letters (wake_at) WHERE wake_at IS NOT NULL")
    op.execute("CREATE INDEX letters_address_created_at_idx ON letters (address, created_at)")
    op.execute("CREATE INDEX letters_user_id_idx ON letters (user_id)")
    op.execute("CREATE INDEX letters_created_at_idx ON letters (created_at)")
