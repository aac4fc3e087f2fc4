"""What open orders a customer has: bounds on their number and on what they hold of a product."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # What may have been done before: an index that is made concurrently is no part of a transaction.
    # Element n: how many pieces of the product of line n other open orders of the buyer had when this one was placed.
    # NULL: this order is not bounded so. No default: the table is not written anew.
    op.execute("ALTER TABLE orders ADD COLUMN IF NOT EXISTS open_units bigint[]")
    # Locks each of these users until the commit, by a negative key, which no other lock of this database has; in the
    # order of ids, or two batches would wait for each other. Then it counts, in a statement that sees what was
    # committed while the lock was waited for.
    op.execute(
        """
        CREATE OR REPLACE FUNCTION open_orders(users bigint[], OUT counts integer[], OUT units jsonb)
        LANGUAGE plpgsql AS $$
        BEGIN
            counts := '{}';
            units := '{}';
            IF users = '{}' THEN
                RETURN;
            END IF;
            PERFORM pg_advisory_xact_lock(-u.id) FROM (SELECT id FROM unnest(users) AS id ORDER BY id) AS u;
            counts := ARRAY(
                SELECT (SELECT count(*) FROM orders o WHERE o.user_id = u.id AND o.status = 'pending')::integer
                  FROM unnest(users) WITH ORDINALITY AS u (id, n)
                 ORDER BY u.n);
            IF counts = array_fill(0, ARRAY[cardinality(users)]) THEN
                RETURN;
            END IF;
            units := (
                SELECT coalesce(jsonb_object_agg(s.name, s.quantity), '{}')
                  FROM (
                    SELECT u.id || ':' || l.product_id AS name, sum(l.quantity) AS quantity
                      FROM unnest(users) AS u (id)
                     CROSS JOIN LATERAL (
                        SELECT o.lines FROM orders o WHERE o.user_id = u.id AND o.status = 'pending' OFFSET 0
                     ) o
                     CROSS JOIN json_to_recordset(o.lines) AS l (product_id bigint, quantity integer)
                     GROUP BY 1
                  ) s);
        END $$
        """
    )
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS orders_open_user_id_idx")
        op.execute(
            """
            CREATE INDEX CONCURRENTLY IF NOT EXISTS orders_open_user_id_idx
                ON orders (user_id) WHERE status = 'pending'
            """
        )
