"""The database of inventory, forward only."""
