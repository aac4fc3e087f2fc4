"""What Alembic runs to turn revisions into SQL text; `migrations.py` beside it calls it. It never connects anywhere."""

from alembic import context

# With named parameters a percent sign in a statement stays what it is.
context.configure(dialect_name="postgresql", dialect_opts={"paramstyle": "named"})
with context.begin_transaction():
    context.run_migrations()
