"""What people find and sort products by: without case, accents and punctuation."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # `terms`: folded words, made by the service, with the English stems of them. `sort_name`: the folded name.
    # `terms_version`: the version of the product that both were made of. Where it is not that of the row, a version of
    # the service without terms has written it: it is found and sorted by its own words until they are made.
    op.execute(
        """
        ALTER TABLE products
            ADD COLUMN IF NOT EXISTS terms tsvector,
            ADD COLUMN IF NOT EXISTS sort_name text COLLATE "C",
            ADD COLUMN IF NOT EXISTS terms_version bigint
        """
    )
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS products_terms_idx")
        op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS products_terms_idx ON products USING gin (terms)")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS products_without_terms_idx")
        op.execute(
            """
            CREATE INDEX CONCURRENTLY IF NOT EXISTS products_without_terms_idx ON products (id)
             WHERE terms_version IS DISTINCT FROM version
            """
        )
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS products_sort_name_idx")
        op.execute(
            """
            CREATE INDEX CONCURRENTLY IF NOT EXISTS products_sort_name_idx
                ON products (coalesce(sort_name, lower(name COLLATE "C")), id) WHERE status = 'active'
            """
        )
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS products_archived_idx")
        op.execute(
            """
            CREATE INDEX CONCURRENTLY IF NOT EXISTS products_archived_idx ON products (id) WHERE status = 'archived'
            """
        )
