"""Programs for operators: the audit, backups, and the steps after a restore."""
