"""PostgreSQL: connections, transactions, migrations, provisioning."""
