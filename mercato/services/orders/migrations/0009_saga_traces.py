"""Where the recorded trace of a saga goes on: each of its steps is a part of the request that has moved it last."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # NULL where the trace is not recorded, as of nearly all.
    op.execute("ALTER TABLE sagas ADD COLUMN trace text")
