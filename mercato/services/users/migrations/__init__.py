"""The migrations of the users database. Forward only; each is safe while the version before it still runs."""
