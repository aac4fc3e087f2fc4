"""Sessions have random ids, and which of them have ended is a log that others follow."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Each statement may be run again: what stands in the autocommit block stays where a later one fails.
    # The default is for rows that the version before this one inserts meanwhile.
    op.execute("ALTER TABLE sessions ADD COLUMN IF NOT EXISTS sid uuid")
    # A check gives way to one that allows more; to set a default again changes nothing.
    op.execute(
        """
        ALTER TABLE sessions
            -- squawk-ignore prefer-robust-stmts
            ALTER COLUMN sid SET DEFAULT gen_random_uuid(),
            -- squawk-ignore ban-drop-constraint
            DROP CONSTRAINT IF EXISTS sessions_sid_present,
            -- squawk-ignore ban-drop-constraint
            DROP CONSTRAINT IF EXISTS sessions_end_reason_known,
            ADD CONSTRAINT sessions_sid_present CHECK (sid IS NOT NULL) NOT VALID,
            ADD CONSTRAINT sessions_end_reason_known CHECK (end_reason IN
                ('signed_out', 'token_reused', 'password_changed', 'role_changed', 'ended_by_user', 'erased')) NOT VALID
        """
    )

    # Positions are given out under the lock of one row, which is held until the commit: they are in the order of
    # commits, and a reader that has seen one has seen all before it.
    op.execute(
        """
        CREATE TABLE IF NOT EXISTS ended_sessions (
            position bigint CONSTRAINT ended_sessions_pkey PRIMARY KEY,
            sid uuid NOT NULL,
            ended_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute(
        """
        CREATE TABLE IF NOT EXISTS ended_sessions_last (
            single boolean NOT NULL DEFAULT true CONSTRAINT ended_sessions_last_pkey PRIMARY KEY,
            position bigint NOT NULL,
            CONSTRAINT ended_sessions_last_is_single CHECK (single)
        )
        """
    )
    with op.get_context().autocommit_block():
        op.execute("UPDATE sessions SET sid = gen_random_uuid() WHERE sid IS NULL")
        op.execute("ALTER TABLE sessions VALIDATE CONSTRAINT sessions_sid_present")
        op.execute("ALTER TABLE sessions VALIDATE CONSTRAINT sessions_end_reason_known")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS sessions_sid_key")
        op.execute("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS sessions_sid_key ON sessions (sid)")
