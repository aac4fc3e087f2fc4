"""An operation with a key is done once."""
