"""Simulators of external systems, each with a store of its own."""
