"""The ids of accounts that were erased: all that is kept of them."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # A repeated request to erase an account finds its id here, and gets the answer of the first.
    op.execute(
        """
        CREATE TABLE IF NOT EXISTS erased_accounts (
            user_id bigint CONSTRAINT erased_accounts_pkey PRIMARY KEY,
            erased_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
