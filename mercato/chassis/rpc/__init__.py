"""Calls between services: client and server, batches, encoding, circuit breaker, transports."""
