"""The schema of the products database, forward only. Frozen in time: a migration imports nothing of the service."""
