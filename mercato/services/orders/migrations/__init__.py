"""The database of orders, forward only."""
