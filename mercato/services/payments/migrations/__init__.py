"""The database of payments, forward only."""
