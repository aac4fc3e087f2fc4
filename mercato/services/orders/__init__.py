"""Orders: what was bought, at which prices, and in which state it is."""
