"""Backups of a whole shop: a file with all databases at one moment, from which a new shop is created."""
