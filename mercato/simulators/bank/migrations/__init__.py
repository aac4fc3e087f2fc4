"""The database of sandbox, forward only."""
