"""What operators run: the audit, and copies of databases."""
