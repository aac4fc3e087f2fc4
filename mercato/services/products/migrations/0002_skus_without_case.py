"""Products are also found by a sku whose letters have another case."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS products_lower_sku_idx")
        op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS products_lower_sku_idx ON products (lower(sku))")
