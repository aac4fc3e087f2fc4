"""Accounts are found by their names."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # The id is in it: the oldest of many accounts with one name is found without a sort.
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS users_name_id_idx")
        op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS users_name_id_idx ON users (name, id)")
