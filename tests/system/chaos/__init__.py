"""`make chaos`: a shop under mixed load whose processes are killed at random, and an audit of what is left of it."""
