"""The database of events, forward only."""
