"""Mail: addresses."""
