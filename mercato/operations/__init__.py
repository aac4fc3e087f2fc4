"""What operators run: the audit, backups, and what follows a restore."""
