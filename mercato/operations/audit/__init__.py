"""What must always hold, asked of copies of all databases."""
