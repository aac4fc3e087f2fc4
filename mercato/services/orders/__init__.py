"""Orders: what was bought, at which prices, and what has become of it."""
