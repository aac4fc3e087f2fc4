"""Backups of a whole shop: one file, of one moment, from which a new shop is made."""
