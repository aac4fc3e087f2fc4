"""Domain events: the outbox of a service, and the consumers that read it."""
