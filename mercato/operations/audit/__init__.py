"""The audit: invariants, checked on copies of all databases."""
